"""Two runs with the same output: the second is refused with one line while the first runs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megaprune.cli import main as cli
from megaprune.mcore import parallel
from megaprune.utils import locks
from megaprune.utils.errors import MegapruneError
from megaprune.utils.locks import lock_beside, locked
from tests.helpers import tiny
from tests.helpers.launch import torchrun

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from megaprune.utils.locks import locked
with locked(Path(sys.argv[1]), "--save it"):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("holding", flush=True)
    time.sleep(60)
"""


def started(*argv):
    """Start a process that prints a line when it holds the lock."""
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE,
        env=tiny.environment(),
        cwd=ROOT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line == "holding\n":
            return process
    raise AssertionError("the process ended without the lock")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "one" / ".lock"


def refusal(path):
    with pytest.raises(MegapruneError) as caught, locked(path, "--save it"):
        pass
    return str(caught.value)


def takes(path):
    with locked(path, "--save it"):
        return json.loads(path.read_text())["pid"] == os.getpid()


def leave_record(path, **edits):
    """Write a lock file that no process locks, as a killed process leaves it."""
    path.parent.mkdir(parents=True)
    with locked(path, "--save it"):
        record = json.loads(path.read_text())
    path.write_text(json.dumps(record | edits))


def test_leaves_nothing_behind(path, tmp_path):
    with locked(path, "--save it"):
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir(parents=True)
    (path.parent / "hf").mkdir()
    with locked(path, "--save it"):
        pass
    assert [entry.name for entry in path.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("extra", [(), ("fork",)])
def test_killed_holder(path, extra):
    """A child process that outlives the killed holder does not hold the lock."""
    holder = started("-c", HOLDER, path, *extra)
    try:
        said = refusal(path)
        assert re.search(rf"--save it is in use by process {holder.pid} on {socket.gethostname()} since \d{{4}}-", said)
        assert "wait for it to end, end it, or choose another" in said
        assert path.is_file()
        holder.kill()
        holder.wait()
        if extra:
            time.sleep(0.5)  # for the child to come so far
        assert path.is_file() and takes(path)
    finally:
        with suppress(ProcessLookupError):  # its group is gone unless it forked
            os.killpg(holder.pid, signal.SIGKILL)


def test_holder_in_this_process(path):
    with locked(path, "--save it"):
        assert f"process {os.getpid()} " in refusal(path)
        assert path.is_file()
    assert takes(path)


def test_job_is_named(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with locked(path, "--save it"):
        assert "(SLURM job 4711)" in refusal(path)


def test_holder_on_another_host(path, monkeypatch):
    """The flock of another host is invisible here; its holder runs if it touches the file."""
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)
    leave_record(path, boot="another", host="node7", pid=12)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    assert "in use by process 12 on node7 since" in refusal(path)
    stop.set()
    beating.join()
    assert takes(path)


def test_flock_of_a_host_that_crashed(path, monkeypatch):
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 60)
    holder = started("-c", HOLDER, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        assert takes(path)
    finally:
        holder.kill()
        holder.wait()


def test_holder_touches_the_file(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with locked(path, "--save it"):
        before = path.stat().st_mtime_ns
        time.sleep(0.4)
        assert path.stat().st_mtime_ns > before


def test_file_system_without_locks(path, monkeypatch):
    monkeypatch.setattr(locks, "try_flock", lambda file: None)
    with locked(path, "--save it"):
        assert f"process {os.getpid()} " in refusal(path)
    leave_record(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))  # another process of this id
    assert takes(path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(locks.identity() | {"pid": int(gone.stdout)}))
    assert takes(path)


def test_damaged_record(path):
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert takes(path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert (
        refusal(tmp_path / "file" / "run" / ".lock") == "--save it can't be written (Not a directory): choose another"
    )


# The tools


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3_tied")


def attempt(verb, *argv):
    try:
        return cli.attempt(verb, [str(word) for word in argv])
    finally:
        parallel.finish()


@pytest.mark.parallel
def test_second_prune_while_the_first_runs(model, tiny_data, tmp_path):
    run = tmp_path / "run"
    argv = tiny.prune_argv(model, tiny_data, run, "--train-iters", "4", "--search-iters", "2", "--save-interval", "1")
    argv += ["--lr-warmup-iters", "1"]
    holder = started("tests/pruning/killed_prune.py", "holding", "3", *argv)
    try:
        before = files(run)
        status, line = attempt("prune", *argv)
        assert status == 1
        assert line.startswith(f"prune: error: --save {run} is in use by process {holder.pid} on ")
        assert files(run).keys() == before.keys()
        # The second of two processes hears of it too.
        both = subprocess.run(
            [*torchrun(2), "tools/prune.py", *argv], env=tiny.environment(), cwd=ROOT, capture_output=True, text=True
        )
        assert both.returncode == 1
        assert both.stderr.count("is in use by process") == 1, both.stderr
        assert files(run).keys() == before.keys()
    finally:
        holder.kill()
        holder.wait()
    assert attempt("prune", *argv) == (0, None)
    assert (run / "hf" / "config.json").is_file() and not (run / ".lock").exists()


def test_siblings(model, tiny_data, tmp_path):
    out, data = tmp_path / "out", tiny_data / "train.jsonl"
    checkpoint, recipe = tmp_path / "checkpoint", tmp_path / "compare.yaml"
    assert attempt("convert", "import", "--hf-model", model, "--megatron-path", checkpoint)[0] == 0
    run = {"hf_model": str(model), "train_data": [str(data)], "train_iters": 1, "seq_length": 32}
    asked = {"run": run, "methods": ["random"], "seeds": [1], "num_layers_to_prune": [2]}
    recipe.write_text(json.dumps(asked))
    cases = {
        "--output": ("cache-teacher", "--hf-model", model, "--train-data", data, "--seq-length", 32, "--output", out),
        "--megatron-path": ("convert", "import", "--hf-model", model, "--megatron-path", out),
        "--hf-path": ("convert", "export", "--megatron-path", checkpoint, "--hf-path", out),
        "--output-prefix": ("preprocess-data", "--input", data, "--tokenizer", model, "--output-prefix", out),
        "--save": ("compare", "--config", recipe, "--save", out),
    }
    before = files(tmp_path).keys()
    for flag, argv in cases.items():
        path = out / ".lock" if flag == "--save" else lock_beside(out)
        with locked(path, "held"):
            status, line = attempt(*argv)
        assert (status, f"{flag} {out} is in use by process {os.getpid()} on " in line) == (1, True), line
        assert files(tmp_path).keys() == before
