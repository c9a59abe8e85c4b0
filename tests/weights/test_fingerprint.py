"""A model's fingerprint identifies the model, however its files are divided."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaprune.cli import main as cli
from megaprune.weights.fingerprint import fingerprinted_tensors, model_fingerprint, tensor_digests
from megaprune.weights.source import HFSource
from megaprune.weights.torch_dist.source import CheckpointSource


def fingerprint(source):
    names = fingerprinted_tensors(source)
    return model_fingerprint(source, tensor_digests(source, names[::2]) | tensor_digests(source, names[1::2]))


def edited(model, folder, edit):
    copy = shutil.copytree(model, folder)
    tensors = {name: edit(name, tensor) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return fingerprint(HFSource(copy))


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_the_same_in_other_files(tiny_model, tmp_path, family):
    expected = fingerprint(HFSource(tiny_model(family)))
    assert fingerprint(HFSource(tiny_model(family, max_shard_size="100KB"))) == expected
    argv = ["import", "--hf-model", str(tiny_model(family)), "--megatron-path", str(tmp_path / "m")]
    assert cli.attempt("convert", argv) == (0, None)
    assert fingerprint(CheckpointSource(tmp_path / "m")) == expected


def test_the_same_by_other_libraries(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "/there"}))
    assert fingerprint(HFSource(model)) == fingerprint(HFSource(tiny_model("qwen3")))


def test_others_for_other_models(tiny_model, tmp_path):
    model = tiny_model("qwen3")
    found = {
        "itself": fingerprint(HFSource(model)),
        "bf16": fingerprint(HFSource(tiny_model("qwen3", torch.bfloat16))),
        "tied": fingerprint(HFSource(tiny_model("qwen3_tied"))),
        "trained": edited(model, tmp_path / "0", lambda name, t: t + 1e-4 * torch.randn(t.shape)),
        "one matrix": edited(model, tmp_path / "1", lambda name, t: t * 1.001 if "3.mlp.up" in name else t),
        "one norm": edited(
            model,
            tmp_path / "2",
            lambda name, t: torch.cat([t[:-1], t[-1:] + 1]) if name.endswith("5.input_layernorm.weight") else t,
        ),
    }
    config = json.loads((model / "config.json").read_text())
    other = shutil.copytree(model, tmp_path / "3")
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    found["config"] = fingerprint(HFSource(other))
    assert len(set(found.values())) == len(found), found
