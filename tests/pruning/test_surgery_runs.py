"""``--method manual --train-iters 0``: layers are removed, and no bit of the remaining weights changes."""

import json
import math

import pytest
import torch

from megaprune.weights.source import INDEX, HFSource
from tests.helpers import tiny

PRUNED = {2, 3, 5}
# Among them a source of one file and of several, in fp32 and in bf16 with fp32 norms, tied and not, with layer_types
# (Qwen) and without (LLaMA), and layers that a search would protect.
CASES = {
    "plain": ("qwen3", torch.float32, "5GB", []),
    "several_files": ("llama3", torch.bfloat16, "100KB", []),
    "validated": ("qwen3_tied", torch.float32, "100KB", ["--valid-data"]),
    "in_bf16": ("qwen2", torch.bfloat16, "5GB", ["--valid-data", "--bf16"]),
}


@pytest.fixture(scope="module", params=CASES)
def pruned(request, tiny_model, tiny_data, tmp_path_factory):
    """Source model and its run."""
    family, dtype, max_shard_size, flags = CASES[request.param]
    source, run = tiny_model(family, dtype, max_shard_size), tmp_path_factory.mktemp("surgery") / "run"
    layers = ",".join(map(str, sorted(PRUNED, reverse=True)))
    argv = ["--hf-model", source, "--save", run, "--method", "manual", "--prune-layers", layers]
    argv += ["--train-iters", 0, "--max-shard-size", max_shard_size, "--seq-length", tiny.SEQ_LENGTH]
    for flag in flags:
        argv += [flag, tiny_data / "valid.jsonl"] if flag == "--valid-data" else [flag]
    tiny.run_here([str(word) for word in argv])
    return source, run


def kept_layers(source):
    return [layer for layer in range(HFSource(source).config["num_hidden_layers"]) if layer not in PRUNED]


def test_every_tensor_that_stays_is_its_source(pruned):
    source, run = pruned
    stored = tiny.read_tensors(source)
    expected = {name: tensor for name, tensor in stored.items() if ".layers." not in name}
    for new, old in enumerate(kept_layers(source)):
        prefix = f"model.layers.{old}."
        expected |= {n.replace(prefix, f"model.layers.{new}."): t for n, t in stored.items() if n.startswith(prefix)}
    found = tiny.read_tensors(run / "hf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_config_differs_in_the_layers_alone(pruned):
    source, run = pruned
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, run / "hf"))
    kept = kept_layers(source)
    expected = before | {"num_hidden_layers": len(kept)}
    if "layer_types" in before:
        expected["layer_types"] = [before["layer_types"][layer] for layer in kept]
    assert after == expected


def test_loads_in_transformers(pruned):
    source, run = pruned
    model = tiny.load_hf(run / "hf")
    assert len(model.model.layers) == len(kept_layers(source))


def test_what_stands_beside_the_weights_is_copied(pruned):
    source, run = pruned
    copied = {path.name for path in source.iterdir()} - {"config.json", INDEX}
    copied = {name for name in copied if not name.endswith(".safetensors")}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    for name in copied:
        assert (run / "hf" / name).read_bytes() == (source / name).read_bytes()
    weights = {path.name for path in (run / "hf").glob("*.safetensors")}
    expected = copied | weights | {"config.json", "README.md"} | ({INDEX} if len(weights) > 1 else set())
    assert {path.name for path in (run / "hf").iterdir()} == expected


def test_index_lists_what_is_there(pruned):
    source, run = pruned
    assert (source / INDEX).exists() == (run / "hf" / INDEX).exists()
    if not (run / "hf" / INDEX).exists():
        assert [path.name for path in (run / "hf").glob("*.safetensors")] == ["model.safetensors"]
        return
    index, found = json.loads((run / "hf" / INDEX).read_text()), tiny.read_tensors(run / "hf")
    assert index["weight_map"].keys() == found.keys()
    assert set(index["weight_map"].values()) == {path.name for path in (run / "hf").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def test_report(pruned):
    source, run = pruned
    report = json.loads((run / "report.json").read_text())
    kept, found = kept_layers(source), tiny.read_tensors(run / "hf")
    assert (report["kept_layers"], report["pruned_layers"], report["num_layers"]) == (kept, sorted(PRUNED), len(kept))
    assert report["params_after"] == sum(math.prod(tensor.shape) for tensor in found.values())
    assert report["tokens_seen"] == 0


@pytest.mark.parametrize("pruned, tolerance", [("validated", 1e-5), ("in_bf16", 2e-3)], indirect=["pruned"])
def test_validation_losses_are_those_of_transformers(pruned, tolerance, tiny_data, tmp_path):
    source, run = pruned
    valid = json.loads((run / "report.json").read_text())["valid"]
    assert valid["recovered"] == valid["pruned"]
    for which, folder in (("teacher", source), ("pruned", run / "hf")):
        assert valid[which]["loss"] == pytest.approx(mean_loss(folder, tiny_data, tmp_path), rel=tolerance)


def mean_loss(folder, tiny_data, cache):
    """Return the mean cross-entropy over the validation windows, by transformers."""
    from transformers import AutoTokenizer

    from megaprune.data.batches import eval_batches
    from megaprune.data.prepare import prepare_dataset

    dataset = prepare_dataset(
        [str(tiny_data / "valid.jsonl")],
        AutoTokenizer.from_pretrained(folder),
        seq_length=tiny.SEQ_LENGTH,
        cache_dir=cache,
        pad_last=True,
    )
    model, total, count = tiny.load_hf(folder), 0.0, 0.0
    for batch in eval_batches(dataset, micro_batch_size=1, dp_rank=0, dp_size=1):
        with torch.no_grad():
            logits = model(batch.tokens).logits
        losses = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none")
        total += (losses * batch.loss_mask[0]).sum().item()
        count += batch.loss_mask.sum().item()
    return total / count
