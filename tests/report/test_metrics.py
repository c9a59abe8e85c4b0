"""metrics.jsonl, TensorBoard and the console; the records that a resumed run keeps."""

import io
import json
import sys
import types

import pandas
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaprune.cli.console import console
from megaprune.report.metrics import MetricsLogger, read_metrics
from megaprune.utils.errors import MegapruneError

TOTAL = 6


def record(iteration, **changes):
    searching = iteration <= 2
    values = {
        "iteration": iteration,
        "stage": "search" if searching else "recovery",
        "loss": 3.0 / iteration,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "num_kept": 3,
        "tokens": 100 * iteration,
        "seconds": 0.5,
    }
    if searching:
        values |= {"temperature": 0.9, "scores": [0.1, 0.2, 0.3, 0.4], "mask": [1.0, 0.0, 1.0, 1.0]}
    return values | changes


def log_run(run_dir, iterations, start_iteration=0, **options):
    logger = MetricsLogger(
        run_dir,
        enabled=True,
        total_iterations=TOTAL,
        tokens_per_iteration=100,
        log_interval=2,
        start_iteration=start_iteration,
        **options,
    )
    for iteration in iterations:
        logger.log(record(iteration))
    logger.close()


def contents(run_dir):
    return (run_dir / "metrics.jsonl").read_text()


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_records_come_back_as_logged(tmp_path):
    log_run(tmp_path, range(1, TOTAL + 1))
    assert read_metrics(tmp_path) == [record(iteration) for iteration in range(1, TOTAL + 1)]


def test_pandas_reads_the_record(tmp_path):
    log_run(tmp_path, range(1, TOTAL + 1))
    table = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert set(table.columns) == set(record(1)) and len(table) == TOTAL
    assert table["loss"].tolist() == pytest.approx([3.0 / iteration for iteration in range(1, TOTAL + 1)])
    assert table["temperature"].notna().sum() == 2


def test_there_is_one_record(tmp_path):
    log_run(tmp_path, [1])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, torn):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log_run(whole, range(1, TOTAL + 1))
    log_run(resumed, range(1, 6))  # killed after 5, the last checkpoint is that of iteration 3
    if torn:
        with open(resumed / "metrics.jsonl", "a") as file:
            file.write('{"iteration": 6, "lo')
    log_run(resumed, range(4, TOTAL + 1), start_iteration=3)
    assert contents(resumed) == contents(whole)
    assert scalars(resumed / "tensorboard", "train/loss") == scalars(whole / "tensorboard", "train/loss")
    assert [step for step, _ in scalars(resumed / "tensorboard", "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_starts_from_nothing(tmp_path):
    log_run(tmp_path, range(1, 6))
    log_run(tmp_path, range(1, 3))
    assert [entry["iteration"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_stay_standard_json(tmp_path):
    logger = MetricsLogger(tmp_path, enabled=True, total_iterations=1, tokens_per_iteration=1, log_interval=1)
    logger.log(record(1, grad_norm=float("nan"), scores=[float("inf"), 0.0]))
    logger.close()

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["scores"] == [None, 0.0]
    assert read_metrics(tmp_path)[0]["grad_norm"] is None


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path):
    log_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [entry["iteration"] for entry in read_metrics(tmp_path)] == [1, 2]
    path.write_text("{torn\n" + path.read_text())
    with pytest.raises(MegapruneError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


def test_no_metrics_read_as_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path, capfd):
    logger = MetricsLogger(tmp_path / "run", enabled=False, total_iterations=1, tokens_per_iteration=1, log_interval=1)
    logger.log(record(1))
    logger.figure("plots/loss", tmp_path / "absent.png")
    logger.close()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_figure_is_shown_in_tensorboard(tmp_path):
    Figure(figsize=(2, 1), dpi=50).savefig(tmp_path / "plot.png")
    folder = tmp_path / "elsewhere"
    logger = MetricsLogger(
        tmp_path,
        enabled=True,
        total_iterations=1,
        tokens_per_iteration=1,
        log_interval=1,
        tensorboard_dir=folder,
    )
    logger.log(record(1))
    logger.figure("plots/loss", tmp_path / "plot.png")
    logger.close()
    events = EventAccumulator(str(folder))
    events.Reload()
    (image,) = events.Images("plots/loss")
    assert (image.width, image.height, image.step) == (100, 50, 1)
    assert not (tmp_path / "tensorboard").exists()


def test_plain_lines_each_interval_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log_run(tmp_path / "library", range(1, TOTAL + 1))
    assert sys.stderr.getvalue() == ""
    with console():
        log_run(tmp_path / "command", range(1, TOTAL + 1))
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["iteration 2/6", "iteration 4/6", "iteration 6/6"]
    assert lines[0] == (
        "iteration 2/6 | search   | loss 1.5000 | lr 1.000e-04 | grad norm 0.500 | kept 3 | 200 tokens/s | ETA 0:00:02"
    )


def test_progress_bar_on_a_terminal_starts_where_the_run_resumes(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with console():
        log_run(tmp_path, range(5, TOTAL + 1), start_iteration=4)
    last = terminal.getvalue().split("\r")[-1]
    assert "| 6/6 [" in last
    assert "loss 0.5000, kept 3, 200 tokens/s, ETA 0:00:00" in last


def test_missing_wandb_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MegapruneError, match=r"pip install 'megaprune\[wandb\]'"):
        log_run(tmp_path / "run", [1], wandb_project="p")
    assert not (tmp_path / "run").exists()


def test_wandb_run_goes_on_after_a_resume(tmp_path, monkeypatch):
    logged = []

    def init(project, dir, id, resume):
        assert (project, dir, resume) == ("p", tmp_path, "allow")
        return types.SimpleNamespace(
            log=lambda numbers, step: logged.append((id, step, numbers["train/loss"])), finish=lambda: None
        )

    wandb = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_run(tmp_path, [1, 2], wandb_project="p")
    log_run(tmp_path, [3], start_iteration=2, wandb_project="p")
    log_run(tmp_path, [1], wandb_project="p")
    first, _, resumed, new = (run_id for run_id, _, _ in logged)
    assert first == resumed != new
    assert [(step, loss) for _, step, loss in logged] == [(1, 3.0), (2, 1.5), (3, 1.0), (1, 3.0)]


def test_wandb_that_cannot_start_leaves_the_files_alone(tmp_path, monkeypatch):
    log_run(tmp_path, range(1, 4))
    before = contents(tmp_path)

    def init(**options):
        raise RuntimeError("No API key configured.\nand a page more")

    wandb = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(MegapruneError, match=r"--wandb-project p: wandb can't start \(No API key configured\)"):
        log_run(tmp_path, [1], wandb_project="p")
    assert contents(tmp_path) == before
