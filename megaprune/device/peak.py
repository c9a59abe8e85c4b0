"""Peak throughput of GPUs."""

import re

# Dense bf16 products in TFLOP/s, as the vendor states them, by a word of the device's name and, if there are several
# forms, another one. The first match counts.
_BF16_TFLOPS = (
    ("H100", "PCIe", 756.0),
    ("H100", "NVL", 835.0),
    ("H100", "", 989.0),
    ("H800", "", 989.0),
    ("H200", "", 989.0),
    ("GH200", "", 989.0),
    ("H20", "", 148.0),
    ("GB200", "", 2500.0),
    ("B200", "", 2250.0),
    ("A100", "", 312.0),
    ("A800", "", 312.0),
    ("A30", "", 165.0),
    ("A40", "", 150.0),
    ("L40S", "", 362.0),
    ("L40", "", 181.0),
    ("L4", "", 121.0),
)


def bf16_tflops(name: str) -> float | None:
    """Return the peak of a device in TFLOP/s by the name that its driver gives, or None if it is not known."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    for model, form, tflops in _BF16_TFLOPS:
        if model in words and (not form or form in words):
            return tflops
    return None
