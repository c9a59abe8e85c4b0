"""report.json's contents, its file, and the table at the end of a run."""

import json
import math
from dataclasses import replace

import pytest

from megaprune.report.run_report import perplexity, read_report, result_table, share_recovered, write_report
from megaprune.utils.files import whole_file


def test_layers_are_reported_by_source_index(report):
    assert report.num_layers == 5
    assert report.kept_layers == [0, 1, 2, 5, 7]
    assert report.pruned_layers == [3, 4, 6]


def test_versions(report):
    assert set(report.versions) == {"megaprune", "torch", "megatron-core", "transformers", "python"}


def test_file_round_trip(tmp_path, report):
    write_report(tmp_path / "run" / "report.json", report)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.to_dict()
    assert read_report(tmp_path / "run" / "report.json") == report
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.json"]


def test_no_nan_in_the_file(tmp_path, report):
    report.scores[0] = math.inf
    report.valid["pruned"]["loss"] = math.nan
    write_report(tmp_path / "report.json", report)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["valid"]["pruned"]["loss"] is None


def test_experts_are_reported_separately(report):
    assert "dense" not in result_table(report)
    report = replace(
        report,
        layer_kinds_before={"dense": 2, "moe": 6},
        layer_kinds_after={"dense": 1, "moe": 4},
        active_params_before=3_000_000,
        active_params_after=2_000_000,
    )
    table = result_table(report)
    assert "2 -> 1 dense, 6 -> 4 MoE" in table
    assert "3,000,000 -> 2,000,000 parameters a token" in table


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_result_table(tmp_path, report):
    (tmp_path / "hf").mkdir()
    lines = result_table(report, tmp_path).splitlines()
    assert lines[0] == "e3: 8 -> 5 layers, 8,000,000 -> 5,600,000 parameters, seed 1234"
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:6]}
    assert rows["teacher"] == ["8", "8,000,000", "2.0000", "7.39"]
    assert rows["pruned"] == ["5", "5,600,000", "3.5000", "33.12"]
    assert rows["recovered"] == ["5", "5,600,000", "2.2500", "9.49"]
    facts = {line[:16].rstrip(): line[16:] for line in lines[7:]}
    assert facts == {
        "kept layers": "0-2, 5, 7",
        "pruned layers": "3-4, 6",
        "ideal speed-up": "1.60x",
        "tokens seen": "1,228,800",
        "loss recovered": "83.3% of what pruning cost",
        "time": "search 1.2 s, recovery 9.0 s",
        "pruned model": str(tmp_path / "hf"),
    }


def test_result_table_without_validation(report):
    table = result_table(replace(report, valid={}))
    assert "recovered" not in table
    assert "teacher            8           8,000,000            -             -" in table


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((2.0, 3.5, 2.25), 1.25 / 1.5),
        ((2.0, 3.0, 3.5), -0.5),
        ((2.0, 3.0, 1.5), 1.5),
        ((2.0, 2.0, 1.5), None),  # pruning cost nothing
        ((2.0, 1.9, 1.8), None),
        ((2.0, math.inf, 2.5), None),
        ((2.0, math.nan, 2.5), None),
    ],
)
def test_share_of_the_loss_that_recovery_regained(report, losses, share):
    assert share_recovered(*losses) == pytest.approx(share)
    assert share_recovered(*(-loss for loss in losses), is_loss=False) == pytest.approx(share)
    valid = {name: {"loss": loss} for name, loss in zip(("teacher", "pruned", "recovered"), losses, strict=True)}
    report = replace(report, valid=valid)
    assert report.to_dict().get("loss_recovered") == pytest.approx(share)
    assert ("loss recovered" in result_table(report)) == (share is not None)


def test_no_share_without_recovery(report):
    report = replace(report, valid={name: report.valid[name] for name in ("teacher", "pruned")})
    assert "loss_recovered" not in report.to_dict() and "loss recovered" not in result_table(report)


def test_perplexity_of_a_very_high_loss():
    assert perplexity(math.log(10)) == pytest.approx(10)
    assert perplexity(1e4) == math.inf
