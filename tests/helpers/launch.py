"""One start of torchrun for many cases, because importing what a process needs takes longer than most cases.

A case that fails does not affect other cases. If every process returns from it, the same processes continue with the
next case. If one process fails while others wait for it, or one dies, torchrun is started again for the remaining
cases.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny

WORKER = Path(__file__).with_name("worker.py")
_LOG_SHOWN = 6000  # characters
_GRACE_SECONDS = 45  # torchrun itself kills its processes 30 s after it was asked to end them


@dataclass
class Launched:
    """Results of a launch: the folder, the names of the cases, and the tracebacks of failed cases."""

    folder: Path
    names: frozenset[str]
    failures: dict[str, str]

    def path(self, name: str) -> Path:
        """Return the path of a case's results, or fail the test with the case's own traceback."""
        self.check(name)
        return self.folder / name

    def check(self, *names: str) -> None:
        """Fail the test if one of these cases failed."""
        assert self.names.issuperset(names), f"no case has one of these names: {names}"
        failed = [self.failures[name] for name in names if name in self.failures]
        if failed:
            pytest.fail("\n\n".join(failed), pytrace=False)


def torchrun(num_processes: int, *flags: str) -> list[str]:
    """Return the words that start a script on several processes of this machine. Tests that use them are `parallel`."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, *words, *flags]


def launch(num_processes: int, cases: Sequence[dict[str, Any]], folder: Path, timeout_seconds: int = 900) -> None:
    """Run functions on new processes. Each case's ``kind`` names a function; the other entries are its arguments.

    The test fails with the tracebacks of all failed cases.
    """
    names = [f"{case['kind']} (case {number})" for number, case in enumerate(cases)]
    launched = launch_cases(num_processes, dict(zip(names, cases, strict=True)), folder, timeout_seconds)
    launched.check(*names)


def launch_cases(
    num_processes: int, cases: Mapping[str, dict[str, Any]], folder: Path, timeout_seconds: int = 900
) -> Launched:
    """Run named cases as `launch` does, and store failures separately.

    Args:
        timeout_seconds: limit for each start of torchrun; a case that it interrupts counts as failed.
    """
    launched, left, attempt = Launched(folder, frozenset(cases), {}), dict(cases), 0
    while left:
        notes = folder / f"attempt{attempt}"
        notes.mkdir()
        log = _run(num_processes, list(left.items()), notes, timeout_seconds)
        if not (notes / "0.begun").exists():  # the processes cannot start at all, so another attempt is useless
            launched.failures |= dict.fromkeys(left, f"{num_processes} processes did not start:\n{log[-_LOG_SHOWN:]}")
            break
        for number, name in enumerate(list(left)):
            if not (notes / f"{number}.begun").exists():
                break
            ended = (notes / f"{number}.ended").exists()
            found = _tracebacks(notes, number) + ("" if ended else f"processes were lost:\n{log[-_LOG_SHOWN:]}")
            if found:
                launched.failures[name] = f"{name} failed on {num_processes} processes:\n{found}"
            del left[name]
        attempt += 1
    return launched


def _run(num_processes: int, cases: list[tuple[str, dict]], notes: Path, timeout_seconds: int) -> str:
    """Run the worker and wait for it. Return its output."""
    (notes / "cases.json").write_text(json.dumps([case for _, case in cases], default=str))
    log = notes / "log.txt"
    # To a file: a process that a failed rank leaves behind would keep a pipe open and block the test.
    with log.open("w") as output:
        process = subprocess.Popen(
            [*torchrun(num_processes), str(WORKER), str(notes)],
            env=tiny.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {timeout_seconds} s\n")
        finally:
            _end(process)
    return log.read_text()


def _end(process: subprocess.Popen) -> None:
    process.terminate()  # torchrun passes it on to its processes; killed at once, it would leave them behind
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tracebacks(notes: Path, number: int) -> str:
    """Return the tracebacks of one case without duplicates, in the order of failure."""
    ranks: dict[str, list[str]] = {}
    for path in sorted(notes.glob(f"{number}.rank*"), key=lambda path: path.stat().st_mtime_ns):
        ranks.setdefault(path.read_text(), []).append(path.suffix.removeprefix(".rank"))
    return "\n".join(f"rank {', '.join(which)}: {text}" for text, which in ranks.items())
