"""MXFP4 sources: weights equal transformers' conversion bit for bit, whole, in slices and as they stream."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megaprune.utils.errors import MegapruneError
from megaprune.weights import mxfp4
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers import tiny
from tests.helpers.converting import through_megatron


def _bits(tensor):
    return tensor.contiguous().view(torch.int16)


def test_every_byte_at_every_exponent():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, -1, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(-1, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0].t()
    found = mxfp4.dequantize(blocks, scales)
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers) and torch.equal(_bits(found)[numbers], _bits(expected)[numbers])


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    """The folder, and the expected tensors as transformers stores them."""
    plain, generator = tiny_model("gpt_oss", torch.bfloat16), torch.Generator().manual_seed(1)
    stored, expected = {}, tiny.read_tensors(plain)
    for name, tensor in list(expected.items()):
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            stored[name] = tensor
            continue
        experts, inner, outer = tensor.shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    del config["dtype"]  # as in the released config
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.make_tokenizer().save_pretrained(folder)
    return folder, expected


def test_every_weight_and_its_slices(quantized):
    folder, expected = quantized
    source = HFSource(folder)
    source.check_tensors()
    for name in source.names:
        parts = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        tensor = expected[f"{parts[1]}.{parts[3]}"][int(parts[2])] if parts else expected[name]
        assert torch.equal(source.read(name), tensor), name
        assert source.dtype(name) == tensor.dtype and source.shape(name) == tensor.shape
        for start, stop in ((1, 3), (20, 53), (32, None)) if source.is_quantized(name) else ():
            assert torch.equal(source.read(name, 0, start, stop), tensor[start:stop])
            assert torch.equal(source.read(name, 1, start, stop), tensor[:, start:stop])
    assert sum(map(source.is_quantized, source.names)) == 5 * 8 * 2


def test_layers_are_removed_and_config_says_no_quantization(quantized, tmp_path):
    folder, expected = quantized
    source = HFSource(folder)
    write_pruned_weights(source, [0, 2, 3], tmp_path, 10**6)
    write_pruned_config(source, [0, 2, 3], tmp_path)
    config, found = json.loads((tmp_path / "config.json").read_text()), tiny.read_tensors(tmp_path)
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    for new, old in enumerate((0, 2, 3)):
        of_layer = {name: tensor for name, tensor in expected.items() if f"layers.{old}." in name}
        assert len(of_layer) == 17
        for name, tensor in of_layer.items():
            assert torch.equal(found.pop(name.replace(f"layers.{old}.", f"layers.{new}.")), tensor), name
    assert len(found) == 3
    tiny.load_hf(tmp_path)


def test_an_import_streams_the_same_numbers(quantized, tmp_path):
    folder, expected = quantized
    found = through_megatron(folder, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors, name: tensors.pop(f"{name}_scales"), "lacks .*down_proj_scales, which MXFP4 needs"),
        (lambda tensors, name: tensors.pop(f"{name}_blocks"), "lacks .*down_proj"),
        (lambda tensors, name: tensors.pop(f"{name}_bias"), "lacks .*down_proj_bias"),
        (lambda tensors, name: tensors.update({name: torch.zeros(8, 96, 64)}), "holds both .*down_proj"),
        (
            lambda tensors, name: tensors.update({f"{name}_blocks": tensors[f"{name}_blocks"][:, :, :2].contiguous()}),
            "down_proj is stored as .8, 64, 64., but config.json gives .8, 96, 64.",
        ),
    ],
)
def test_incomplete_weights_are_refused(quantized, tmp_path, change, said):
    folder, _ = quantized
    tensors = tiny.read_tensors(folder)
    change(tensors, "model.layers.1.mlp.experts.down_proj")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(MegapruneError, match=said):
        HFSource(tmp_path).check_tensors()


def test_weights_that_config_does_not_call_quantized_are_refused(quantized, tmp_path):
    folder, _ = quantized
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(MegapruneError, match="is quantized: it holds .*, as MXFP4 stores it"):
        HFSource(tmp_path).check_tensors()
