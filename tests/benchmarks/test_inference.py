"""`benchmark inference`: the two models, what is measured of them, and what is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from megaprune.benchmarks.inference import Sample, make_models
from megaprune.benchmarks.timing import Interval, median_interval
from megaprune.benchmarks.vllm_engine import cache_bytes
from megaprune.cli.benchmark import run
from megaprune.utils.errors import MegapruneError, UsageError

ROOT = Path(__file__).parents[2]
TINY = [
    *("--hidden-size", "32", "--num-attention-heads", "2", "--vocab-size", "64", "--prompt-lengths", "8", "5"),
    *("--batch-sizes", "1", "2", "--new-tokens", "3", "--repeats", "2", "--warmup", "0"),
]


def check_result(result, ideal):
    assert [(case["batch_size"], case["prompt_length"]) for case in result["cases"]] == [(1, 8), (1, 5), (2, 8), (2, 5)]
    for case in result["cases"]:
        assert case["ideal_speed_up"] == ideal
        assert {name: len(rounds) for name, rounds in case["rounds"].items()} == {"original": 2, "pruned": 2}
        for kind in ("first_token", "total"):
            assert case[f"{kind}_speed_up"] > 0 and min(case[f"{kind}_seconds"].values()) > 0
            interval = case[f"{kind}_interval"]
            assert interval["low"] <= case[f"{kind}_speed_up"] <= interval["high"] and interval["confidence"] == 0.5
            assert case[f"{kind}_of_ideal"] == pytest.approx(case[f"{kind}_speed_up"] / ideal)


def test_random_weights(tmp_path, capsys):
    output = tmp_path / "result.json"
    run(["inference", *TINY, "--num-layers", "6", "--num-pruned", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    check_result(result, 1.5)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("6 -> 4 layers, ideal speed-up 1.500")
    assert sum("first token" in line for line in table) == 4


def test_models_of_the_users(tiny_model, tmp_path):
    made = make_models(
        tmp_path, 4, 1, dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64)
    )
    assert [AutoConfig.from_pretrained(folder).num_hidden_layers for folder in made.values()] == [4, 3]
    output = tmp_path / "result.json"
    words = ["--hf-model", str(made["original"]), "--pruned-model", str(made["pruned"]), "--output", str(output)]
    run(["inference", *TINY, *words])
    check_result(json.loads(output.read_text()), 4 / 3)


def test_intervals_contain_the_median_as_often_as_they_say():
    """Sign test's bounds: known values of the binomial distribution, and draws from a skewed distribution."""
    assert median_interval([3.0, 1.0, 2.0]) == Interval(1.0, 3.0, 0.75)
    assert median_interval([5.0]) == Interval(5.0, 5.0, 0.0)
    six, nine = (median_interval([float(n) for n in range(number)]) for number in (6, 9))
    assert (six.low, six.high, six.confidence) == (0.0, 5.0, 1 - 2 / 64)
    assert (nine.low, nine.high, nine.confidence) == (1.0, 7.0, 1 - 20 / 512)
    draws = torch.rand(4000, 20, generator=torch.Generator().manual_seed(0)).log().neg()
    intervals = [median_interval(row) for row in draws.tolist()]
    inside = sum(each.low <= math.log(2) <= each.high for each in intervals) / len(intervals)
    assert inside == pytest.approx(intervals[0].confidence, abs=0.01) and 0.95 <= intervals[0].confidence < 0.97


def test_the_cache_of_vllm_holds_the_batch():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    tokens, per_token = 512 * 3 * 128, 3 * 2 * 2 * 16 * 4
    assert cache_bytes(config, batch_size=512, length=200) == tokens * per_token


@pytest.mark.serving
def test_vllm_measures_both_models(tmp_path):
    output = tmp_path / "result.json"
    sizes = ["--hidden-size", "64", "--num-attention-heads", "2", "--num-layers", "6", "--num-pruned", "2"]
    words = ["inference", *TINY, *sizes, "--engine", "vllm", "--dtype", "float32", "--output", str(output)]
    # each model in a process of its own, as vLLM does unless it is told otherwise; compiling takes minutes on few cores
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCH_COMPILE_DISABLE": "1"}
    subprocess.run([sys.executable, str(ROOT / "tools" / "benchmark.py"), *words], check=True, env=environment)
    check_result(json.loads(output.read_text()), 1.5)


def test_the_whole_is_the_first_token_and_the_others():
    assert Sample(first_token=1.0, further_token=0.5).total(5) == 3.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hf-model", "m"], "--hf-model and --pruned-model go together"),
        (["--hf-model", ".", "--pruned-model", "."], "--hf-model . holds no config.json"),
        (["--num-layers", "4", "--num-pruned", "4"], "--num-pruned 4 leaves nothing"),
        (["--new-tokens", "1"], "--new-tokens 1 is less than 2"),
        (["--batch-sizes", "0"], "--batch-sizes 0"),
        (["--hidden-size", "30", "--num-attention-heads", "4"], "--hidden-size 30"),
        (["--engine", "tgi"], "--engine"),
    ],
)
def test_wrong_flags_are_refused(argv, message):
    with pytest.raises(UsageError, match=message):
        run(["inference", *argv])


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(MegapruneError, match="contains no model that transformers can load"):
        run(["inference", *TINY, "--hf-model", str(tmp_path), "--pruned-model", str(tmp_path)])
