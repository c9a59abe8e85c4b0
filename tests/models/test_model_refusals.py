"""Configs that Megatron-Core's layers would not compute as transformers does are refused, not approximated."""

import math

import pytest
from transformers import AutoConfig
from transformers.configuration_utils import remap_legacy_layer_types

from megaprune.cli.main import attempt
from megaprune.models import FAMILIES, family_of
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny
from tests.helpers.real_configs import (
    DEEPSEEK_R1,
    DENSE,
    LLAMA_3_8B,
    MOE,
    OPENPANGU_ULTRA,
    QWEN2_5_14B,
    QWEN3_30B_A3B,
    QWEN3_32B,
)

KIMI_K2 = DEEPSEEK_R1 | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1}


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
        (DEEPSEEK_R1, {"attention_bias": True}, "deepseek_v3: attention_bias true is not supported"),
        (LLAMA_3_8B, {"use_sliding_window": True}, "set use_sliding_window to false"),
        (QWEN3_32B, {"layer_types": ["full_attention", "sliding_attention"] * 32}, "sliding-window attention"),
        (QWEN2_5_14B, {"use_mrope": True}, "use_mrope true is not supported"),
        (LLAMA_3_8B, {"head_dim": 63}, "an even head dimension, not 63"),
        (LLAMA_3_8B, {"num_key_value_heads": 5}, "32 attention heads can't share 5 key-value heads"),
        # routers that the core computes otherwise
        (DEEPSEEK_R1, {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with sigmoid routing can't be expressed"),
        (KIMI_K2, {"num_experts_per_tok": 1}, "kimi_k2: num_experts_per_tok 1 with sigmoid routing"),
        (OPENPANGU_ULTRA, {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with sigmoid routing"),
        (DEEPSEEK_R1, {"norm_topk_prob": False}, "norm_topk_prob false with sigmoid routing"),
        (DEEPSEEK_R1, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        (DEEPSEEK_R1, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported, only 'noaux_tc'"),
        (DEEPSEEK_R1, {"routed_scaling_factor": 0}, "'routed_scaling_factor' in config.json is 0"),
        (DEEPSEEK_R1, {"num_experts_per_tok": 257}, "257 is more than the 256 routed experts"),
        (DEEPSEEK_R1, {"num_experts_per_tok": 6}, "num_experts_per_tok 6 with topk_group 4 can't be expressed"),
        (DEEPSEEK_R1, {"n_group": 7}, "n_group 7 and topk_group 4 don't fit 256 experts"),
        (DEEPSEEK_R1, {"topk_group": 9}, "n_group 8 and topk_group 9 don't fit"),
        (DEEPSEEK_R1, {"n_group": 256, "topk_group": 4}, "n_group 256 and topk_group 4 don't fit"),
        (DEEPSEEK_R1, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        (
            QWEN3_30B_A3B,
            {"num_experts_per_tok": 1},
            "norm_topk_prob true with num_experts_per_tok 1 can't be expressed",
        ),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "129 is more than the 128 experts"),
        (QWEN3_30B_A3B, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported, only 'softmax'"),
        (OPENPANGU_ULTRA, {"param_sink_number": 128}, "param_sink_number 128 is not supported"),
        (OPENPANGU_ULTRA, {"n_group": 8}, "n_group 8 is not supported"),
        (OPENPANGU_ULTRA, {"q_lora_rank": 768}, "hold 1536 and 768"),
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


# every setting that is read, by the type that it must have
WHOLE = {
    "llama": ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"],
    "deepseek_v3": ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size"],
    "qwen3_moe": ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"],
    "qwen3": ["head_dim", "max_position_embeddings"],
    "pangu_ultra_moe": ["attention_qk_dim", "num_routed_experts", "max_position_embeddings"],
}
WHOLE["deepseek_v3"] += ["n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_layer_freq"]
# null stands for absence, or none
WHOLE_OR_NULL = {
    "llama": ["num_key_value_heads"],
    "qwen2": ["num_key_value_heads"],
    "deepseek_v3": ["q_lora_rank", "n_shared_experts"],
}
POSITIVE = {"llama": ["rms_norm_eps"], "deepseek_v3": ["routed_scaling_factor", "rms_norm_eps"]}
SWITCHES = {
    "llama": ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"],
    "deepseek_v3": ["attention_bias", "tie_word_embeddings", "norm_topk_prob", "rope_interleave"],
    "qwen3_moe": ["norm_topk_prob", "use_sliding_window"],
    "pangu_ultra_moe": ["sandwich_norm", "router_enable_expert_bias", "norm_topk_prob"],
}
LAYERS = {"qwen3_moe": ["mlp_only_layers", "layer_types"], "llama": ["layer_types"], "deepseek_v3": ["layer_types"]}
_NO_NUMBER = ["4096", [4096], {}, True, -1, math.nan, math.inf, -math.inf, 10**400]
WRONG = [
    (WHOLE, [*_NO_NUMBER, None, 2.5, 0]),
    (WHOLE_OR_NULL, [*_NO_NUMBER, 2.5]),
    (POSITIVE, [*_NO_NUMBER, None, 0]),
    (SWITCHES, ["false", 0, 1, None, [], math.nan]),
    (LAYERS, [5, "full_attention", {}, True, [None], [[0]], math.nan]),
]
BY_TYPE = {config["model_type"]: config for config in (DENSE | MOE).values()}


@pytest.mark.parametrize(
    "model_type, key, value",
    [
        (model_type, key, value)
        for keys_of, values in WRONG
        for model_type, keys in keys_of.items()
        for key in keys
        for value in values
    ],
)
def test_values_of_a_wrong_type(model_type, key, value):
    said = refusal(BY_TYPE[model_type] | {key: value})
    assert said.startswith(f"{model_type}: ") and " in config.json is " in said and len(said) < 200
    assert f"{value!r}"[:50] in said


def test_layer_types_are_as_many_as_the_layers():
    said = refusal(QWEN3_32B | {"layer_types": ["full_attention"] * 63})
    assert said == "qwen3: 'layer_types' in config.json names 63 layers, but the model has 64"


def test_older_names_of_layer_types_are_read_as_transformers_reads_them():
    def types(name):
        return windows | {"layer_types": [name, "sliding_attention"] * 32}

    windows = QWEN3_32B | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    family = family_of(windows)
    assert family.architecture(types("attention")) == family.architecture(types("full_attention"))
    renamed = remap_legacy_layer_types(types("attention")["layer_types"])
    assert renamed == types("full_attention")["layer_types"]
    assert "'linear_attention'" in refusal(types("linear_attention"))


def test_what_may_be_left_out_is_what_transformers_takes_for_it():
    def without(config, *keys):
        return architecture({key: value for key, value in config.items() if key not in keys})

    def architecture(config):
        return family_of(config).architecture(config)

    for config in (LLAMA_3_8B, QWEN2_5_14B, QWEN3_32B, QWEN3_30B_A3B, DEEPSEEK_R1):
        default = AutoConfig.for_model(config["model_type"])
        assert without(config, "max_position_embeddings").max_position_embeddings == default.max_position_embeddings
    assert without(LLAMA_3_8B, "num_key_value_heads").query_groups == 32
    for config in (QWEN2_5_14B | {"num_attention_heads": 64}, QWEN3_32B, QWEN3_30B_A3B):
        default = AutoConfig.for_model(config["model_type"])
        assert without(config, "num_key_value_heads").query_groups == default.num_key_value_heads
        assert architecture(config).query_groups != default.num_key_value_heads or config is QWEN3_30B_A3B
    assert without(QWEN3_32B | {"hidden_size": 4096}, "head_dim").head_dim == 128
    assert without(LLAMA_3_8B, "head_dim").head_dim == architecture(LLAMA_3_8B | {"head_dim": None}).head_dim == 128
    for key in ("routed_scaling_factor", "n_group", "topk_group", "q_lora_rank"):
        with pytest.raises(MegapruneError, match=f"lacks the key '{key}'"):
            without(DEEPSEEK_R1, key)
    assert not without(OPENPANGU_ULTRA, "sandwich_norm").sandwich_norm


def test_groups_that_are_all_chosen_are_no_groups():
    arch = family_of(DEEPSEEK_R1).architecture(DEEPSEEK_R1 | {"topk_group": 8})
    assert "moe_router_num_groups" not in arch.transformer
    assert family_of(DEEPSEEK_R1).architecture(DEEPSEEK_R1).transformer["moe_router_num_groups"] == 8


@pytest.mark.parametrize("model_type", ["gpt2", None, "", ["llama"], 5, {}])
def test_unknown_family(model_type):
    with pytest.raises(MegapruneError) as caught:
        family_of({"model_type": model_type})
    assert repr(model_type) in str(caught.value)
    assert all(known in str(caught.value) for known in FAMILIES)
    with pytest.raises(MegapruneError, match="None"):
        family_of({})


def test_sequences_in_which_sparse_attention_is_not_dense_are_refused(tiny_model, tiny_data, tmp_path):
    for length, said in ((128, None), (129, "--seq-length 129 is more than 128 (index_topk)")):
        argv = tiny.select_argv(tiny_model("deepseek_v32"), tiny_data, tmp_path / "run", "random")
        argv = [*argv, "--seq-length", str(length), "--dry-run"]
        status, line = attempt("prune", argv)
        assert (status, line) == (0, None) if said is None else status == 2 and said in line
