"""The SmolLM2 example with few tokens and few items, where the Python Package Index can be reached."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import tiny
from tests.helpers.benchmarks import write_benchmarks

pytest.importorskip("lm_eval", reason="the tasks need lm-eval (megaprune[eval])")

pytestmark = [pytest.mark.slow, pytest.mark.network]

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
CHARACTERS = 20_000  # of each text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, str(EXAMPLE / "prepare.py"), str(folder / "data")]
    made = subprocess.run(command, capture_output=True, text=True, env=tiny.environment())
    if "pip" in made.stderr and made.returncode:
        pytest.skip(f"the packages can't be downloaded: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return folder


def test_model_and_text(prepared):
    data = prepared / "data"
    assert sorted(path.name for path in data.iterdir()) == ["model", "train.jsonl", "valid.jsonl"]
    assert json.loads((data / "model" / "config.json").read_text())["num_hidden_layers"] == 30
    train, valid = (
        [json.loads(line)["text"] for line in (data / f"{name}.jsonl").open()] for name in ("train", "valid")
    )
    assert (len(train), len(valid)) == (87, 9) and not set(train) & set(valid)
    assert train[0].startswith("Anarchism\nAnarchism is a political philosophy that advocates self-governed societies")
    marks = [mark for mark in ("[[", "{{", "<ref", "'''", "__TOC__") if sum(text.count(mark) for text in train) > 3]
    assert not marks


def test_recipe_end_to_end(prepared):
    recipe = yaml.safe_load((EXAMPLE / "smollm2.yaml").read_text())
    for name in ("train", "valid"):
        first = json.loads((prepared / "data" / f"{name}.jsonl").open().readline())["text"][:CHARACTERS]
        (prepared / f"{name}.jsonl").write_text(json.dumps({"text": first}))
    recipe["run"] |= {
        "hf_model": str(prepared / "data" / "model"),
        "train_data": str(prepared / "train.jsonl"),
        "valid_data": str(prepared / "valid.jsonl"),
        "data_cache_path": str(prepared / "cache"),
        "seq_length": 64,
        "train_iters": 3,
        "lr_warmup_iters": 1,
        "global_batch_size": 4,
        "calibration_samples": 4,
    }
    recipe |= {"methods": ["shortgpt"], "num_layers_to_prune": [10]}
    (prepared / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tasks = write_benchmarks(prepared / "tasks")
    words = ["--config", str(prepared / "recipe.yaml"), "--save", str(prepared / "out")]
    words += ["--tasks", "copa,piqa", "--task-path", str(tasks), "--task-limit", "2"]
    subprocess.run(
        [sys.executable, "tools/compare.py", *words], check=True, env=tiny.environment(), cwd=EXAMPLE.parents[1]
    )
    [run] = (prepared / "out" / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    losses = {name: found["loss"] for name, found in report["valid"].items()}
    assert losses["teacher"] < losses["recovered"] < losses["pruned"]
    assert report["num_layers"] == 20 and report["params_after"] < report["params_before"] == 134_515_008
    table = (prepared / "out" / "table.md").read_text()
    assert "| method | layers pruned | copa | piqa | mean | ± |" in table
