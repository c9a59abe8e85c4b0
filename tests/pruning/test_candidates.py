"""Candidates that are trained for a few iterations before one of them is chosen."""

import json
from types import SimpleNamespace

import pytest
import torch

from megaprune.importance import measures
from megaprune.pruning import candidates
from megaprune.pruning.candidates import contenders
from megaprune.report.metrics import read_metrics
from megaprune.selection.budget import Budget
from megaprune.utils.errors import RunStopped, UsageError
from tests.helpers import tiny

ITERS, HEAL, TOKENS = 10, 2, 4 * tiny.SEQ_LENGTH


def argv_of(tiny_model, tiny_data, save, *extra):
    return tiny.healed_argv(tiny_model("qwen3_tied"), tiny_data, save, *extra)


@pytest.fixture(autouse=True)
def any_candidate_is_close(monkeypatch):
    """The layers of a random model hardly matter, and differences of their KL are noise."""
    monkeypatch.setattr(candidates, "CLOSE", 1e9)


def report_of(save):
    return json.loads((save / "report.json").read_text())


def assert_same(save, other):
    tensors, expected = tiny.read_tensors(save / "hf"), tiny.read_tensors(other / "hf")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def selection(**changed):
    return SimpleNamespace(budget=Budget.of_layers(12, 6), heal_candidates=3, heal_iters=5, **changed)


def candidate(kl, *kept, chosen=False):
    return {"kl": kl, "kept_layers": list(kept), "chosen": chosen}


def test_contenders_are_close_and_differ(monkeypatch):
    monkeypatch.setattr(candidates, "CLOSE", 1.5)
    best, same = candidate(1.0, 0, 1, 2, 3, 4, 5, chosen=True), candidate(1.0, 0, 1, 2, 3, 4, 5)
    other, third = candidate(1.2, 0, 1, 2, 3, 4, 6), candidate(1.4, 0, 1, 2, 3, 7, 6)
    far = candidate(1.6, 0, 1, 2, 8, 7, 6)
    assert contenders([far, other, same, best], selection()) == [best["kept_layers"], other["kept_layers"]]
    assert len(contenders([far, third, other, best], selection())) == 3
    two = selection()
    two.heal_candidates = 2
    assert len(contenders([far, third, other, best], two)) == 2
    assert contenders([far, same, best], selection()) == []  # nothing to compare
    none = selection()
    none.heal_iters = 0
    assert contenders([other, best], none) == []
    # of many removed layers, more than one must differ
    many = SimpleNamespace(budget=Budget.of_layers(30, 10), heal_candidates=3, heal_iters=5)
    kept = [*range(10)]
    near, apart = [*range(9), 12], [*range(7), 12, 13, 14]
    found = contenders([candidate(1.0, *kept), candidate(1.1, *near), candidate(1.2, *apart)], many)
    assert found == [kept, apart]


@pytest.mark.slow
def test_the_best_candidate_goes_on(tiny_model, tiny_data, tmp_path):
    """The run ends as one that was given the chosen layers and what the others left of the iterations."""
    save = tmp_path / "run"
    tiny.run_here(argv_of(tiny_model, tiny_data, save))
    report, records = report_of(save), read_metrics(save)
    healed = [each for each in report["candidates"] if "healed_loss" in each]
    assert len(healed) == 2
    best = min(healed, key=lambda each: each["healed_loss"])
    assert [each for each in report["candidates"] if each["chosen"]] == [best]
    assert report["kept_layers"] == best["kept_layers"] and report["tokens_seen"] == ITERS * TOKENS
    stages = report["stages"]
    assert stages["recovery"]["tokens"] == (ITERS - HEAL) * TOKENS
    assert stages["comparison"]["tokens"] == (HEAL + 2 * HEAL) * TOKENS  # training of the other one, and both losses
    assert [record["iteration"] for record in records] == list(range(1, ITERS - HEAL + 1))
    assert records[-1]["tokens"] == report["tokens_seen"] and records[-1]["lr"] < records[2]["lr"]
    assert {"teacher", "pruned", "recovered"} == report["valid"].keys()
    assert not (save / "candidates").exists()

    alone = tmp_path / "alone"
    argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, alone, "manual", "--stitch", "none")
    at = argv.index("--num-layers-to-prune")
    argv[at : at + 2] = ["--prune-layers", ",".join(map(str, report["pruned_layers"]))]
    tiny.run_here([*argv, "--train-iters", str(ITERS - HEAL), "--lr", "3e-3"])
    assert_same(save, alone)
    assert [record["loss"] for record in read_metrics(alone)] == [record["loss"] for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tiny_data, tmp_path_factory):
    """Return a function that makes the run with some flags, once."""
    made = {}

    def get(*extra):
        if extra not in made:
            made[extra] = tmp_path_factory.mktemp("whole") / "run"
            tiny.run_here(argv_of(tiny_model, tiny_data, made[extra], *extra))
        return made[extra]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--lora-rank", "4", "--teacher", "self"), ("--stitch", "fold")])
def test_an_interrupted_comparison_goes_on(tiny_model, tiny_data, tmp_path, monkeypatch, uninterrupted, extra):
    monkeypatch.setattr(candidates, "CLOSE", 1e9)
    whole, save = uninterrupted(*extra), tmp_path / "run"
    argv, measured = argv_of(tiny_model, tiny_data, save, *extra), 0

    def stopping(*args):
        nonlocal measured
        measured += 1
        raise KeyboardInterrupt  # as sudden as a kill: nothing is saved here

    with pytest.raises(RunStopped):
        tiny.run_here(argv, tiny.stop_after(1))
    monkeypatch.setattr(candidates, "mean_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_here(argv)
    assert measured == 1 and (save / "candidates" / "0").exists()
    monkeypatch.setattr(candidates, "mean_loss", measures.mean_loss)
    monkeypatch.setattr(candidates, "take_files", stopping)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_here(argv)
    monkeypatch.undo()
    monkeypatch.setattr(candidates, "CLOSE", 1e9)
    tiny.run_here(argv)
    assert_same(save, whole)
    reports = [report_of(folder) for folder in (save, whole)]
    for report in reports:
        del report["stages"]
    assert reports[0] == reports[1]
    assert [r["loss"] for r in read_metrics(save)] == [r["loss"] for r in read_metrics(whole)]


@pytest.mark.slow
def test_wrong_flags_are_refused(tiny_model, tiny_data, tmp_path):
    argv = argv_of(tiny_model, tiny_data, tmp_path / "run")
    with pytest.raises(UsageError, match="--heal-iters 6 of --heal-candidates 2 are more than --train-iters 10"):
        tiny.run_here([*argv, "--heal-iters", "6"])
    for flag in ("--heal-candidates", "--heal-iters"):
        other = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "kl-init", flag, "3")
        with pytest.raises(UsageError, match=f"{flag} is for --method auto, not kl-init"):
            tiny.run_here(other)
    assert not (tmp_path / "run").exists()
