"""`benchmark inference`: the two models, what is measured of them, and what is refused."""

import json

import pytest
from transformers import AutoConfig

from megaprune.benchmarks.inference import Sample, make_models
from megaprune.cli.benchmark import run
from megaprune.utils.errors import MegapruneError, UsageError

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
