"""Full disks: one line with the path and the needed space, no incomplete files, and the same command continues."""

import errno
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megaprune.cli import main as cli
from megaprune.mcore import parallel
from megaprune.pruning import runner
from megaprune.report.metrics import MetricsLogger
from megaprune.utils import disk
from megaprune.utils.disk import check_room, disk_error, explain, one_line, size_text
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny
from tests.helpers.disks import full_disk
from tests.helpers.launch import torchrun

ROOT = Path(__file__).parents[2]


def attempt(verb, *argv):
    try:
        return cli.attempt(verb, [str(word) for word in argv])
    finally:
        parallel.finish()
        parallel.leave()


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3_tied")


# Errors


class Wrapped(BaseException):
    """Exception in the form in which Megatron-Core's writer wraps the errors of its workers."""

    def __init__(self, error):
        self.failures = {0: (error, "a trace")}


@pytest.mark.parametrize(
    "error, number",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), errno.EDQUOT),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), errno.EACCES),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
        (OSError(errno.EIO, "Input/output error"), errno.EIO),
        (Wrapped(RuntimeError("Worker failure: [Errno 28] No space left on device")), errno.ENOSPC),
        (Wrapped(OSError(errno.EIO, "Input/output error")), errno.EIO),
        (ValueError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "" }'), 28),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), None),
        (ConnectionError(errno.ECONNRESET, "reset"), None),
        (KeyError("a"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_errors_of_disks(error, number):
    found = disk_error(error)
    assert (found.errno if found else None) == number


def test_line(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "room_left", lambda path: 2_500_000)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert explain(full, tmp_path, "begin again", 31 * 10**9) == (
        f"{tmp_path} can't be written (No space left on device, where 2.50 MB are left and 31.00 GB are needed): make "
        "room, and begin again"
    )
    readonly = OSError(errno.EROFS, "Read-only file system", "/x/y")
    assert explain(readonly, tmp_path) == (
        "/x/y can't be written (Read-only file system): fix this, and run the same command again"
    )
    with pytest.raises(MegapruneError, match="needs 2.60 MB, and .* has 2.50 MB left: make room, or choose another"):
        check_room(tmp_path / "not" / "there", 2_600_000)
    check_room(tmp_path / "not" / "there", 2_500_000)
    with pytest.raises(KeyError), one_line(tmp_path):
        raise KeyError("a")
    sizes = (999, 1000, 1_234_000, 5 * 10**9, 7 * 10**15)
    assert [size_text(n) for n in sizes] == ["999 bytes", "1.00 KB", "1.23 MB", "5.00 GB", "7000.00 TB"]


# Runs


@pytest.fixture
def argv(model, tiny_data, tmp_path):
    flags = "--train-iters 4 --search-iters 2 --save-interval 1 --lr-warmup-iters 1"
    return tiny.prune_argv(model, tiny_data, tmp_path / "run", *flags.split())


def fills_at(monkeypatch, iteration):
    """Make the disk full once an iteration is logged. Return a function that frees space."""
    log, full = MetricsLogger.log, full_disk()

    def logged(self, record):
        log(self, record)
        if record["iteration"] == iteration:
            full.__enter__()

    monkeypatch.setattr(MetricsLogger, "log", logged)

    def make_room():
        full.__exit__(None, None, None)
        monkeypatch.setattr(MetricsLogger, "log", log)

    return make_room


@pytest.mark.parametrize("iteration", [1, 3])
def test_checkpoint(argv, tmp_path, monkeypatch, capfd, iteration):
    run = tmp_path / "run"
    make_room = fills_at(monkeypatch, iteration)
    try:
        status, line = attempt("prune", *argv)
    finally:
        make_room()
    assert status == 1
    aside = run / "checkpoints" / f"iter_{iteration:07d}.tmp"
    assert line.startswith(f"prune: error: {aside} can't be written (the file takes no more, where ")
    assert (
        " MB are needed): make room, quotas and limits on files included, and run the same command to continue" in line
    )
    assert "rror" not in capfd.readouterr().err.replace("prune: error", "")
    if iteration == 1:
        assert not run.exists()
    else:
        assert files(run / "checkpoints") and {n.split("/")[0] for n in files(run / "checkpoints")} == {"iter_0000002"}
    assert attempt("prune", *argv) == (0, None)
    assert ("iteration 2\n" in capfd.readouterr().out) == (iteration == 3)
    assert (run / "hf" / "config.json").is_file()


def test_room_is_looked_for_before_a_checkpoint(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "room_left", lambda path: 1_000_000)
    status, line = attempt("prune", *argv)
    folder = tmp_path / "run" / "checkpoints" / "iter_0000001.tmp"
    assert status == 1 and line.startswith(f"prune: error: {folder} needs ") and " has 1.00 MB left: make room" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parallel
@pytest.mark.parametrize("rank, largest_file", [(1, 100_000), (0, 400)])
def test_both_ranks_end(argv, tmp_path, rank, largest_file):
    """The fault is in a worker of the second rank, or in a file that only the first rank writes."""
    script = (
        "import os, resource, sys, warnings\n"
        "warnings.filterwarnings('ignore')\n"
        "from megaprune.cli.main import main\n"
        "from megaprune.report.metrics import MetricsLogger\n"
        "from megaprune.pruning.context import RunContext\n"
        "due = RunContext.save_if_due\n"
        "def full(self, *rest, **more):\n"
        f"    if os.environ['RANK'] == '{rank}':\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, resource.RLIM_INFINITY))\n"
        "    due(self, *rest, **more)\n"
        "RunContext.save_if_due = full\n"
        "main('prune', sys.argv[1:])\n"
    )
    (tmp_path / "full.py").write_text(script)
    words = ["--log-dir", tmp_path / "logs", tmp_path / "full.py"]
    done = subprocess.run(
        [*torchrun(2, "--redirects", "3"), *map(str, words), *argv, "--tensor-model-parallel-size", "2"],
        env=tiny.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    by_rank = {path.parent.name: path.read_text() for path in tmp_path.glob("logs/*/attempt_0/*/stderr.log")}
    assert sum(map(bool, by_rank.values())) == 1, by_rank
    said = "".join(by_rank.values())  # by the rank that was the first to end
    assert "iter_0000001.tmp can't be written (" in said and "needed): make room" in said, by_rank
    assert said.count("\n") == 1 and "Traceback" not in said and not (tmp_path / "run").exists(), by_rank


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "64", "--export-adapter")])
def test_export(argv, tmp_path, monkeypatch, flags):
    run, export = tmp_path / "run", runner.export
    argv = [*argv, *flags, "--max-shard-size", "5GB"]

    def full(*args):
        with full_disk():
            export(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "export", full)
        status, line = attempt("prune", *argv)
    assert status == 1 and "can't be written (File too large" in line, line
    assert not {"hf", "hf.tmp", "adapter.tmp", "adapter"} & files(run)
    assert attempt("prune", *argv) == (0, None)
    assert load_file(run / "hf" / "model.safetensors")


def test_surgery(model, tmp_path):
    argv = ["--hf-model", model, "--save", tmp_path / "run", "--method", "manual", "--prune-layers", 3]
    argv += ["--train-iters", 0]
    with full_disk():
        status, line = attempt("prune", *argv)
    assert status == 1 and f"{tmp_path / 'run' / 'hf.tmp'} can't be written (File too large" in line, line
    assert files(tmp_path) == set()
    assert attempt("prune", *argv) == (0, None)


# Other tools


def test_conversion(model, tmp_path):
    out, back = tmp_path / "checkpoint", tmp_path / "hf"
    convert = ("convert", "import", "--hf-model", model, "--megatron-path", out)
    export = ("convert", "export", "--megatron-path", out, "--hf-path", back)
    for argv, work in ((convert, out), (export, back)):
        with full_disk():
            status, line = attempt(*argv)
        assert status == 1 and str(work) in line and "File too large" in line, line
        assert "needed): make room, quotas and limits on files included, and continue with --resume" in line
        assert not work.exists()
        assert not [path for path in work.with_name(f"{work.name}.tmp").rglob("*") if path.stat().st_size > 90_000]
        assert attempt(*argv, "--resume") == (0, None)


def test_teacher_cache(model, tiny_data, tmp_path):
    argv = ["--hf-model", model, "--train-data", tiny_data / "train.jsonl", "--seq-length", 64]
    argv += ["--distill-top-k", 20, "--output", tmp_path / "out"]
    with full_disk(5_000):
        status, line = attempt("cache-teacher", *argv)
    assert status == 1 and "the token cache cannot be written" in line and "File too large" in line, line
    with full_disk(20_000):
        status, line = attempt("cache-teacher", *argv)
    assert status == 1 and "shard-00000.bin.tmp can't be written (File too large" in line, line
    assert not [name for name in files(tmp_path) if name.endswith("bin.tmp")]
    assert attempt("cache-teacher", *argv) == (0, None)


def test_preprocessing(model, tmp_path):
    data = tiny.make_data(tmp_path / "many.jsonl", rows=3000, seed=1)
    argv = ["preprocess-data", "--input", data, "--tokenizer", model, "--output-prefix", tmp_path / "out" / "p"]
    with full_disk(20_000):
        status, line = attempt(*argv, "--workers", 1)
    assert status == 1, line
    assert f"--output-prefix {tmp_path / 'out' / 'p'} can't be written (File too large" in line
    assert files(tmp_path) == {"many.jsonl"}
    assert attempt(*argv, "--workers", 1) == (0, None)


def test_report_of_another_tool(model, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["plan", "--hf-model", model, "--world-size", 1, "--num-layers-to-prune", 2]
    status, line = attempt(*argv, "--output", tmp_path / "file" / "plan.json")
    assert status == 1 and str(tmp_path / "file") in line and "can't be written" in line
