"""Pruning without training: tensors are renamed, and valid files beside them are copied."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers.checkpoints import LLAMA, QWEN2, random_tensors, read_index, write_folder

KEPT = [0, 2, 3]


def prune(source_folder, folder, kept=KEPT, size=10**9):
    source = HFSource(source_folder)
    folder.mkdir()
    write_pruned_weights(source, kept, folder, size)
    write_pruned_config(source, kept, folder)
    HFSource(folder).check_tensors()
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10**9, 4000])
def test_every_tensor_equals_its_source_bit_for_bit(tmp_path, config, dtype, size):
    before = write_folder(tmp_path / "source", config, random_tensors(config, dtype), num_files=2)
    after = prune(tmp_path / "source", tmp_path / "pruned", size=size)
    expected = {name: tensor for name, tensor in before.items() if "layers" not in name}
    for new, layer in enumerate(KEPT):
        prefix = f"model.layers.{layer}."
        expected |= {
            name.replace(prefix, f"model.layers.{new}."): t for name, t in before.items() if name.startswith(prefix)
        }
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_nan_is_moved_like_any_other_number(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.2.input_layernorm.weight"][3] = torch.nan
    write_folder(tmp_path / "source", LLAMA, tensors)
    after = prune(tmp_path / "source", tmp_path / "pruned")
    assert after["model.layers.1.input_layernorm.weight"][3].isnan()


def test_config_is_edited_and_nothing_else_in_it(tmp_path):
    config = LLAMA | {
        "custom_pipelines": {"b": 1, "a": None},
        "layer_types": ["full_attention"] * 4,
        "torch_dtype": "float32",
    }
    write_folder(tmp_path / "source", config)
    before = (tmp_path / "source" / "config.json").read_bytes()
    prune(tmp_path / "source", tmp_path / "pruned")
    text = (tmp_path / "pruned" / "config.json").read_text()
    assert json.loads(text) == config | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    assert list(json.loads(text)) == list(config)
    assert (tmp_path / "source" / "config.json").read_bytes() == before


def test_index_is_that_of_the_result(tmp_path):
    write_folder(tmp_path / "source", LLAMA, num_files=2)
    after = prune(tmp_path / "source", tmp_path / "pruned", size=4000)
    weight_map = read_index(tmp_path / "pruned")
    assert weight_map.keys() == after.keys()
    assert set(weight_map.values()) == {path.name for path in (tmp_path / "pruned").glob("*.safetensors")}


def test_bytes_are_copied_from_file_to_file(tmp_path, monkeypatch):
    """No tensor is loaded into memory, however large a shard is."""
    write_folder(tmp_path / "source", LLAMA, num_files=2)
    monkeypatch.setattr(HFSource, "read", lambda *args: pytest.fail("a tensor was read"))
    assert len(prune(tmp_path / "source", tmp_path / "pruned")) == 30
