"""The harness itself: where it is missing or too old, and tasks of its own, whose data are on the hub."""

import sys
import types

import pytest

from megaprune.evaluation.task_files import load_tasks
from megaprune.utils.errors import MegapruneError, UsageError


def test_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MegapruneError, match=r"pip install 'megaprune\[eval\]'"):
        load_tasks(["arc_easy"])


def test_package_too_old(monkeypatch):
    old = types.ModuleType("lm_eval.tasks")
    old.TaskManager = type("TaskManager", (), {})
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", old)
    with pytest.raises(MegapruneError, match="needs lm-evaluation-harness 0.4.12 or newer"):
        load_tasks(["arc_easy"])


@pytest.mark.slow
def test_tasks_of_the_harness_own(monkeypatch):
    def fail(**options):
        raise ConnectionError(f"no network for {options['path']}\nand a page more")

    monkeypatch.setattr("datasets.load_dataset", fail)
    reason = r"--tasks arc_easy: it or its data can't be read \(no network for allenai/ai2_arc\); its data come from"
    with pytest.raises(MegapruneError, match=reason):
        load_tasks(["arc_easy"])
    with pytest.raises(UsageError, match="--tasks arc_eazy: lm_eval has no such task; `lm-eval ls tasks`"):
        load_tasks(["arc_eazy"])
