"""A run on two simulated nodes: a launcher for each, with its own temporary and cache folders, and one run folder.

`make test-two-nodes` starts four processes on each node instead of one.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megaprune.mcore import checkpoint
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.launch import torchrun

pytestmark = pytest.mark.slow

PER_NODE = int(os.environ.get("PROCESSES_PER_NODE", "1"))
LAYOUT = ["--pipeline-model-parallel-size", "2"] + (["--tensor-model-parallel-size", "2"] if PER_NODE == 4 else [])
PATIENCE_SECONDS = 1500


def descendants(pid):
    """Return the processes that a process has started, and those that these have."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Nodes:
    """The launchers of a job."""

    def __init__(self, folder, argv):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"node{node}.log" for node in (0, 1)]
        self.launchers = [
            self._start(folder / f"node{node}", log, endpoint, argv) for node, log in enumerate(self.logs)
        ]

    def _start(self, own, log, endpoint, argv):
        environment = tiny.environment()
        for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME"):
            (own / name).mkdir(parents=True, exist_ok=True)
            environment[name] = str(own / name)
        flags = ["--nnodes", "2", "--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        words = [word for word in torchrun(PER_NODE, *flags) if word != "--standalone"]
        script = str(Path(__file__).with_name("paced_prune.py"))
        with log.open("a") as output:
            return subprocess.Popen(
                [*words, script, *argv],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # as in examples/slurm: the launcher ignores what its workers obey
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            )

    def wait(self):
        """Return the exit statuses."""
        try:
            return [launcher.wait(PATIENCE_SECONDS) for launcher in self.launchers]
        finally:
            self.end()

    def end(self):
        """Kill what is left."""
        for launcher in self.launchers:
            send([*descendants(launcher.pid), launcher.pid] if launcher.poll() is None else [], signal.SIGKILL)

    def interrupt(self, run, iteration, act):
        """Act on the second node after an iteration, and return the exit statuses."""
        launcher, until = self.launchers[1], time.monotonic() + PATIENCE_SECONDS
        try:
            while not (records := read_metrics(run)) or records[-1]["iteration"] < iteration:
                assert time.monotonic() < until and launcher.poll() is None, self.said()
                time.sleep(0.05)
            act(launcher)
            return self.wait()
        finally:
            self.end()

    def said(self):
        return "\n".join(log.read_text()[-3000:] for log in self.logs)


def kill(launcher):
    """Lose the node."""
    send([launcher.pid, *descendants(launcher.pid)], signal.SIGKILL)


def signal_all(launcher):
    """Signal the processes of one node only, as Slurm signals those of a job."""
    send([launcher.pid, *descendants(launcher.pid)], signal.SIGUSR1)


def test_a_lost_node_and_a_signaled_node(tiny_model, tiny_data, tmp_path):
    def job(name):
        save = tmp_path / name / "run"
        (tmp_path / name).mkdir(exist_ok=True)
        flags = ("--train-iters", "9", "--search-iters", "4", "--save-interval", "2", *LAYOUT)
        return Nodes(tmp_path / name, tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, save, *flags)), save

    whole, expected = job("whole")
    assert whole.wait() == [0, 0], whole.said()

    lost, run = job("job")
    statuses = lost.interrupt(run, 3, kill)
    assert statuses[0] != 0 and statuses[1] == -signal.SIGKILL
    assert int(checkpoint.latest(run / "checkpoints").name[-7:]) in (2, 4), lost.said()

    stopped, _ = job("job")
    assert stopped.interrupt(run, 6, signal_all) == [0, 0], stopped.said()
    assert "continuing from" in stopped.said() and "the same command continues from here" in stopped.said()
    assert int(checkpoint.latest(run / "checkpoints").name[-7:]) >= 6 and not (run / "hf").exists()

    requeued, _ = job("job")
    assert requeued.wait() == [0, 0], requeued.said()
    tensors, wanted = tiny.read_tensors(run / "hf"), tiny.read_tensors(expected / "hf")
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []
