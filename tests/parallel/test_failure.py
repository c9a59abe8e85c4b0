"""A rank that fails ends the run within seconds, with one line that gives the reason."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.launch import torchrun

_SCRIPT = Path(__file__).with_name("failing_prune.py")
LINES = {
    "unforeseen": "prune: error: rank {rank}: KeyError: 'state'",
    "refused": "prune: error: the disk is full",
    "early": "prune: error: the disk is full",
}


@pytest.mark.parametrize(("kind", "rank"), [("unforeseen", 0), ("refused", 1), ("early", 1)])
def test_one_failed_rank_ends_all(tiny_model, tiny_data, tmp_path, kind, rank):
    argv = tiny.select_argv(tiny_model("qwen3"), tiny_data, tmp_path / "run", "random")
    words = [str(_SCRIPT), kind, str(rank), str(tmp_path / "failed"), *argv, "--train-iters", "2"]
    with (tmp_path / "log").open("w") as output:
        done = subprocess.run([*torchrun(2), *words], env=tiny.environment(), stdout=output, stderr=output, timeout=300)
    seconds = time.time() - float((tmp_path / "failed").read_text())
    log = (tmp_path / "log").read_text()
    assert done.returncode == 1
    # torchrun itself waits 30 s for a rank that takes SIGTERM for a request to stop
    assert seconds < 25, log
    assert [line for line in log.splitlines() if line.startswith("prune: error")] == [LINES[kind].format(rank=rank)]
    assert log.count("raise _FAULTS[kind]") == (kind == "unforeseen")
