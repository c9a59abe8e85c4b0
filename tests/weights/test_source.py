"""HF folders: complete, sharded, and damaged in each way that a download can be."""

import json

import pytest
import torch

from megaprune.models.names import renumbered
from megaprune.models.sizes import layer_costs, model_size, output_cost
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers.checkpoints import LLAMA, QWEN2, random_tensors, read_index, write_folder, write_index

NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def refusal(folder):
    """Return the error line for a folder, from opening it or from checking its contents."""
    with pytest.raises(MegapruneError) as caught:
        HFSource(folder).check_tensors()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def num_files(request):
    return request.param


def test_reads_every_tensor_whole_or_in_slices(tmp_path, num_files):
    tensors = write_folder(tmp_path, LLAMA, num_files=num_files)
    source = HFSource(tmp_path)
    source.check_tensors()
    assert set(source.names) == set(tensors)
    for name, tensor in tensors.items():
        assert name in source
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, 0, 1, 3), tensor[1:3])
    assert torch.equal(source.read(QUERY, 1, 3, 7), tensors[QUERY][:, 3:7])
    assert torch.equal(source.read(QUERY, 1, 3), tensors[QUERY][:, 3:])
    assert torch.equal(source.read(QUERY, 1, 0, 2), tensors[QUERY][:, :2])
    assert "lm_head.bias" not in source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA, dtype))
    assert HFSource(tmp_path).dtype(NORM) == dtype


def test_unknown_dtype(tmp_path):
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA) | {NORM: torch.ones(16, dtype=torch.uint16)})
    with pytest.raises(MegapruneError, match="model.norm.weight is stored as U16, which megaprune does not read"):
        HFSource(tmp_path).dtype(NORM)


def test_parameters_of_kept_layers(tmp_path):
    tensors = write_folder(tmp_path, LLAMA)
    source = HFSource(tmp_path)
    per_layer = sum(t.numel() for name, t in tensors.items() if name.startswith("model.layers.0."))
    total = sum(t.numel() for t in tensors.values())
    assert model_size(source.config).total == total
    assert model_size(source.config, [1, 3]).total == total - 2 * per_layer
    assert layer_costs(source.config) == [per_layer] * 4
    assert output_cost(source.config) == 300 * 16


def test_tied_embeddings_count_once_and_may_be_stored_twice(tmp_path):
    tensors = random_tensors(QWEN2)
    assert "lm_head.weight" not in tensors
    write_folder(tmp_path, QWEN2, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    source = HFSource(tmp_path)
    source.check_tensors()
    assert model_size(source.config).total == sum(t.numel() for t in tensors.values())


def test_the_one_file_goes_before_an_index(tmp_path):
    tensors = write_folder(tmp_path, LLAMA)
    write_index(tmp_path, {NORM: "model-00001-of-00009.safetensors"})
    source = HFSource(tmp_path)
    source.check_tensors()
    assert set(source.names) == tensors.keys()


def test_names_after_pruning():
    assert renumbered("model.layers.7.mlp.up_proj.weight", [0, 3, 7]) == "model.layers.2.mlp.up_proj.weight"
    assert renumbered("model.layers.5.mlp.up_proj.weight", [0, 3, 7]) is None
    assert renumbered("model.layers.13.mlp.experts.13.up_proj.weight", [13]) == (
        "model.layers.0.mlp.experts.13.up_proj.weight"
    )
    assert renumbered("model.norm.weight", []) == "model.norm.weight"


# Damage


def test_file_that_the_index_names_is_missing(tmp_path):
    write_folder(tmp_path, LLAMA, num_files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing, although model.safetensors.index.json" in refusal(tmp_path)


def test_index_that_places_a_tensor_wrongly(tmp_path):
    write_folder(tmp_path, LLAMA, num_files=2)
    weight_map = read_index(tmp_path)
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    file = other.get(weight_map[QUERY], "model-00001-of-00002.safetensors")
    write_index(tmp_path, weight_map | {QUERY: file})
    assert f"places {QUERY} in {file}, which does not contain it" in refusal(tmp_path)


def test_index_that_leaves_a_tensor_out(tmp_path):
    write_folder(tmp_path, LLAMA, num_files=2)
    weight_map = read_index(tmp_path)
    del weight_map[QUERY]
    write_index(tmp_path, weight_map)
    assert f"lacks {QUERY}: the checkpoint is incomplete" in refusal(tmp_path)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'"weight_map"', b"\xff\xfe"]
)
def test_index_that_is_none(tmp_path, body):
    write_folder(tmp_path, LLAMA, num_files=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(body)
    assert "model.safetensors.index.json is not a safetensors index" in refusal(tmp_path)


def damage(path, how):
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    damaged = {
        "truncated": data[:-1],
        "half": data[: len(data) // 2],
        "truncated in the header": data[: 8 + header // 2],
        "empty": b"",
        "header garbage": data[:8] + b"\x00" * header + data[8 + header :],
        "an error page": b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>" * 9,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n",
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize(
    "how",
    ["truncated", "half", "truncated in the header", "empty", "header garbage", "an error page", "a Git LFS pointer"],
)
def test_damaged_files(tmp_path, num_files, how):
    write_folder(tmp_path, LLAMA, num_files=num_files)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    damage(path, how)
    assert refusal(tmp_path).startswith(f"{path} is damaged or truncated (")


def test_missing_tensors(tmp_path):
    tensors = random_tensors(LLAMA)
    write_folder(tmp_path, LLAMA, {name: tensor for name, tensor in tensors.items() if name != NORM})
    assert refusal(tmp_path) == f"{tmp_path} lacks {NORM}: the checkpoint is incomplete"
    some = {name: tensor for name, tensor in tensors.items() if "layers.3." not in name}
    write_folder(tmp_path, LLAMA, some)
    assert "lacks model.layers.3.input_layernorm.weight (and 8 more): the checkpoint is incomplete" in refusal(tmp_path)
    with pytest.raises(MegapruneError, match="lacks the tensor model.layers.3.mlp.up_proj.weight"):
        HFSource(tmp_path).read("model.layers.3.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.4.mlp.up_proj.weight", "x"])
def test_unknown_tensors(tmp_path, name):
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA) | {name: torch.ones(4)})
    assert f"holds {name}, which the llama family does not know: it would be lost" in refusal(tmp_path)


def test_rope_frequencies_are_no_unknown_tensor(tmp_path):
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(4)}
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA) | frequencies)
    source = HFSource(tmp_path)
    source.check_tensors()
    assert frequencies.keys() <= set(source.names)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        (QUERY, (24, 16), "[32, 16]"),
        ("model.layers.0.self_attn.k_proj.weight", (8, 16), "[16, 16]"),
        ("model.layers.2.mlp.down_proj.weight", (16, 32), "[16, 24]"),
        ("model.embed_tokens.weight", (301, 16), "[300, 16]"),
        (NORM, (16, 1), "[16]"),
        ("lm_head.weight", (300,), "[300, 16]"),
    ],
)
def test_weights_of_another_shape_than_the_config(tmp_path, name, shape, expected):
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA) | {name: torch.ones(shape)})
    assert f"{name} is stored as {list(shape)}, but config.json gives {expected}" in refusal(tmp_path)


# Folders without a model


def test_no_folder(tmp_path):
    assert "does not exist or is not a folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "does not exist or is not a folder" in refusal(tmp_path / "file")


def test_no_config(tmp_path):
    assert "holds no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "body, said",
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1]", "is not a JSON object"),
        (b'"llama"', "is not a JSON object"),
        (b"{}", "model_type None is not supported"),
        (b'{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
    ],
)
def test_config_that_is_none(tmp_path, body, said):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "config.json").write_bytes(body)
    assert said in refusal(tmp_path)


def test_config_that_asks_for_what_cannot_be_expressed(tmp_path):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "gelu"}))
    assert "hidden_act 'gelu' is not supported" in refusal(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    message = refusal(tmp_path)
    assert message.endswith("holds neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert refusal(tmp_path).endswith(", only pickled weights: convert them to safetensors first")
