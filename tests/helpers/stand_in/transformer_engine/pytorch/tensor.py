class QuantizedTensor:
    """Class of FP8 tensors; there are none."""
