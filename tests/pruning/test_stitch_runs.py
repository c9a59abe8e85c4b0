"""Runs that fold maps of the removed layers into the pruned model."""

import json

import pytest
import torch

from megaprune.evaluation.perplexity import evaluate_model
from megaprune.utils.errors import RunStopped, UsageError
from tests.helpers import tiny


def report_of(run):
    return json.loads((run / "report.json").read_text())


@pytest.mark.slow
def test_without_training_the_export_holds_the_maps(tiny_model, tiny_data, tmp_path, capsys):
    tiny.run_here(tiny.stitched_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "0,2,3,5"))
    assert "there is no layer before the cut at layer 0" in capsys.readouterr().out
    report, losses = report_of(tmp_path / "run"), None
    losses = {model: found["loss"] for model, found in report["valid"].items()}
    assert list(losses) == ["teacher", "pruned", "stitched", "recovered"]
    assert losses["stitched"] == losses["recovered"] != losses["pruned"]
    assert report["stages"]["stitch"]["tokens"] == 2 * 4 * tiny.SEQ_LENGTH
    # layers 1 and 4 stand before a cut
    source, found = tiny.read_tensors(tiny_model("qwen3_tied")), tiny.read_tensors(tmp_path / "run" / "hf")
    kept, changed = report["kept_layers"], set()
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        original = name if layer is None else name.replace(f".{layer}.", f".{kept[layer]}.", 1)
        if not torch.equal(tensor, source[original]):
            changed.add(original)
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 4)}
    measured = evaluate_model(
        str(tmp_path / "run" / "hf"), [str(tiny_data / "valid.jsonl")], seq_length=tiny.SEQ_LENGTH
    )
    assert measured["loss"] == pytest.approx(losses["stitched"], abs=1e-4)
    card = (tmp_path / "run" / "hf" / "README.md").read_text()
    assert "stitched, before recovery" in card


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--bf16",), ("--lora-rank", "2"), ("--use-distributed-optimizer",)])
def test_recovery_starts_from_the_maps_and_resumes(tiny_model, tiny_data, tmp_path, flags):
    def argv(name):
        words = ("--train-iters", "3", "--lr-warmup-iters", "0", "--lr", "1e-6", *flags)
        return tiny.stitched_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, "2,3", *words)

    tiny.run_here(argv("whole"))
    with pytest.raises(RunStopped):
        tiny.run_here(argv("stopped"), tiny.stop_after(1))
    tiny.run_here(argv("stopped"))
    whole, stopped = report_of(tmp_path / "whole"), report_of(tmp_path / "stopped")
    assert whole["valid"] == stopped["valid"]
    # such a small step changes nothing: the optimizer starts from the maps, too
    valid = {model: found["loss"] for model, found in whole["valid"].items()}
    gain = abs(valid["stitched"] - valid["pruned"])
    assert abs(valid["recovered"] - valid["stitched"]) < 0.2 * gain and gain > 3e-3
    tensors, expected = (tiny.read_tensors(tmp_path / name / "hf") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def searched(tiny_model, tiny_data, folder, *extra):
    """Return the reports of a stitched run with a search, and of one that was stopped at the end of its search."""

    def argv(name):
        flags = ("--train-iters", "4", "--search-iters", "2", "--lr-warmup-iters", "0", *extra)
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, folder / name, *flags, "--stitch", "fold")

    tiny.run_here(argv("whole"))
    with pytest.raises(RunStopped):
        tiny.run_here(argv("stopped"), tiny.stop_after(2))
    tiny.run_here(argv("stopped"))
    return report_of(folder / "whole"), report_of(folder / "stopped")


@pytest.mark.slow
def test_a_search_with_frozen_weights_is_stitched_and_resumes_from_its_end(tiny_model, tiny_data, tmp_path):
    whole, stopped = searched(tiny_model, tiny_data, tmp_path, "--search-weights", "frozen")
    assert whole["kept_layers"] == stopped["kept_layers"] and whole["valid"] == stopped["valid"]
    gone = ",".join(map(str, whole["pruned_layers"]))
    tiny.run_here(tiny.stitched_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "named", gone))
    assert report_of(tmp_path / "named")["valid"]["stitched"] == whole["valid"]["stitched"]


@pytest.mark.slow
def test_after_a_search_that_trains_the_weights_their_maps_are_fitted(tiny_model, tiny_data, tmp_path):
    whole, stopped = searched(tiny_model, tiny_data, tmp_path, "--lr", "1e-4")
    assert whole["valid"] == stopped["valid"] and whole["valid"]["stitched"] != whole["valid"]["pruned"]
    tensors, expected = (tiny.read_tensors(tmp_path / name / "hf") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_norm_behind_the_mlp_is_refused(tiny_model, tiny_data, tmp_path):
    argv = tiny.stitched_argv(tiny_model("pangu_ultra_moe"), tiny_data, tmp_path / "run", "2")
    with pytest.raises(UsageError, match="--stitch fold: .* has a norm after each MLP"):
        tiny.run_here(argv)
    assert not (tmp_path / "run").exists()
