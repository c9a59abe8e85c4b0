"""Configs that Megatron-Core's layers would not compute as transformers does are refused, not approximated."""

import pytest

from megaprune.models import FAMILIES, family_of
from megaprune.utils.errors import MegapruneError
from tests.helpers.real_configs import (
    DEEPSEEK_R1,
    DENSE,
    LLAMA_3_1_8B,
    LLAMA_3_8B,
    QWEN2_5_14B,
    QWEN3_30B_A3B,
    QWEN3_32B,
)


def refusal(config):
    with pytest.raises(MegapruneError) as caught:
        family_of(config).architecture(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "config, edits, said",
    [
        *((config, {"hidden_act": "gelu"}, "hidden_act 'gelu'") for config in (LLAMA_3_8B, QWEN3_32B, DEEPSEEK_R1)),
        (LLAMA_3_8B, {"attention_bias": True}, "llama: attention_bias true is not supported"),
        (QWEN3_32B, {"attention_bias": True}, "qwen3: attention_bias true is not supported"),
        (QWEN3_30B_A3B, {"attention_bias": True}, "qwen3_moe: attention_bias true is not supported"),
        (LLAMA_3_8B, {"mlp_bias": True}, "llama: mlp_bias true is not supported"),
        (QWEN2_5_14B, {"use_sliding_window": True}, "set use_sliding_window to false"),
        (QWEN3_32B, {"layer_types": ["full_attention", "sliding_attention"] * 32}, "sliding-window attention"),
        (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        (LLAMA_3_1_8B, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE scaling 'dynamic'"),
        (LLAMA_3_8B, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "RoPE scaling 'yarn'"),
        (LLAMA_3_8B, {"rope_scaling": {"type": "linear"}}, "lacks the key 'factor'"),
        (LLAMA_3_8B, {"rope_scaling": "linear"}, "rope_scaling"),
    ],
)
def test_what_cannot_be_expressed(config, edits, said):
    assert said in refusal(config | edits)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("name", DENSE)
def test_missing_keys(name, key):
    config = {name: value for name, value in DENSE[name].items() if name != key}
    assert refusal(config) == f"{config['model_type']}: config.json lacks the key {key!r}"


@pytest.mark.parametrize("value", ["4096", [4096], True, -1])
def test_numbers_that_are_none(value):
    assert refusal(LLAMA_3_8B | {"hidden_size": value}).startswith(f"llama: 'hidden_size' in config.json is {value!r}")


@pytest.mark.parametrize("model_type", ["gpt2", None, ""])
def test_unknown_family(model_type):
    with pytest.raises(MegapruneError) as caught:
        family_of({"model_type": model_type})
    assert repr(model_type) in str(caught.value)
    assert all(known in str(caught.value) for known in FAMILIES)
    with pytest.raises(MegapruneError, match="None"):
        family_of({})
