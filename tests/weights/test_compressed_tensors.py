"""The formats of compressed-tensors are dequantized bit for bit as that package does, where it is installed."""

import pytest
import torch

from megaprune.weights.quantized import declared_format

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402

CASES = {
    "INT4 in groups of 32": ("pack-quantized", dict(type="int", num_bits=4, strategy="group", group_size=32)),
    "INT4 in groups of 128": ("pack-quantized", dict(type="int", num_bits=4, strategy="group", group_size=128)),
    "FP8 by rows": ("float-quantized", dict(type="float", num_bits=8, strategy="channel")),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_package(name, dtype):
    format, weights = CASES[name]
    weights = weights | {"symmetric": True}
    settings = {"config_groups": {"group_0": {"weights": weights}}, "format": format}
    ours = declared_format({"quantization_config": settings | {"quant_method": "compressed-tensors"}})
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(72, 384, generator=generator)
    size = weights.get("group_size", weight.shape[1])
    largest = weight.unflatten(1, (-1, size)).abs().amax(2)
    scale = (largest / (7.5 if format == "pack-quantized" else 448)).to(dtype)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress({"weight": weight.to(dtype), "weight_scale": scale}, scheme)
    expected = compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)

    def read(suffix, dim, start, stop):
        whole = stored["weight" + suffix]
        return whole[start:stop] if dim == 0 else whole[:, start:stop]

    assert torch.equal(ours.read(read, tuple(weight.shape), 0, 0, None), expected)
    assert torch.equal(ours.read(read, tuple(weight.shape), 1, 37, 301), expected[:, 37:301])
    assert len(expected.unique()) > 500
