"""The call of lm_eval, against a stand-in with its signatures: the package is an optional extra."""

import json
import sys
import types

import pytest
import torch

from megaprune.cli.evaluate import run
from megaprune.evaluation.harness import run_harness
from megaprune.utils.errors import MegapruneError, UsageError

RESULTS = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}


@pytest.fixture
def calls(monkeypatch):
    """Replace lm_eval by a stand-in that has one task; record the arguments of simple_evaluate."""
    calls = []

    class TaskManager:
        all_tasks = ["arc_easy"]

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": RESULTS, "config": {}}

    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = TaskManager
    lm_eval = types.ModuleType("lm_eval")
    lm_eval.tasks, lm_eval.simple_evaluate = tasks, simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


def test_passes_on_what_was_asked(calls):
    results = run_harness(
        "model", ["arc_easy"], micro_batch_size=4, dtype=torch.float32, device=torch.device("cpu"), limit=7
    )
    assert results == RESULTS
    (call,) = calls
    expected = {"model": "hf", "tasks": ["arc_easy"], "batch_size": 4, "device": "cpu", "limit": 7}
    assert {key: call[key] for key in expected} == expected
    assert call["model_args"] == {"pretrained": "model", "dtype": torch.float32, "trust_remote_code": False}


def test_task_that_lm_eval_does_not_know(calls):
    with pytest.raises(UsageError, match="--tasks arc_eazy: lm_eval has no such task"):
        run_harness("model", ["arc_easy", "arc_eazy"])
    assert not calls


def test_task_data_that_cannot_be_fetched(calls, monkeypatch):
    def fail(**options):
        raise ConnectionError("no network\nand a page more")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fail)
    with pytest.raises(MegapruneError, match=r"--tasks arc_easy: a task's data can't be read \(no network\)"):
        run_harness("model", ["arc_easy"])


def test_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MegapruneError, match=r"pip install 'megaprune\[eval\]'"):
        run_harness("model", ["arc_easy"])


def test_tasks_stand_in_the_table_and_the_result(calls, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("megaprune.device.torch_device", lambda: torch.device("cpu"))
    run(["--hf-model", "model", "--tasks", "arc_easy,", "--output", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == {"hf_model": "model", "tasks": RESULTS}
    assert capsys.readouterr().out.startswith("model\n  arc_easy acc,none  0.5000\n\nwritten to ")
