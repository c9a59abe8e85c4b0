"""Runs that export the average of their last weights."""

import json

import pytest
import torch

from megaprune.mcore.averaging import WeightAverage, first_averaged
from megaprune.utils.errors import RunStopped
from tests.helpers import tiny


@pytest.fixture
def averaged(monkeypatch):
    """The iterations whose weights count in an average, as they happen."""
    counted = []

    def counting(self, iteration, add=WeightAverage.add):
        before = {name: average.clone() for name, average in self._average.items()}
        add(self, iteration)
        if any(name not in before or not torch.equal(before[name], now) for name, now in self._average.items()):
            counted.append(iteration)

    monkeypatch.setattr(WeightAverage, "add", counting)
    return counted


@pytest.mark.slow
def test_a_stopped_run_exports_the_same_average(tiny_model, tiny_data, whole_run, tmp_path, averaged):
    runs = [tmp_path / name for name in ("whole", "stopped")]
    argvs = [
        tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, run, "--average-weights", "0.5", "--save-interval", "30")
        for run in runs
    ]
    tiny.run_here(argvs[0])
    assert averaged == [15, 16, 17, 18, 19]
    with pytest.raises(RunStopped):
        tiny.run_here(argvs[1], tiny.stop_after(17))
    tiny.run_here(argvs[1])
    tensors, expected, last = (tiny.read_tensors(run / "hf") for run in (runs[1], runs[0], whole_run))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not all(torch.equal(expected[name], last[name]) for name in expected)
    losses = [json.loads((run / "report.json").read_text())["valid"]["recovered"]["loss"] for run in (*runs, whole_run)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_each_round_averages_over_its_own_end(tiny_model, tiny_data, tmp_path, averaged):
    argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "kl-init")
    tiny.run_here([*argv, "--train-iters", "9", "--rounds", "2", "--average-weights", "0.5"])
    assert averaged == [2, 3, 3, 4]  # of rounds of 4 and of 5 iterations


@pytest.mark.parametrize(
    ("share", "train_iters", "search_iters", "first"),
    [(0.0, 20, 10, None), (0.5, 20, 10, 15), (1.0, 20, 10, 10), (0.01, 20, 10, 19), (0.5, 0, 0, None)],
)
def test_share_is_one_of_recovery(share, train_iters, search_iters, first):
    assert first_averaged(share, search_iters, train_iters) == first
