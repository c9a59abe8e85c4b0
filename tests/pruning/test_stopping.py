"""A run that is stopped within any stage goes on from there: it ends as an uninterrupted one and measures nothing
twice.
"""

import json
import os
import shutil
import signal

import pytest
import torch

from megaprune.cli import cache_teacher as caching_cli
from megaprune.cli.main import attempt
from megaprune.distillation.cache_writer import ShardFile
from megaprune.importance import evaluator
from megaprune.importance.records import Records
from megaprune.mcore import parallel
from megaprune.pruning import context
from megaprune.pruning import stitch as run_stitch
from megaprune.utils import stopping
from megaprune.utils.errors import RunStopped
from megaprune.utils.stopping import StopRequest
from tests.helpers import tiny


class StopAt(StopRequest):
    """Request that is made at a numbered point of a stage, from 1."""

    def __init__(self, stage, number):
        super().__init__(signals=False)
        self.stage, self.left = stage, number

    def is_due(self, stage):
        self.left -= stage == self.stage
        return self.left <= 0


@pytest.fixture
def measured(monkeypatch):
    """The measured micro-batches, each with what was measured on it."""
    seen = []

    def spied(name, module):
        original = getattr(module, name)

        def call(model, *args):
            batches = next(each for each in args if isinstance(each, (list, tuple)))
            masks = [each for each in args if isinstance(each, torch.Tensor)]
            what = [str(mask.tolist()) for mask in masks[0]] if name == "mask_sums" else [str(masks)]
            seen.extend((name, tuple(batch.sample_ids), of) for batch in batches for of in what)
            return original(model, *args)

        monkeypatch.setattr(module, name, call)

    for name in ("mask_sums", "influence_sums", "mask_gradient"):
        spied(name, evaluator)
    spied("loss_sums", context)
    moments = run_stitch.stitch.moments

    def counted(model, batches, before, last, size, unfinished):
        class Counting:
            def load(self):
                self.done, sums = unfinished.load() or (0, None)
                return (self.done, sums) if sums else None

            def save_if_asked(self, steps, sums):
                seen.append(("moments", tuple(batches[steps - 1].sample_ids), f"{before} {last}"))
                unfinished.save_if_asked(steps, sums)

        return moments(model, batches, before, last, size, Counting())

    monkeypatch.setattr(run_stitch.stitch, "moments", counted)
    return seen


def report_of(run):
    report = json.loads((run / "report.json").read_text())
    tokens = {name: spent["tokens"] for name, spent in report.pop("stages").items() if name != "stitch"}
    return report, tokens


def assert_same(run, whole):
    tensors, expected = tiny.read_tensors(run / "hf"), tiny.read_tensors(whole / "hf")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    assert report_of(run) == report_of(whole)


def stopped_in_turn(argv, stops):
    """Stop a run at one point after the other, and then let it end."""
    for stage, number in stops:
        with pytest.raises(RunStopped) as stopped:
            tiny.run_here(argv, StopAt(stage, number))
        assert stage in ("import", "export") or stopped.value.progressed, stage
    tiny.run_here(argv)


@pytest.mark.slow
def test_a_run_stopped_in_every_stage(tiny_model, tiny_data, tmp_path, measured):
    def argv(name):
        flags = ("--stitch", "fold", "--train-iters", "3", "--selection-budget", "9000", "--lr", "1e-4")
        return [*tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, "auto"), *flags]

    tiny.run_here(argv("whole"))
    whole = sorted(measured)
    assert len({name for name, *_ in whole}) >= 4
    measured.clear()
    stops = [("tokenizing", 1), ("import", 9), ("validation", 1), ("kl", 1), ("influence", 1), ("kl", 2), ("kl", 1)]
    stops += [("stitch", 1), ("stitch", 1), ("validation", 1), ("iteration", 1), ("export", 2)]
    stopped_in_turn(argv("run"), stops)
    assert sorted(measured) == whole, "something was measured twice"
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_search_is_stopped_before_its_layers_are_stitched(tiny_model, tiny_data, tmp_path, measured):
    def argv(name):
        flags = ("--train-iters", "4", "--search-iters", "2", "--lr-warmup-iters", "0", "--lr", "1e-4")
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, *flags, "--stitch", "fold")

    tiny.run_here(argv("whole"))
    whole = sorted(measured)
    measured.clear()
    stopped_in_turn(argv("run"), [("kl", 1), ("stitch", 1), ("stitch", 1)])
    assert sorted(measured) == whole
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_gradients_are_not_measured_twice_and_signals_stop(
    tiny_model, tiny_data, tmp_path, measured, monkeypatch, capsys
):
    def argv(name):
        return tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, "clp", "--search-iters", "6")

    tiny.run_here(argv("whole"))
    whole, add, number = sorted(measured), Records.add, signal.SIGUSR1
    measured.clear()

    def signaled(self, found):
        add(self, found)
        if any(key.startswith("gradient") for key in found):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(Records, "add", signaled)
        tiny.run_here(argv("run"))
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert "stopped by SIGUSR1 while it measures layers: the same command" in capsys.readouterr().out
    # the last line was cut by the end of the machine: that measurement is made again
    journal = tmp_path / "run" / "measurements.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    tiny.run_here(argv("run"))
    assert len(measured) == len(whole) + 4 // 2 and sorted(set(measured)) == sorted(set(whole))
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_job_that_makes_no_progress_fails(tiny_model, tiny_data, tmp_path):
    argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "kl-init")
    argv = [*argv, "--no-exit-on-signal", "--exit-duration-in-mins", "0.0001"]
    for _ in range(2):  # the tokens of both data sets are saved
        assert attempt("prune", argv) == (0, None)
    status, line = attempt("prune", argv)
    assert status == 1 and "stopped by --exit-duration-in-mins 0.0001 at the start of its first stage" in line
    assert "before anything new was saved" in line
    assert not (tmp_path / "run" / "hf").exists()


def test_the_clock_stops_early_enough_to_save(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    request = StopRequest(signals=False, minutes=10)

    def at(seconds, stage):
        now[0] = seconds
        return request.is_due(stage)

    assert not at(100, "import") and not at(300, "importance")  # a new stage says nothing about its steps
    assert not at(360, "importance")
    with request.saving():
        now[0] = 420
    assert not at(421, "iteration") and not at(441, "iteration")  # 20 s a step, and 60 s to save
    assert not any(at(seconds, "iteration") for seconds in (461, 481, 501))
    assert at(521, "iteration") and request.reason == "--exit-duration-in-mins 10"
    assert not StopRequest(signals=False).is_due("iteration")


@pytest.mark.slow
def test_a_teacher_is_cached_window_by_window(tiny_model, tiny_data, tmp_path, monkeypatch):
    add, added = ShardFile.add, []

    def counted(self, windows, targets):
        added.extend(windows)
        add(self, windows, targets)

    monkeypatch.setattr(ShardFile, "add", counted)
    data, model = tiny.make_data(tmp_path / "few.jsonl", rows=30, seed=3), tiny_model("qwen3_tied")

    def cache(name, stops=None):
        flags = ["--hf-model", model, "--train-data", data, "--seq-length", tiny.SEQ_LENGTH, "--distill-top-k", 4]
        monkeypatch.setattr(caching_cli, "stop_request", lambda run: stops)
        try:
            return attempt("cache-teacher", [str(word) for word in (*flags, "--output", tmp_path / name)])
        finally:
            parallel.finish()

    assert cache("whole") == (0, None)
    windows = sorted(added)
    added.clear()
    # in the middle of the first shards, in turn
    for number in (1, 2, 2):
        assert cache("run", StopAt("teacher", number)) == (0, None) and not (tmp_path / "run").exists()
    (begun,) = (tmp_path / "run.tmp").glob("*.begun")
    assert cache("run") == (0, None) and sorted(added) == windows

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(tmp_path / "run") == files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "run")
    # windows that were kept and then damaged are computed again
    added.clear()
    assert cache("run", StopAt("teacher", 1)) == (0, None)
    (begun,) = (tmp_path / "run.tmp").glob("*.begun")
    begun.write_bytes(bytes([begun.read_bytes()[0] ^ 1]) + begun.read_bytes()[1:])
    assert cache("run") == (0, None) and len(added) > len(windows)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
