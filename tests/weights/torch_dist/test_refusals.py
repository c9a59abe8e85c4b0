"""Impossible conversions are refused with one line; nothing is left behind and nothing is lost."""

import json
import os
import shutil

import pytest
import torch

from megaprune.weights.fp8 import SCALE_SUFFIX
from tests.helpers import tiny
from tests.helpers.checkpoints import layers_in_config
from tests.helpers.converting import KEY, convert, done, edited


def cut_file(model, out):
    folder = edited(model, out, lambda tensors: None)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    return folder


def lying_index(model, out):
    folder = edited(model, out, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(tiny.read_tensors(model), "model-00001-of-00002.safetensors")
    weight_map[KEY] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


BAD_IMPORTS = {
    "truncated": (cut_file, "truncated"),
    "missing file": (lying_index, "model-00002-of-00002.safetensors is missing"),
    "wrong shape": (
        lambda model, out: edited(model, out, lambda t: t.update({KEY: t[KEY][:-1].contiguous()})),
        f"{KEY} is stored as",
    ),
    "unknown tensor": (
        lambda model, out: edited(model, out, lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        "holds model.extra.weight",
    ),
    "missing tensor": (lambda model, out: edited(model, out, lambda t: t.pop(KEY)), f"lacks {KEY}"),
    "missing scale": (
        lambda model, out: edited(
            model,
            out,
            lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}),
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        ),
        KEY + SCALE_SUFFIX,
    ),
    "scale of nothing": (
        lambda model, out: edited(model, out, lambda t: t.update({KEY + SCALE_SUFFIX: torch.ones(1, 1)})),
        "no FP8 weight that it scales",
    ),
    "two dtypes in one tensor": (
        lambda model, out: edited(model, out, lambda t: t.update({KEY: t[KEY].to(torch.bfloat16)})),
        "give --dtype",
    ),
    "no folder": (lambda model, out: out, "does not exist"),
}


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_bad_input_of_import(models, name, tmp_path):
    make, said = BAD_IMPORTS[name]
    folder = make(models("qwen3"), tmp_path / "bad")
    status, line = convert("import", "--hf-model", folder, "--megatron-path", tmp_path / "m")
    assert status == 1 and said in line and "\n" not in line
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("edit", ["shape", "missing"])
def test_damaged_mtp_is_refused(models, edit, tmp_path):
    name = "model.layers.5.mlp.experts.3.up_proj.weight"

    def damage(tensors):
        assert name in tensors
        if edit == "missing":
            tensors.pop(name)
        else:
            tensors[name] = tensors[name][:-1].contiguous()

    folder = edited(models("mtp"), tmp_path / "bad", damage)
    status, line = convert("import", "--hf-model", folder, "--megatron-path", tmp_path / "m")
    assert status == 1 and "model.layers.5.mlp.experts" in line
    assert not list(tmp_path.glob("m*"))


def test_files_of_others_are_not_touched(models, tmp_path):
    precious = tmp_path / "m.tmp" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    status, line = convert("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")
    assert status == 2 and "holds other files" in line and precious.read_text() == "mine"


def test_what_the_config_has_no_place_for_is_not_lost(models, tmp_path):
    done("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")
    config = tmp_path / "m" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | layers_in_config(5)))
    status, line = convert("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf")
    assert status == 1 and "holds decoder.layers.5." in line


def test_metadata_that_would_run_code_is_refused(models, tmp_path):
    done("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")
    for name in ("os.system", "torch.distributed.checkpoint.filesystem.os.system"):
        module, _, function = name.rpartition(".")
        payload = f"c{module}\n{function}\n(S'touch {tmp_path}/ran'\ntR.".encode()
        (tmp_path / "m" / ".metadata").write_bytes(payload)
        status, line = convert("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf")
        assert status == 1 and ".metadata is damaged" in line and not (tmp_path / "ran").exists()


def test_output_that_exists(models, tmp_path):
    for verb, flags in (("import", ("--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")),) * 2 + (
        ("export", ("--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "m")),
    ):
        status, line = convert(verb, *flags)
    assert status == 2 and "--hf-path" in line and "exists" in line
    status, line = convert("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")
    assert status == 2 and "--megatron-path" in line and "exists" in line


def test_no_room(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    status, line = convert("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "new" / "m")
    assert status == 1 and "needs" in line and "left" in line and not (tmp_path / "new").exists()


def test_bad_input_of_export(models, tmp_path):
    def refused(said, path):
        status, line = convert("export", "--megatron-path", path, "--hf-path", tmp_path / "hf")
        assert status == 1 and said in line and not (tmp_path / "hf").exists(), line

    refused("does not exist", tmp_path / "none")
    refused("no .metadata", models("qwen3"))
    out = tmp_path / "m"
    done("import", "--hf-model", models("qwen3"), "--megatron-path", out)
    metadata, part = (out / ".metadata").read_bytes(), out / "__1_0.distcp"
    (out / ".metadata").write_bytes(metadata.replace(b"torch.distributed.checkpoint.metadata", b"os" + b" " * 35, 1))
    refused(".metadata is damaged", out)
    (out / ".metadata").write_bytes(metadata)
    config = out / "hf" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | layers_in_config(8)))
    refused("lacks decoder.layers.7.", out)
    config.write_text(whole)
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    refused("__1_0.distcp is damaged or truncated", out)
    part.unlink()
    shutil.rmtree(tmp_path / "hf.tmp")
    refused("__1_0.distcp can't be read", out)


@pytest.mark.parametrize("words", [(), ("nothing",), ("import",), ("verify", "--hf-model", "a")])
def test_usage(words):
    status, line = convert(*words)
    assert status == 2 and line
