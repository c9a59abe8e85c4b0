"""The Python API under torchrun: the same report on every rank, and on one process."""

import json
from pathlib import Path

import pytest

import megaprune
from tests.helpers import tiny
from tests.helpers.converting import assert_same_model
from tests.helpers.launch import launch


@pytest.fixture(scope="module")
def flags(tiny_model, tiny_data):
    return dict(
        hf_model=str(tiny_model("qwen3_tied")),
        train_data=[str(tiny_data / "train.jsonl")],
        num_layers_to_prune=2,
        method="kl-init",
        train_iters=1,
        calibration_samples=4,
        seq_length=tiny.SEQ_LENGTH,
        global_batch_size=4,
    )


def test_every_rank_gets_what_one_process_gets(flags, tmp_path):
    at_two = flags | {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    common = ("hf_model", "calibration_samples", "seq_length")
    scoring = {"data": flags["train_data"], **{name: flags[name] for name in common}}
    launch(2, [dict(kind="api_cases.calls", flags=at_two, scoring=scoring, folder=tmp_path)], tmp_path)
    found = json.loads((tmp_path / "reports.json").read_text())
    assert found["prune"] == found["again"] == json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["refused"][0] == "UsageError" and "cannot prune 99 of 7 layers" in found["refused"][1]
    assert not (tmp_path / "refused").exists()
    alone = megaprune.prune(**flags, save=tmp_path / "alone")
    assert found["prune"]["kept_layers"] == alone.kept_layers
    scores = megaprune.score_layers(**scoring).scores
    assert found["scores"]["scores"] == pytest.approx(scores, rel=1e-4)
    assert found["prune"]["scores"] == pytest.approx(scores, rel=1e-4)
    assert_same_model(tmp_path / "hf", Path(flags["hf_model"]))
    assert found["cut"]["kept_layers"] == [0, 3, 4, 5, 6] and (tmp_path / "cut" / "config.json").is_file()
    assert "exists: choose another folder" in found["exists"][1]
    assert found["loaded"][0] == "UsageError"
