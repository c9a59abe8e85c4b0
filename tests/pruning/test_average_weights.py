"""Runs that export the average of their last weights."""

import json

import pytest
import torch

from megaprune.config.schema import Config
from megaprune.mcore.averaging import WeightAverage
from megaprune.pruning.resolve_training import averaged_from
from megaprune.utils.errors import RunStopped
from tests.helpers import tiny


@pytest.mark.slow
def test_a_stopped_run_exports_the_same_average(tiny_model, tiny_data, whole_run, tmp_path, monkeypatch):
    counted = []

    def counting(self, iteration, add=WeightAverage.add):
        counted.append((iteration, iteration >= self._first))
        add(self, iteration)

    monkeypatch.setattr(WeightAverage, "add", counting)
    runs = [tmp_path / name for name in ("whole", "stopped")]
    argvs = [
        tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, run, "--average-weights", "0.5", "--save-interval", "30")
        for run in runs
    ]
    tiny.run_here(argvs[0])
    assert [iteration for iteration, counts in counted if counts] == [15, 16, 17, 18, 19]
    with pytest.raises(RunStopped):
        tiny.run_here(argvs[1], tiny.stop_after(17))
    tiny.run_here(argvs[1])
    tensors, expected, last = (tiny.read_tensors(run / "hf") for run in (runs[1], runs[0], whole_run))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not all(torch.equal(expected[name], last[name]) for name in expected)
    losses = [json.loads((run / "report.json").read_text())["valid"]["recovered"]["loss"] for run in (*runs, whole_run)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("share", "train_iters", "search_iters", "first"),
    [(0.0, 20, 10, None), (0.5, 20, 10, 15), (1.0, 20, 10, 10), (0.01, 20, 10, 19), (0.5, 0, None, None)],
)
def test_share_is_one_of_recovery(share, train_iters, search_iters, first):
    given = {"average_weights": share, "train_iters": train_iters, "search_iters": search_iters}
    config = Config.from_mapping(
        {"hf_model": "m", "train_data": ["d"], "save": "s", "num_layers_to_prune": 1}
        | ({"method": "manual", "num_layers_to_prune": None, "prune_layers": "1"} if search_iters is None else {})
        | given
    )
    assert averaged_from(config) == first
