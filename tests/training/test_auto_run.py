"""A run with `--method auto`."""

import json

import pytest
import tiny

from megaprune.errors import UsageError


def test_auto_in_a_run(tiny_model, tiny_data, tmp_path):
    argv = [*tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "auto"), "--train-iters", "2"]
    tiny.run_here([*argv, "--selection-budget", "60000"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "auto" and len(report["candidates"]) == 5
    assert next(c for c in report["candidates"] if c["chosen"])["kept_layers"] == report["kept_layers"]
    assert 0 < report["stages"]["importance"]["tokens"] <= 60000
    tiny.load_hf(tmp_path / "run" / "hf")
    with pytest.raises(UsageError, match="--selection-budget 10 is too little"):
        tiny.run_here([*argv, "--save", str(tmp_path / "other"), "--selection-budget", "10"])
    assert not (tmp_path / "other").exists()
