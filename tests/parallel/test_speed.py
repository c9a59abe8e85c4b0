"""The speed of steps in the records and in the report; a slow rank shows."""

import json

import pytest

from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.launch import launch_cases
from tests.parallel.speed_cases import SECONDS

ITERS, INTERVAL = 4, 2


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, folder / "run", "manual")
    at = argv.index("--num-layers-to-prune")
    argv[at : at + 2] = ["--prune-layers", "2,3"]
    argv += ["--train-iters", str(ITERS), "--log-interval", str(INTERVAL), "--peak-tflops", "0.5"]
    cases = {"run": dict(kind="speed_cases.slow_rank", argv=argv, rank=1)}
    return launch_cases(2, cases, folder).path("run")


def test_records_hold_the_speed_of_a_step_and_name_the_slow_rank(run):
    records = read_metrics(run)
    assert len(records) == ITERS
    for record in records:
        assert record["mfu"] == pytest.approx(record["tflops"] / 0.5)
        assert 0 < record["compute_seconds"] + record["teacher_seconds"] + record["data_seconds"] < record["seconds"]
        assert ("slowest_rank" in record) == (record["iteration"] % INTERVAL == 0)
    for record in records[INTERVAL - 1 :: INTERVAL]:
        assert record["slowest_rank"] == 1
        assert (
            record["compute_seconds_max"] > record["compute_seconds_min"] + 0.25 * SECONDS
        )  # other processes may disturb the fast rank
        assert record["memory_gib_max"] >= record["memory_gib"] > 0
    # the operations of a step are the same in all steps: only its time differs
    operations = [record["tflops"] * record["seconds"] for record in records]
    assert operations == pytest.approx([operations[0]] * ITERS, rel=0.2)


def test_the_report_sums_up_the_speed_of_the_stage(run):
    stage = json.loads((run / "report.json").read_text())["stages"]["recovery"]
    records = read_metrics(run)
    assert stage["tflops"] == pytest.approx(sum(record["tflops"] for record in records) / ITERS)
    assert stage["memory_gib"] == max(record.get("memory_gib_max", 0) for record in records)
    assert {"mfu", "compute_seconds", "teacher_seconds", "data_seconds"} <= stage.keys()
