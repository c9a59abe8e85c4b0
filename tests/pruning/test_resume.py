"""A run that was stopped, by any means, ends with the same bits as an uninterrupted run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaprune.mcore import checkpoint
from megaprune.report.metrics import MetricsLogger, read_metrics
from megaprune.utils.errors import MegapruneError, RunStopped
from tests.helpers import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def argv(tiny_model, tiny_data, tmp_path):
    return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run")


def finished_argv(whole_run, tiny_model, tiny_data, *extra):
    return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, whole_run, *extra)


def assert_same_run(run, whole):
    tensors, expected = tiny.read_tensors(run / "hf"), tiny.read_tensors(whole / "hf")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, whole)]
    for report in reports:
        del report["stages"]  # seconds
    assert reports[0] == reports[1]
    records, expected_records = read_metrics(run), read_metrics(whole)
    assert [record["iteration"] for record in records] == list(range(1, 21))
    for record, wanted in zip(records, expected_records, strict=True):
        assert tiny.steady(record) == tiny.steady(wanted)


def prune(script, *argv):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *argv],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_run_goes_on(argv, whole_run, tmp_path):
    run, argv = tmp_path / "run", [*argv, "--save-interval", "3"]
    checkpoints = run / "checkpoints"

    killed = prune("tests/pruning/killed_prune.py", "training", "5", *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["stage"] for record in read_metrics(run)] == ["search"] * 5
    assert checkpoint.latest(checkpoints).name == "iter_0000003"

    killed = prune("tests/pruning/killed_prune.py", "saving", "15", *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"continuing from {checkpoints / 'iter_0000003'}, iteration 3" in killed.stdout
    assert read_metrics(run)[-1]["stage"] == "recovery"
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000012", "iter_0000015.tmp"}
    assert not (run / "hf").exists()

    finished = prune("tools/prune.py", *argv)
    assert finished.returncode == 0, finished.stderr
    assert "iteration 12" in finished.stdout
    assert_same_run(run, whole_run)


def test_run_that_is_killed_while_it_saves_in_the_background_goes_on(argv, whole_run, tmp_path):
    run, argv = tmp_path / "run", [*argv, "--save-interval", "3", "--async-save"]
    killed = prune("tests/pruning/killed_prune.py", "writing", "9", *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(run / "checkpoints").name == "iter_0000006"

    finished = prune("tools/prune.py", *argv)
    assert finished.returncode == 0, finished.stderr
    assert "iter_0000006, iteration 6" in finished.stdout
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"iter_0000020"}
    assert_same_run(run, whole_run)


def sent_at(iteration):
    """Send SIGTERM to this process when an iteration is logged, in the middle of its step."""
    log = MetricsLogger.log

    def logged(self, record):
        log(self, record)
        if record["iteration"] == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    return logged


@pytest.mark.parametrize("iteration", [4, 13])
def test_sigterm_saves_and_exits(argv, whole_run, tmp_path, monkeypatch, capsys, iteration):
    argv = [*argv, "--async-save", "--save-interval", "4"]
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(MetricsLogger, "log", sent_at(iteration))
        tiny.run_here(argv)
    assert f"stopped by SIGTERM at iteration {iteration}" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"iter_{iteration:07d}"
    tiny.run_here(argv)
    assert f"iteration {iteration}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole_run)


def fingerprint(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_finished_run_is_left_alone(whole_run, tiny_model, tiny_data, capsys):
    before = fingerprint(whole_run)
    tiny.run_here(finished_argv(whole_run, tiny_model, tiny_data, "--log-interval", "5"))
    assert f"holds the finished run already: {whole_run / 'hf'}" in capsys.readouterr().out
    assert fingerprint(whole_run) == before


@pytest.mark.parametrize("setting", [("--lr", "0.001"), ("--gumbel-temperature", "2.0"), ("--train-iters", "21")])
def test_another_setting_is_refused(whole_run, tiny_model, tiny_data, setting):
    before = fingerprint(whole_run)
    with pytest.raises(MegapruneError, match=f"another {setting[0]} "):
        tiny.run_here(finished_argv(whole_run, tiny_model, tiny_data, *setting))
    assert fingerprint(whole_run) == before
