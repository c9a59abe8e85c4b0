"""HF to a Megatron-Core checkpoint and back: the same bits for any number of workers and interruptions."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megaprune.weights import byte_ranges
from megaprune.weights.dtypes import TORCH_NAMES
from megaprune.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantize, scale_shape
from megaprune.weights.source import HFSource
from megaprune.weights.torch_dist import chunks, import_hf
from megaprune.weights.torch_dist.chunks import Chunk, ChunkReader, StoredTensor, append_tensor
from megaprune.weights.torch_dist.metadata import read_metadata, write_metadata
from megaprune.weights.torch_dist.source import CheckpointSource
from tests.helpers import pangu, tiny
from tests.helpers.converting import KEY, assert_same_model, contents, convert, done, edited, raising, through_megatron
from tests.helpers.launch import torchrun
from tests.weights.torch_dist import kill_worker

CONVERT = Path(__file__).parents[3] / "tools" / "convert.py"
EVERY = (*tiny.FAMILIES, *tiny.MOE_FAMILIES, "pangu_ultra_moe")


@pytest.mark.parametrize("size", ["5GB", "50KB"])
@pytest.mark.parametrize("name", [*EVERY, "mtp"])
def test_round_trip_is_bit_equal(models, name, size, tmp_path):
    model = models(name)
    done("import", "--hf-model", model, "--megatron-path", tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 2
    done("export", "--megatron-path", tmp_path / "megatron", "--hf-path", tmp_path / "hf", "--max-shard-size", size)
    assert_same_model(tmp_path / "hf", model)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (size == "50KB")
    largest = max(t.nbytes for t in tiny.read_tensors(model).values())
    assert all(path.stat().st_size < max(60_000, largest + 10_000) for path in files) or size == "5GB"
    done("verify", "--hf-model", model, "--hf-path", tmp_path / "hf")
    beside = {path.name for path in model.iterdir()} - {path.name for path in model.glob("model*")} - {"README.md"}
    assert beside <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parallel
def test_result_does_not_depend_on_who_works(models, tmp_path):
    model = models("deepseek_v3")
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        done("import", "--hf-model", model, "--megatron-path", out / "m", "--workers", workers)
        done("export", "--megatron-path", out / "m", "--hf-path", out / "hf", "--max-shard-size", "50KB")
    assert contents(tmp_path / "w1" / "m") == contents(tmp_path / "w3" / "m")
    for verb, flags in (
        ("import", ["--hf-model", model, "--megatron-path", tmp_path / "two" / "m"]),
        ("export", ["--megatron-path", tmp_path / "w1" / "m", "--hf-path", tmp_path / "two" / "hf"]),
    ):
        words = [verb, *flags, *(["--max-shard-size", "50KB"] if verb == "export" else [])]
        ran = subprocess.run([*torchrun(2), CONVERT, *words], env=tiny.environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("ported") == 1
    assert contents(tmp_path / "two" / "hf") == contents(tmp_path / "w1" / "hf")
    # of the import, whose parts are larger there, the tensors
    done("export", "--megatron-path", tmp_path / "two" / "m", "--hf-path", tmp_path / "again")
    assert_same_model(tmp_path / "again", model)


def test_dtype(models, tmp_path):
    model = models("deepseek_v3")
    done("import", "--hf-model", model, "--megatron-path", tmp_path / "m", "--dtype", "bf16")
    done("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf")
    found = tiny.read_tensors(tmp_path / "hf")
    for name, tensor in tiny.read_tensors(model).items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def fp8(models, tmp_path_factory):
    """FP8 model whose scales are in another file than their weights, and its weights in bf16."""
    model, out = models("deepseek_v3"), tmp_path_factory.mktemp("fp8") / "model"
    generator = torch.Generator().manual_seed(2)
    tensors, scales, expected = tiny.read_tensors(model), {}, {}
    for name, tensor in tensors.items():
        expected[name] = tensor
        if "_proj" in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
            scales[name + SCALE_SUFFIX] = torch.rand(scale_shape(tensor.shape), generator=generator)
            expected[name] = dequantize(tensors[name], scales[name + SCALE_SUFFIX])
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    out.mkdir()
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
    for file, part in files.items():
        save_file(part, out / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config))
    return out, expected


def test_fp8_becomes_bf16(fp8, tmp_path):
    model, expected = fp8
    found = through_megatron(model, tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("verb", ["import", "export"])
def test_killed_and_resumed_gives_the_same_bytes(models, verb, tmp_path, monkeypatch):
    monkeypatch.setattr(import_hf, "PART_BYTES", 30_000)
    given = str(models("qwen3_tied"))
    if verb == "export":
        done("import", "--hf-model", given, "--megatron-path", tmp_path / "m")
        given = str(tmp_path / "m")
    shares = ["0", "0.02", "0.4", "0.9", "0.99", "1"]  # from the first tensor to the name of the whole
    ran = subprocess.run(
        [sys.executable, kill_worker.__file__, verb, given, tmp_path / "out", *shares],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    expected = contents(tmp_path / "out")
    for share in shares:
        out = tmp_path / f"out-{share}"
        assert out.exists() or float(share) < 0.9  # killed when all was done but to clear up
        assert kill_worker.convert(verb, given, str(out), ("--resume",)) == (0, None)
        assert contents(out) == expected, share
    assert not list(tmp_path.glob("*.tmp"))


def test_unfinished_work_is_not_taken_for_other_work(models, tmp_path, monkeypatch):
    out = tmp_path / "m"
    with monkeypatch.context() as broken:
        broken.setattr(chunks, "copy_range", raising(OSError(errno.ENOSPC, "No space left on device")))
        status, line = convert("import", "--hf-model", models("qwen2"), "--megatron-path", out)
    assert status == 1 and "No space left on device" in line and "--resume" in line and not out.exists()
    for flags, said in (((), "continue it with --resume"), (("--resume", "--dtype", "bf16"), "other flags")):
        status, line = convert("import", "--hf-model", models("qwen2"), "--megatron-path", out, *flags)
        assert status == 2 and said in line
    done("import", "--hf-model", models("qwen2"), "--megatron-path", out, "--resume")


def test_verify_tells_what_differs(models, tmp_path, capsys):
    model = models("qwen3")

    def edit(tensors):
        tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
        tensors[KEY].view(-1)[5] += 1
        tensors["model.embed_tokens.weight"][0, 0] = -0.0

    original = edited(model, tmp_path / "a", lambda t: t["model.embed_tokens.weight"][0].zero_())
    other = edited(original, tmp_path / "b", edit)
    status, line = convert("verify", "--hf-model", original, "--hf-path", other)
    shown = capsys.readouterr().out
    assert status == 1 and "4 are not" in line
    for said in ("model.norm.weight is in", "lm_head.weight is stored as F32", f"{KEY} differs, first in byte 2"):
        assert said in shown, shown


def test_chunks_of_any_layout_are_put_together(models, tmp_path):
    """The checkpoint looks like one that Megatron-Core saved at TP 2, with a padded vocabulary."""
    model, out = models("qwen3"), tmp_path / "m"
    done("import", "--hf-model", model, "--megatron-path", out)
    reader, stored = ChunkReader(out), read_metadata(out)
    tensors = {}
    with (out / "other.distcp").open("w+b", buffering=0) as file:
        for key, tensor in stored.items():
            dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
            whole = torch.empty(tensor.size, dtype=dtype)
            for chunk in tensor.chunks:
                part = torch.empty(chunk.shape, dtype=dtype)
                reader.read(chunk, tensor.dtype, part)
                whole[tuple(slice(a, a + n) for a, n in zip(chunk.offset, chunk.shape, strict=True))] = part
            if "word_embeddings" in key or "output_layer" in key:
                whole = torch.cat([whole, torch.full((53, whole.shape[1]), 9.0)])
            chunks, dim = [], 1 if "linear_proj" in key or "linear_fc2" in key else 0
            start = 0
            for part in whole.chunk(2, dim):
                offset = [0] * whole.ndim
                offset[dim] = start
                start += part.shape[dim]
                place = append_tensor(file, part.clone(), "other.distcp")
                chunks.append(Chunk(tuple(offset), tuple(part.shape), place))
            tensors[key] = StoredTensor(tuple(whole.shape), tensor.dtype, tuple(chunks))
    write_metadata(out, tensors)
    source, expected = CheckpointSource(out), tiny.read_tensors(model)
    for name in ("model.embed_tokens.weight", KEY, "model.layers.2.self_attn.k_proj.weight"):
        for rows in ((0, 5), (7, 60), (63, 64)):
            assert torch.equal(source.read(name, 0, *rows), expected[name][slice(*rows)]), (name, rows)
    done("export", "--megatron-path", out, "--hf-path", tmp_path / "hf")
    assert_same_model(tmp_path / "hf", model)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_tied", "phi3", "gpt_oss"])
def test_slices_are_those_of_the_hf_folder(models, name, tmp_path):
    done("import", "--hf-model", models(name), "--megatron-path", tmp_path / "m")
    source, original = CheckpointSource(tmp_path / "m"), HFSource(models(name))
    assert sorted(source.names) == sorted(original.names)
    for tensor in original.names:
        shape = original.shape(tensor)
        assert (source.shape(tensor), source.dtype(tensor)) == (shape, original.dtype(tensor))
        for dim in range(len(shape)):
            part = (tensor, dim, shape[dim] // 4, shape[dim] // 2)
            assert torch.equal(source.read(*part), original.read(*part)), part
            assert torch.equal(source.read(tensor), original.read(tensor)), tensor


@pytest.mark.parametrize("kernel_can", [True, False])
@pytest.mark.parametrize("start, at", [(4096 + 8, 8), (9, 5000), (0, 0)], ids=["alike in pages", "not alike", "begin"])
def test_copied_ranges(start, at, kernel_can, tmp_path, monkeypatch):
    if not kernel_can:
        monkeypatch.setattr(byte_ranges.os, "copy_file_range", raising(OSError(errno.EXDEV, "other file system")))
    data, length, told = os.urandom(3 * 2**20), 2**21 + 77, []
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("w+b") as out:
        assert byte_ranges.copy_range(byte_ranges.Range(source, start, length), out, at, told.append)
        assert not byte_ranges.copy_range(byte_ranges.Range(source, start, len(data) + 1), out, at, told.append)
    whole = (tmp_path / "out").read_bytes()
    assert whole == bytes(at) + data[start:] and sum(told) == length + len(data) - start


def test_without_help_from_the_kernel(models, tmp_path, monkeypatch):
    monkeypatch.setattr(byte_ranges.os, "copy_file_range", raising(OSError(errno.EXDEV, "other file system")))
    done("import", "--hf-model", models("qwen3"), "--megatron-path", tmp_path / "m")
    done("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf")
    assert_same_model(tmp_path / "hf", models("qwen3"))


def test_remote_code_is_carried_and_not_run(models, tmp_path):
    done("import", "--hf-model", models("pangu_ultra_moe"), "--megatron-path", tmp_path / "m")
    assert {path.name for path in (tmp_path / "m" / "hf").iterdir()} >= {*pangu.REMOTE_CODE, "config.json"}
