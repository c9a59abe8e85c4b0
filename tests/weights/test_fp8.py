"""Block-FP8 weights: dequantized bit for bit as a loop over blocks does it, whole or in slices."""

import pytest
import torch

from megaprune.utils.errors import MegapruneError
from megaprune.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantize, scale_shape
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers.checkpoints import LLAMA, random_tensors, write_folder

SHAPES = [(128, 128), (256, 384), (300, 130), (64, 576), (129, 1)]
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def quantized(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape((rows, columns)), generator=generator) + 0.1
    return weight, scale


def by_loop(weight, scale):
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            out[rows, columns] = (weight[rows, columns].float() * scale[i, j]).to(torch.bfloat16)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_equals_a_loop_over_blocks(shape):
    weight, scale = quantized(*shape)
    assert torch.equal(dequantize(weight, scale), by_loop(weight, scale))


@pytest.mark.parametrize("start, stop", [(0, 1), (5, 200), (127, 129), (128, 256), (250, 300)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_the_slice_of_the_whole(start, stop, dim):
    weight, scale = quantized(300, 300)
    part = weight[start:stop] if dim == 0 else weight[:, start:stop]
    whole = by_loop(weight, scale)
    expected = whole[start:stop] if dim == 0 else whole[:, start:stop]
    offset = {"row": start} if dim == 0 else {"column": start}
    assert torch.equal(dequantize(part, scale, **offset), expected)


def test_every_number_of_the_format():
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(130, 1)
    for scale in (1.0, 3.3e-5, 1e30, 2.0**-130):
        scales = torch.full(scale_shape(weight.shape), scale)
        found, expected = dequantize(weight, scales), by_loop(weight, scales)
        assert found.isnan().sum() == 2 * 130
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def fp8_folder(tmp_path):
    """Save a LLaMA whose layer matrices are FP8, with the scales in another file than their weights."""
    tensors, scales, expected = random_tensors(LLAMA), {}, {}
    for name, tensor in tensors.items():
        expected[name] = tensor
        if "proj" in name:
            tensors[name], scales[name + SCALE_SUFFIX] = quantized(*tensor.shape, seed=len(scales))
            expected[name] = by_loop(tensors[name], scales[name + SCALE_SUFFIX])
    folder = tmp_path / "fp8"
    write_folder(folder, LLAMA | {"quantization_config": FP8}, tensors | scales, num_files=3)
    return folder, expected


def test_source_reads_bf16(fp8_folder):
    folder, expected = fp8_folder
    source = HFSource(folder)
    source.check_tensors()
    assert set(source.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor) and source.dtype(name) == tensor.dtype
    name = "model.layers.1.mlp.gate_proj.weight"
    rows = expected[name].shape[0]
    assert torch.equal(source.read(name, 0, rows // 2, rows), expected[name][rows // 2 :])


def test_surgery_leaves_no_trace_of_fp8(fp8_folder, tmp_path):
    folder, expected = fp8_folder
    source, out = HFSource(folder), tmp_path / "out"
    out.mkdir()
    write_pruned_weights(source, [0, 2], out, 10**9)
    write_pruned_config(source, [0, 2], out)
    result = HFSource(out)
    result.check_tensors()
    assert "quantization_config" not in result.config
    name = "self_attn.q_proj.weight"
    assert torch.equal(result.read(f"model.layers.1.{name}"), expected[f"model.layers.2.{name}"])


def test_a_missing_scale_and_another_quantisation_are_refused(tmp_path):
    tensors, name = random_tensors(LLAMA), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_folder(tmp_path / "no-scale", LLAMA | {"quantization_config": FP8}, tensors)
    with pytest.raises(MegapruneError, match="up_proj.weight_scale_inv"):
        HFSource(tmp_path / "no-scale").check_tensors()
    write_folder(tmp_path / "awq", LLAMA | {"quantization_config": {"quant_method": "awq"}}, random_tensors(LLAMA))
    with pytest.raises(MegapruneError, match="awq"):
        HFSource(tmp_path / "awq").check_tensors()
