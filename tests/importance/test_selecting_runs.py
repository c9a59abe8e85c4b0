"""Runs of methods that look at calibration data, and of endpoint tuning."""

import json

import pytest
import torch

from megaprune.pruning import resolve
from megaprune.report.metrics import read_metrics
from megaprune.utils.errors import RunStopped, UsageError
from tests.helpers import tiny

pytestmark = pytest.mark.slow


def test_auto_in_a_run(tiny_model, tiny_data, tmp_path):
    argv = [*tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "auto"), "--train-iters", "2"]
    tiny.run_here([*argv, "--selection-budget", "60000"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "auto" and len(report["candidates"]) >= 5
    assert next(c for c in report["candidates"] if c["chosen"])["kept_layers"] == report["kept_layers"]
    assert 0 < report["stages"]["importance"]["tokens"] <= 60000
    tiny.load_hf(tmp_path / "run" / "hf")
    with pytest.raises(UsageError, match="--selection-budget 10 is too small"):
        tiny.run_here([*argv, "--save", str(tmp_path / "other"), "--selection-budget", "10"])
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tiny_data / "train.jsonl").read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UsageError, match="--method auto .* needs 5: --train-data has [1-4]; give more data"):
        words = ["--train-data", str(few), "--calibration-samples", "1", "--train-iters", "0"]
        tiny.run_here([*argv, "--save", str(tmp_path / "other"), *words])
    assert not (tmp_path / "other").exists()


def test_endpoints_alone_are_trained(tiny_model, tiny_data, tmp_path):
    model = tiny_model("qwen3_tied")
    tiny.run_here(tiny.endpoint_argv(model, tiny_data, tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    kept, pruned = report["kept_layers"], report["pruned_layers"]
    assert pruned == list(range(pruned[0], pruned[0] + 2)) and report["stages"]["importance"]["tokens"] > 0
    found, source = tiny.read_tensors(tmp_path / "run" / "hf"), tiny.read_tensors(model)
    moved = set()
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        original = name if layer is None else name.replace(f".{layer}.", f".{kept[layer]}.", 1)
        if not torch.equal(tensor, source[original]):
            moved.add(None if layer is None else kept[layer])
    assert moved == {pruned[0] - 1, pruned[-1] + 1}


@pytest.mark.parametrize("method", ["clp", "e3"])
def test_what_trains_behind_frozen_layers_trains_under_recomputation_too(tiny_model, tiny_data, tmp_path, method):
    def argv(name, *flags):
        if method == "clp":
            return tiny.endpoint_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, *flags)
        flags = (*flags, "--train-iters", "4", "--search-iters", "4", "--search-weights", "frozen")
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, *flags)

    tiny.run_here(argv("plain"))
    tiny.run_here(argv("recomputed", "--recompute-granularity", "full"))
    plain, recomputed = (read_metrics(tmp_path / name) for name in ("plain", "recomputed"))
    for record, expected in zip(recomputed, plain, strict=True):
        if method == "clp":
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4) and record["grad_norm"] > 1e-4
        else:
            assert record["scores"] == pytest.approx(expected["scores"], rel=1e-4)
    if method == "e3":
        assert plain[0]["scores"] != plain[3]["scores"]


def test_a_search_with_frozen_weights_recovers_from_the_source_and_resumes(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    model = tiny_model("qwen3_tied")

    def argv(name):
        flags = ("--train-iters", "6", "--search-iters", "4", "--lr-warmup-iters", "0", "--search-weights", "frozen")
        return tiny.prune_argv(model, tiny_data, tmp_path / name, *flags)

    tiny.run_here(argv("whole"))
    for stop in (2, 3):  # in the search, and in recovery
        with pytest.raises(RunStopped):
            tiny.run_here(argv("stopped"), tiny.stop_after(stop))
    tiny.run_here(argv("stopped"))
    whole, stopped = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "stopped"))
    for key in ("kept_layers", "scores", "valid"):
        assert whole[key] == stopped[key]
    # what is pruned is the source: as if these layers had been named
    flags = ("--method", "manual", "--prune-layers", ",".join(map(str, whole["pruned_layers"])), "--train-iters", "0")
    common = ("--hf-model", str(model), "--valid-data", str(tiny_data / "valid.jsonl"))
    tiny.run_here([*common, "--save", str(tmp_path / "named"), "--seq-length", str(tiny.SEQ_LENGTH), *flags])
    named = json.loads((tmp_path / "named" / "report.json").read_text())
    assert named["valid"]["pruned"]["loss"] == pytest.approx(whole["valid"]["pruned"]["loss"], rel=1e-6)


def test_a_resumed_run_keeps_its_batch(tiny_model, tiny_data, tmp_path, monkeypatch):
    argv = tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "--train-iters", "4")
    argv = [*argv, "--search-iters", "2", "--lr-warmup-iters", "0"]
    with pytest.raises(RunStopped):
        tiny.run_here(argv, tiny.stop_after(1))
    with monkeypatch.context() as elsewhere:  # as on other processes, where the flag is left out
        elsewhere.setattr(resolve, "global_batch_size", lambda *args: 2)
        with pytest.raises(UsageError, match="began with 4.*--global-batch-size 4"):
            tiny.run_here(argv)
    tiny.run_here(argv)


def test_sheared_searches_and_resumes(tiny_model, tiny_data, tmp_path, monkeypatch):
    def argv(name):
        flags = ("--method", "sheared", "--train-iters", "6", "--search-iters", "4", "--lr-warmup-iters", "0")
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, *flags)

    tiny.run_here(argv("whole"))
    with pytest.raises(RunStopped):
        tiny.run_here(argv("stopped"), tiny.stop_after(2))
    tiny.run_here(argv("stopped"))
    whole, stopped = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "stopped"))
    assert whole["num_layers"] == 5 and len(whole["scores"]) == 7
    for key in ("kept_layers", "scores", "valid"):
        assert whole[key] == stopped[key]
    assert all(0 <= gate <= 1 for gate in read_metrics(tmp_path / "whole")[3]["mask"])
    tiny.load_hf(tmp_path / "whole" / "hf")
