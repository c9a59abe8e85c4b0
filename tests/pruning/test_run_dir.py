"""Ownership of a run folder, and the remains of a refused run."""

import json

import pytest

from megaprune.cli.prune import parse_config
from megaprune.pruning.resolve import fixed_settings
from megaprune.pruning.run_dir import RunDir
from megaprune.utils.errors import MegapruneError


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "runs" / "one")


def config(*flags):
    words = "--hf-model m --save s --train-data d --train-iters 10 --num-layers-to-prune 2"
    return fixed_settings(parse_config([*words.split(), *flags]))


def refusal(run_dir, *flags):
    with pytest.raises(MegapruneError) as caught:
        run_dir.check(config(*flags))
    message = str(caught.value)
    assert message.startswith(f"--save {run_dir.path} ")
    return message


def test_free_folders(run_dir):
    run_dir.check(config())
    run_dir.path.mkdir(parents=True)
    run_dir.check(config())


def test_goes_on_with_its_own_run(run_dir):
    run_dir.begin(config())
    run_dir.check(config())
    run_dir.begin(config())  # again, by a process that resumes
    # layout, engine and logging may change
    may = "--save-interval 3 --log-interval 5 --micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"
    run_dir.check(config(*may.split(), "--recompute-granularity", "full", "--data-cache-path", "c", "--dry-run"))


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--seed 5", "--seed (1234, now 5)"),
        ("--lr 0.5", "--lr (0.0001, now 0.5)"),
        ("--method random", "--method (e3, now random)"),
        ("--train-data d e", "--train-data (['d'], now ['d', 'e'])"),
        ("--bf16", "--bf16 (False, now True)"),
        ("--use-distributed-optimizer", "--use-distributed-optimizer (False, now True)"),
        ("--valid-data v", "--valid-data ([], now ['v'])"),
    ],
)
def test_another_run(run_dir, flags, said):
    run_dir.begin(config())
    assert f"holds a run with another {said}: choose another folder, or repeat" in refusal(run_dir, *flags.split())


def test_files_that_are_no_runs(run_dir):
    run_dir.path.mkdir(parents=True)
    (run_dir.path / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in refusal(run_dir)


def test_file_in_its_place(run_dir):
    run_dir.path.parent.mkdir()
    run_dir.path.write_text("")
    assert "is a file" in refusal(run_dir)


@pytest.mark.parametrize("body", ["", "{", "[1]", "null", "\\xff"])
def test_damaged_settings(run_dir, body):
    run_dir.begin(config())
    (run_dir.path / "run.json").write_text(body)
    with pytest.raises(MegapruneError, match=f"run.json is damaged: remove {run_dir.path} to start again"):
        run_dir.check(config())


def test_folder_that_cannot_be_made(run_dir):
    run_dir.path.parent.write_text("a file")
    with pytest.raises(MegapruneError, match=f"--save {run_dir.path} can't be written"):
        run_dir.begin(config())


# A run that is refused


def fill(run_dir):
    """Do what a run does before its first checkpoint."""
    run_dir.begin(config())
    (run_dir.data_cache / "key").mkdir(parents=True, exist_ok=True)
    (run_dir.data_cache / "key" / "tokens.bin").write_bytes(b"1")
    (run_dir.path / "metrics.jsonl").write_text("")


def refused_run(run_dir, error=MegapruneError, checkpoint=False):
    with pytest.raises(error), run_dir.undone_if_refused():
        fill(run_dir)
        if checkpoint:
            run_dir.checkpoints.mkdir()
        raise error("weights that are not finite")


def test_leaves_no_folder_and_no_parents(run_dir, tmp_path):
    refused_run(run_dir)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MegapruneError), run_dir.undone_if_refused():
        raise MegapruneError("refused before it was begun")
    assert list(tmp_path.iterdir()) == []


def test_leaves_the_folders_that_were_there(run_dir, tmp_path):
    run_dir.path.parent.mkdir()
    refused_run(run_dir)
    assert list(tmp_path.rglob("*")) == [run_dir.path.parent]
    run_dir.path.mkdir()
    refused_run(run_dir)
    assert list(tmp_path.rglob("*")) == [run_dir.path.parent, run_dir.path]


def test_leaves_another_run_beside_it(run_dir, tmp_path):
    with pytest.raises(MegapruneError), run_dir.undone_if_refused():
        fill(run_dir)
        (run_dir.path.parent / "two").mkdir()
        raise MegapruneError("refused")
    assert list(tmp_path.rglob("*")) == [run_dir.path.parent, run_dir.path.parent / "two"]


def test_leaves_what_an_earlier_process_of_the_run_made(run_dir):
    run_dir.begin(config())
    before = json.loads((run_dir.path / "run.json").read_text())
    refused_run(run_dir)
    assert [path.name for path in run_dir.path.iterdir()] == ["run.json"]
    assert json.loads((run_dir.path / "run.json").read_text()) == before


def test_leaves_all_where_there_is_something_to_resume_from(run_dir):
    refused_run(run_dir, checkpoint=True)
    assert {path.name for path in run_dir.path.iterdir()} == {"run.json", "data-cache", "metrics.jsonl", "checkpoints"}


def test_leaves_all_after_a_crash_and_after_success(run_dir):
    refused_run(run_dir, error=RuntimeError)
    assert (run_dir.path / "metrics.jsonl").is_file()
    with run_dir.undone_if_refused():
        fill(run_dir)
    assert (run_dir.path / "metrics.jsonl").is_file()
