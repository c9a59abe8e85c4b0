"""Mappings give the same configurations and the same errors as command lines."""

import pytest

from megaprune.cli.prune import parse_config
from megaprune.config.schema import Config
from megaprune.utils.errors import UsageError

RUN = {"hf_model": "m", "save": "s", "train_data": ["d"], "train_iters": 100, "num_layers_to_prune": 4}


def test_keyword_arguments_are_the_flags_with_underscores():
    words = "--hf-model m --save s --train-data d --train-iters 100 --num-layers-to-prune 4 --lr 1e-5 --bf16"
    expected = parse_config(words.split())
    assert Config.from_mapping(RUN | {"lr": 1e-5, "bf16": True}) == expected
    assert (
        Config.from_mapping(RUN | {"lr": "1e-5", "bf16": "true", "min-lr": None, "lora_target_modules": ()}) == expected
    )


def test_lists_of_numbers_become_words_between_commas():
    manual = {"hf_model": "m", "save": "s", "train_iters": 0, "method": "manual", "prune_layers": [3, 7]}
    assert Config.from_mapping(manual).prune.prune_layers == "3,7"


@pytest.mark.parametrize(
    "values, said",
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"num_layer_to_prune": 1}, "did you mean num_layers_to_prune?"),
        ({"lr": True}, "--lr: invalid float value: 'True'"),
        ({"seq_length": 1.5}, "--seq-length: invalid int value: '1.5'"),
        ({"seq_length": True}, "--seq-length: invalid int value: 'True'"),
        ({"bf16": 2}, "--bf16: invalid bool value: '2'"),
        ({"method": "best"}, "--method: invalid choice: 'best'"),
        ({"lr": {"peak": 1}}, "lr must be a value or a list of values"),
        ({"seed": -1}, "--seed -1 is less than 0"),
        ({"mask_ramp": 1.5}, "--mask-ramp 1.5 is above 1"),
        ({"lr": float("nan")}, "--lr nan is not a finite number"),
    ],
)
def test_refused(values, said):
    with pytest.raises(UsageError) as caught:
        Config.from_mapping(RUN | values)
    assert said in str(caught.value)


def test_a_recipe_and_what_replaces_its_settings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("{hf_model: m, save: s, train_data: d, train_iters: 100, num_layers_to_prune: 4}")
    assert Config.from_yaml(path) == Config.from_mapping(RUN)
    config = Config.from_yaml(path, prune_ratio=0.5, lr=1e-3)
    assert (config.prune.num_layers_to_prune, config.prune.prune_ratio, config.recovery.lr) == (None, 0.5, 1e-3)
    with pytest.raises(UsageError, match=f"--config {path}: unknown key 'epochs'"):
        Config.from_yaml(path, epochs=3)
