"""Runs in rounds: what they select, what they train on and against, and what they report."""

import json
from dataclasses import replace

import pytest
import torch

from megaprune.models.sizes import inventory, layer_sizes
from megaprune.report.metrics import read_metrics
from megaprune.selection.budget import Budget
from megaprune.utils.errors import MegapruneError, RunStopped, UsageError
from tests.helpers import tiny

pytestmark = pytest.mark.slow


def argv_of(tiny_model, tiny_data, save, method, *extra):
    return [*tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, save, method), "--rounds", "2", *extra]


def report_of(run):
    return json.loads((run / "report.json").read_text())


def assert_same_tensors(run, other):
    tensors, expected = (tiny.read_tensors(folder / "hf") for folder in (run, other))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_untrained_rounds_are_runs_one_after_the_other(tiny_model, tiny_data, tmp_path):
    rounds = ("--num-layers-to-prune", "3")
    tiny.run_here(argv_of(tiny_model, tiny_data, tmp_path / "rounds", "kl-init", *rounds))
    first, second = tmp_path / "first", tmp_path / "second"
    tiny.run_here(tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, first, "kl-init", "--num-layers-to-prune", "1"))
    tiny.run_here(tiny.select_argv(first / "hf", tiny_data, second, "kl-init", "--num-layers-to-prune", "2"))
    assert_same_tensors(tmp_path / "rounds", second)
    report, one, two = report_of(tmp_path / "rounds"), report_of(first), report_of(second)
    assert report["kept_layers"] == [one["kept_layers"][layer] for layer in two["kept_layers"]]
    assert sorted(report["kept_layers"] + report["pruned_layers"]) == list(range(7))
    assert [part["kept_layers"] for part in report["rounds"]] == [one["kept_layers"], report["kept_layers"]]
    assert report["valid"]["teacher"] == one["valid"]["teacher"] and report["valid"]["pruned"] == two["valid"]["pruned"]
    assert report["params_before"] == one["params_before"] and report["params_after"] == two["params_after"]
    card = (tmp_path / "rounds" / "hf" / "README.md").read_text()
    assert "pruned to 4 of 7 layers" in card
    tiny.load_hf(tmp_path / "rounds" / "hf")
    # a finished run is not repeated, and keeps no intermediate model
    tiny.run_here(argv_of(tiny_model, tiny_data, tmp_path / "rounds", "kl-init", *rounds))
    assert not (tmp_path / "rounds" / "rounds" / "1" / "hf").exists()


def test_every_round_learns_from_the_original_and_goes_on_in_the_data(tiny_model, tiny_data, tmp_path):
    words = ("--train-iters", "5", "--lr", "0", "--weight-decay", "0", "--stitch", "none")
    tiny.run_here(argv_of(tiny_model, tiny_data, tmp_path / "rounds", "shortgpt", *words))
    report = report_of(tmp_path / "rounds")
    records = read_metrics(tmp_path / "rounds")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["round"] for record in records] == [1, 1, 2, 2, 2]
    assert [record["num_kept"] for record in records] == [6, 6, 5, 5, 5]
    assert report["tokens_seen"] == records[-1]["tokens"] == 5 * 4 * tiny.SEQ_LENGTH
    losses = []
    for kept in (part["kept_layers"] for part in report["rounds"]):
        gone = ",".join(str(layer) for layer in range(7) if layer not in kept)
        argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / gone, "manual", *words)
        at = argv.index("--num-layers-to-prune")
        argv[at : at + 2] = ["--prune-layers", gone]
        tiny.run_here([*argv, *words])
        losses.append([record["loss"] for record in read_metrics(tmp_path / gone)])
    expected = losses[0][:2] + losses[1][2:]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["shortgpt", "e3"])
def test_a_run_in_rounds_resumes_within_each_round(tiny_model, tiny_data, tmp_path, method):
    def argv(name):
        words = ("--train-iters", "6", "--lr-warmup-iters", "1", *(("--search-iters", "2") if method == "e3" else ()))
        return argv_of(tiny_model, tiny_data, tmp_path / name, method, *words)

    tiny.run_here(argv("whole"))
    for stop in (2, 4):  # in the first round, and in the second one, after the last iteration of the first
        with pytest.raises(RunStopped):
            tiny.run_here(argv("stopped"), tiny.stop_after(stop))
    assert (tmp_path / "stopped" / "rounds" / "2" / "checkpoints" / "iter_0000002").is_dir()
    with pytest.raises(MegapruneError, match="another --rounds"):
        tiny.run_here([*argv("stopped"), "--rounds", "1"])
    tiny.run_here(argv("stopped"))
    whole, stopped = report_of(tmp_path / "whole"), report_of(tmp_path / "stopped")
    assert {name: whole[name] for name in ("kept_layers", "valid")} == {
        name: stopped[name] for name in ("kept_layers", "valid")
    }
    assert_same_tensors(tmp_path / "stopped", tmp_path / "whole")
    # each round has a warm-up of its own
    rates = [record["lr"] for record in read_metrics(tmp_path / "whole")]
    assert rates[:3] == rates[3:] and rates[0] == rates[1] > rates[2] > 0


def test_parameters_are_removed_in_equal_shares(tiny_model, tiny_data, tmp_path):
    model = tiny_model("deepseek_v3")
    config = json.loads((model / "config.json").read_text())
    sizes, total = layer_sizes(config), inventory(config).size.total
    target = total - 2 * max(size.total for size in sizes)
    argv = [*tiny.select_argv(model, tiny_data, tmp_path / "run", "sleb"), "--rounds", "2", "--protect-layers", "none"]
    at = argv.index("--num-layers-to-prune")
    argv[at : at + 2] = ["--target-params", str(target)]
    tiny.run_here(argv)
    report = report_of(tmp_path / "run")
    assert report["params_after"] <= target
    gone = [5 - len(part["kept_layers"]) for part in report["rounds"]]
    assert 1 <= gone[0] < gone[1] == len(report["pruned_layers"])
    tiny.load_hf(tmp_path / "run" / "hf")
    with pytest.raises(UsageError, match="--rounds 3: not every round can remove a layer; give at most 2"):
        tiny.run_here([*argv, "--save", str(tmp_path / "other"), "--rounds", "3"])
    assert not (tmp_path / "other").exists()


def test_shares_of_a_budget_add_up():
    budget = Budget.of_layers(12, 5)
    assert [budget.limit_of_round(number, 3) for number in (1, 2, 3)] == [10, 8, 5]
    assert replace(budget, limit=11).limit_of_round(1, 1) == 11
    budget.check_rounds(7)
    with pytest.raises(UsageError, match="give at most 7"):
        budget.check_rounds(8)
