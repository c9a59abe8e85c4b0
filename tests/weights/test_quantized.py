"""Quantized sources: weights equal a plain computation bit for bit, whole, in slices and as they stream."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from megaprune.utils.errors import MegapruneError
from megaprune.weights.quantized import FORMATS, declared_format
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers import tiny
from tests.helpers.converting import through_megatron
from tests.helpers.newer_moe_configs import BLOCK_FP8, INT4

GROUP = 16
_ROWS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
_ROWS["config_groups"] = {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}
_INT4 = json.loads(json.dumps(INT4))
_INT4["config_groups"]["group_0"]["weights"]["group_size"] = GROUP
SETTINGS = {"blocks": BLOCK_FP8, "rows": _ROWS, "int4": _INT4}


def _of_blocks(name, shape, generator):
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand([math.ceil(length / 128) for length in shape], generator=generator) + 0.1
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    return {name: weight, name + "_scale_inv": scale}, (weight.float() * whole).to(torch.bfloat16)


def _of_rows(name, shape, generator):
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = (torch.rand(shape[0], 1, generator=generator) + 0.1).to(torch.bfloat16)
    return {name: weight, name + "_scale": scale}, weight.to(torch.bfloat16) * scale


def _of_int4(name, shape, generator):
    numbers = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int32)
    scale = (torch.rand(shape[0], shape[1] // GROUP, generator=generator) / 8 + 0.01).to(torch.bfloat16)
    packed = torch.zeros(shape[0], shape[1] // 8, dtype=torch.int32)
    for column in range(shape[1]):
        packed[:, column // 8] |= (numbers[:, column] + 8) << 4 * (column % 8)
    stored = {name + "_packed": packed, name + "_scale": scale, name + "_shape": torch.tensor(shape)}
    return stored, numbers.to(torch.bfloat16) * scale.repeat_interleave(GROUP, 1)


QUANTIZE = {"blocks": _of_blocks, "rows": _of_rows, "int4": _of_int4}
# the family that is released in the format, and the matrices that are quantized
FAMILIES = {"blocks": ("minimax_m2", "proj"), "rows": ("glm4_moe", "proj"), "int4": ("kimi_k25", ".experts.")}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tiny_model, tmp_path_factory):
    """The quantized folder, and the expected tensors."""
    family, part = FAMILIES[request.param]
    plain = tiny_model(family, torch.bfloat16)
    config = json.loads((plain / "config.json").read_text())
    stored, expected, generator = {}, tiny.read_tensors(plain), torch.Generator().manual_seed(1)
    for name, tensor in list(expected.items()):
        language = not name.startswith(("vision", "mm_"))
        if part in name and tensor.ndim == 2 and language and tensor.shape[1] % GROUP == 0:
            parts, expected[name] = QUANTIZE[request.param](name, tuple(tensor.shape), generator)
            stored |= parts
        else:
            stored[name] = tensor
    folder = tmp_path_factory.mktemp("quantized") / request.param
    folder.mkdir()
    # the companions in another file than their weights
    beside = {name: stored.pop(name) for name in list(stored) if name.endswith(("_scale", "_scale_inv", "_shape"))}
    files = {"model-00001-of-00002.safetensors": stored, "model-00002-of-00002.safetensors": beside}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    inner = config.get("text_config", config)  # Kimi's settings are those of the language model
    inner["quantization_config"] = SETTINGS[request.param]
    (folder / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(folder)
    return folder, expected, beside


def _tables_name(name):
    return name.removeprefix("language_model.")


def test_every_weight_and_its_slices(folders):
    folder, expected, beside = folders
    source = HFSource(folder)
    source.check_tensors()
    assert set(source.names) == set(map(_tables_name, expected))
    quantized = 0
    for name, tensor in expected.items():
        name = _tables_name(name)
        assert torch.equal(source.read(name), tensor), name
        assert source.dtype(name) == tensor.dtype and source.shape(name) == tensor.shape
        if source.is_quantized(name):
            quantized += 1
            for start, stop in ((1, 3), (5, 31), (0, 16)):
                assert torch.equal(source.read(name, 0, start, stop), tensor[start:stop])
                assert torch.equal(source.read(name, 1, start, stop), tensor[:, start:stop])
    assert quantized > 10


def test_layers_are_removed_and_config_says_no_quantization(folders, tmp_path):
    folder, expected, _ = folders
    source = HFSource(folder)
    kept = [layer for layer in range(source.num_layers) if layer != 1]
    write_pruned_weights(source, kept, tmp_path, 10**6)
    write_pruned_config(source, kept, tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    found = tiny.read_tensors(tmp_path)
    last = len(kept)
    for name, tensor in expected.items():
        new = name.replace(f"layers.{last}.", f"layers.{last - 1}.")
        if f"layers.{last}." in name and "vision" not in name:
            assert torch.equal(found[new], tensor), name
    tiny.load_hf(tmp_path)


def test_an_import_streams_the_same_numbers(folders, tmp_path):
    folder, expected, _ = folders
    found = through_megatron(folder, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_weight_without_its_scales_is_refused(folders, tmp_path):
    folder, _, beside = folders
    name = next(name for name in beside if "scale" in name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    del index["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MegapruneError, match="lacks .*scale"):
        HFSource(tmp_path).check_tensors()


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 8},
        {"symmetric": False},
        {"actorder": "group"},
        {"strategy": "tensor"},
        {"group_size": None},
        {"type": "float"},
    ],
)
def test_other_kinds_of_integers_are_no_format(change):
    settings = json.loads(json.dumps(INT4))
    assert declared_format({"quantization_config": settings}) is not None
    settings["config_groups"]["group_0"]["weights"] |= change
    assert declared_format({"quantization_config": settings}) is None
    assert declared_format({"quantization_config": settings | {"format": "int-quantized"}}) is None


def test_formats_have_names_of_their_own():
    assert len({format.name for format in FORMATS}) == len(FORMATS)
