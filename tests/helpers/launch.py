"""Starts torchrun once for many cases: importing what a process needs takes longer than the cases."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny

_WORKER = Path(__file__).with_name("worker.py")


def launch(num_processes: int, cases: list[dict[str, Any]], folder: Path, timeout_seconds: int = 900) -> None:
    """Runs worker.py's functions on processes of their own: each case's ``kind`` names one, the rest are its arguments.

    The first case that fails ends them all, and the test, with its traceback.
    """
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    log = folder / "log.txt"
    # To a file: a process that a failed rank leaves behind would keep a pipe open, and the test waiting.
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, *torchrun, str(_WORKER), str(folder / "cases.json")],
            env=tiny.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout_seconds,
        )
    if done.returncode:
        pytest.fail(f"{num_processes} processes failed:\n{log.read_text()[-6000:]}", pytrace=False)
