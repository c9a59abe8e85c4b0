"""Stacked experts, names without a prefix, embeddings tied or not: read as in transformers, by `convert` and by
surgery, and written in the same layout.
"""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaprune.cli.main import attempt
from megaprune.mcore import parallel
from megaprune.models.sizes import model_size
from megaprune.utils.errors import MegapruneError
from megaprune.weights import reader
from megaprune.weights.source import HFSource
from megaprune.weights.stored_layout import StoredLayout
from megaprune.weights.torch_dist.source import CheckpointSource
from megaprune.weights.writer import ShardWriter, finish_shards
from tests.helpers import stored, tiny
from tests.helpers.converting import assert_same_model, convert, done

STACK = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(params=stored.MODELS)
def name(request):
    return request.param


def surgery(model, run, layers="1,3", *flags):
    argv = ["--hf-model", model, "--save", run, "--method", "manual", "--prune-layers", layers, "--train-iters", 0]
    tiny.run_here([str(word) for word in [*argv, "--seq-length", tiny.SEQ_LENGTH, *flags]])
    return run / "hf"


def without(model, layers):
    """Return the expected tensors of a model without some layers."""
    kept = [n for n in range(stored.config_of(model)["num_hidden_layers"]) if n not in layers]
    found = {}
    for name, tensor in tiny.read_tensors(model).items():
        before, mark, rest = name.partition("layers.")
        if mark:
            layer, _, rest = rest.partition(".")
            if int(layer) not in kept:
                continue
            name = f"{before}layers.{kept.index(int(layer))}.{rest}"
        found[name] = tensor
    return found


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_round_trip_is_bit_equal(stored_model, name, size, tmp_path):
    model = stored_model(name)
    done("import", "--hf-model", model, "--megatron-path", tmp_path / "m")
    done("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf", "--max-shard-size", size)
    assert_same_model(tmp_path / "hf", model)
    done("verify", "--hf-model", model, "--hf-path", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 or size == "5GB"
    assert {path.name for path in (tmp_path / "hf").glob("*.json")} == {
        path.name for path in model.glob("*.json") if not path.name.endswith("index.json")
    } | ({"model.safetensors.index.json"} if size == "50KB" else set())


def test_source_and_checkpoint_are_the_model_of_the_tables(stored_model, tiny_model, name, tmp_path):
    family, make = stored.MODELS[name]
    model, plain = HFSource(stored_model(name)), HFSource(tiny_model(family))
    model.check_tensors()
    done("import", "--hf-model", stored_model(name), "--megatron-path", tmp_path / "m")
    checkpoint = CheckpointSource(tmp_path / "m")
    checkpoint.check_tensors()
    extra = {"lm_head.weight"} if make in (stored.untied, stored.twice) else set()
    for found in (model, checkpoint):
        assert set(found.names) == set(plain.names) | extra
        assert found.config["tie_word_embeddings"] == (plain.config["tie_word_embeddings"] and make != stored.untied)
        for tensor in plain.names:
            whole = plain.read(tensor)
            assert found.shape(tensor) == tuple(whole.shape) and found.dtype(tensor) == whole.dtype
            assert torch.equal(found.read(tensor), whole), tensor
            assert torch.equal(found.read(tensor, 0, 3, 11), whole[3:11]), tensor
            if whole.ndim == 2:
                assert torch.equal(found.read(tensor, 1, 2, 9), whole[:, 2:9]), tensor


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_surgery_keeps_the_layout(stored_model, name, size, tmp_path):
    model = stored_model(name)
    hf = surgery(model, tmp_path / "run", "1,3", "--max-shard-size", size)
    expected, found = without(model, {1, 3}), tiny.read_tensors(hf)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
    tiny.load_hf(hf)
    assert stored.config_of(hf)["tie_word_embeddings"] == (
        stored.config_of(model)["tie_word_embeddings"] and "untied" not in name
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    counted = sum(t.numel() for key, t in expected.items() if not ("twice" in name and key == stored.OUTPUT))
    assert report["params_after"] == counted == model_size(HFSource(hf).config).total


def test_a_run_from_the_checkpoint_keeps_the_layout(stored_model, tmp_path):
    model = stored_model("qwen3_moe_stacked")
    done("import", "--hf-model", model, "--megatron-path", tmp_path / "m")
    flags = ["--save", tmp_path / "run", "--method", "manual", "--prune-layers", "2", "--train-iters", 0]
    words = ["--load", tmp_path / "m", *flags, "--seq-length", tiny.SEQ_LENGTH]
    tiny.run_here([str(word) for word in words])
    expected, found = without(model, {2}), tiny.read_tensors(tmp_path / "run" / "hf")
    assert found.keys() == expected.keys() and any(key.endswith("experts.gate_up_proj") for key in found)
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)


def test_validation_of_an_untied_model_is_that_of_transformers(stored_model, tiny_data, tmp_path):
    model, valid = stored_model("qwen3_tied_untied"), tiny_data / "valid.jsonl"
    hf = surgery(model, tmp_path / "run", "1,3", "--valid-data", valid)
    losses = json.loads((tmp_path / "run" / "report.json").read_text())["valid"]
    for which, folder in (("teacher", model), ("pruned", hf)):
        out = tmp_path / f"{which}.json"
        words = ["--hf-model", folder, "--data", valid, "--seq-length", tiny.SEQ_LENGTH, "--output", out]
        assert attempt("evaluate", [str(word) for word in words]) == (0, None)
        assert losses[which]["loss"] == pytest.approx(json.loads(out.read_text())["loss"], rel=1e-5)


def test_plan_counts_what_is_stored(stored_model, tmp_path):
    parallel.leave()  # a run before this one may have left its process group
    counted = {}
    for name in ("qwen3_tied_untied", "qwen3_tied_bare"):
        done("import", "--hf-model", stored_model(name), "--megatron-path", tmp_path / name)
        for flag, path in (("--hf-model", stored_model(name)), ("--load", tmp_path / name)):
            out = tmp_path / f"{name}{flag}.json"
            words = [flag, path, "--num-layers-to-prune", 2, "--train-iters", 20, "--world-size", 1, "--output", out]
            assert attempt("plan", [str(word) for word in [*words, "--seq-length", 32]]) == (0, None)
            found = json.loads(out.read_text())
            counted[name, flag] = found["phases"][0]["parameters"]
    more = tiny.VOCAB_SIZE * 64
    for flag in ("--hf-model", "--load"):
        assert counted["qwen3_tied_untied", flag] == counted["qwen3_tied_bare", flag] + more


# Refusals


def refused(model, said, tmp_path):
    """Check that import and surgery refuse with the same line and write nothing."""
    status, line = convert("import", "--hf-model", model, "--megatron-path", tmp_path / "m")
    assert status == 1 and said in line and "\n" not in line, line
    words = ["--hf-model", model, "--save", tmp_path / "run", "--method", "manual", "--prune-layers", "1"]
    words += ["--train-iters", "0", "--seq-length", "32"]
    assert attempt("prune", [str(word) for word in words]) == (1, line.replace("convert:", "prune:", 1))
    assert not list(tmp_path.glob("m")) and not (tmp_path / "run").exists()
    return line


def test_a_base_model_without_tied_embeddings_has_no_output_layer(tiny_model, tmp_path):
    model = stored.bare(tiny_model("qwen3"), tmp_path / "base")
    line = refused(model, "holds a base model, without an output layer", tmp_path)
    assert "tie_word_embeddings" in line and "model." not in line.replace(str(tmp_path), "")


@pytest.mark.parametrize("change", ["missing", "transposed", "experts", "both"])
def test_damaged_stacks(stored_model, change, tmp_path):
    key = "model.layers.2.mlp.experts.gate_up_proj"

    def edit(tensors):
        if change == "missing":
            tensors.pop(key)
        elif change == "transposed":
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
        elif change == "experts":
            tensors[key] = tensors[key][:-1].contiguous()
        else:
            tensors["model.layers.2.mlp.experts.1.up_proj.weight"] = torch.ones(40, 64)

    model = stored.edited(stored_model("qwen3_moe_stacked"), tmp_path / "bad", edit)
    if change == "both":
        with pytest.raises(MegapruneError, match=r"holds both .*experts"):
            HFSource(model)
        return
    line = refused(model, f"lacks {key}: " if change == "missing" else f"{key} is stored as [", tmp_path)
    assert "experts.0" not in line


def test_not_finite_experts_are_named_as_they_are_stored(stored_model, tiny_data, tmp_path):
    key = "model.layers.2.mlp.experts.down_proj"

    def edit(tensors):
        tensors[key][1, 2, 3] = torch.nan

    model = stored.edited(stored_model("qwen3_moe_stacked"), tmp_path / "bad", edit)
    words = tiny.select_argv(model, tiny_data, tmp_path / "run", "shortgpt")
    with pytest.raises(MegapruneError, match=f"{key} holds values that are not finite"):
        tiny.run_here(words)


def test_names_of_another_scheme_are_shown(tiny_model, tmp_path):
    (tmp_path / "bad").mkdir()
    tensors = {f"language_model.{key}": t for key, t in load_file(tiny_model("qwen3") / "model.safetensors").items()}
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    (tmp_path / "bad" / "config.json").write_text((tiny_model("qwen3") / "config.json").read_text())
    line = refused(tmp_path / "bad", "holds language_model.lm_head.weight (and ", tmp_path)
    assert "incomplete" not in line


def test_a_stack_is_read_by_slices(stored_model, monkeypatch):
    """Reading one expert must not read others."""
    source = HFSource(stored_model("qwen3_moe_stacked"))
    whole = tiny.read_tensors(source.folder)["model.layers.2.mlp.experts.gate_up_proj"]
    read, plain = [], reader.read_into
    monkeypatch.setattr(reader, "read_into", lambda found, view: read.append(len(view)) or plain(found, view))
    found = source.read("model.layers.2.mlp.experts.3.up_proj.weight", 0, 10, 30)
    assert torch.equal(found, whole[3, 50:70]) and read == [20 * 64 * whole.element_size()]
    read.clear()
    found = source.read("model.layers.2.mlp.experts.1.gate_proj.weight", 1, 5, 9)
    assert torch.equal(found, whole[1, :40, 5:9]) and sum(read) == 40 * 4 * whole.element_size()


def test_memory_of_surgery_does_not_grow_with_a_stack(tmp_path):
    """Experts are written one by one, and stacks are assembled from blocks of bytes."""
    experts, layout = {}, StoredLayout(stacks=frozenset({STACK}))
    for expert in range(4):
        for half in ("gate", "up"):
            experts[f"model.layers.0.mlp.experts.{expert}.{half}_proj.weight"] = torch.randn(512, 256)
    writer = ShardWriter(tmp_path, 600_000)
    for name, tensor in experts.items():
        writer.add(name, tensor)
    shards = writer.close()
    assert len(shards) == 8
    expected = torch.stack(list(experts.values())).view(4, 1024, 256)
    tracemalloc.start()
    finish_shards(tmp_path, shards, layout, 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(load_file(tmp_path / "model.safetensors")[STACK], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert peak < expected.nbytes / 2


@pytest.mark.parametrize("change, said", [("missing", "are incomplete"), ("dtype", "several"), ("twice", "twice")])
def test_stacks_that_can_not_be_put_together(tmp_path, change, said):
    writer = ShardWriter(tmp_path, 1)
    for expert in range(2):
        for half in ("gate", "up"):
            if change == "missing" and (expert, half) == (1, "up"):
                continue
            dtype = torch.bfloat16 if change == "dtype" and expert else torch.float32
            writer.add(f"model.layers.0.mlp.experts.{expert}.{half}_proj.weight", torch.ones(3, 4, dtype=dtype))
    shards = writer.close()
    with pytest.raises(MegapruneError, match=said):
        finish_shards(tmp_path, shards * (2 if change == "twice" else 1), StoredLayout(stacks=frozenset({STACK})))
