"""Settings of single layers follow the layers: lists are cut, numbers and counts renewed, rules written as lists."""

import pytest

from megaprune.models import family_of
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny

_FULL, _SLIDING = "full_attention", "sliding_attention"
_SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=6,
    rms_norm_eps=1e-6,
)
_MOE, _GLM, _DSA = (
    {key: value for key, value in tiny.MOE_FAMILIES[family][1].items() if key not in _SIZES}
    for family in ("glm4_moe_lite", "glm4_moe", "glm_moe_dsa")
)


def config(model_type, **settings):
    return {"model_type": model_type, **_SIZES, **settings}


# config, kept layers, and the settings of the pruned config that differ (None: removed)
CASES = {
    "layer_types": (
        config("ministral", layer_types=[_FULL, _SLIDING, _SLIDING] * 2),
        [0, 2, 3],
        dict(layer_types=[_FULL, _SLIDING, _FULL]),
    ),
    "qwen's windows follow a prefix": (
        config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3),
        [0, 3, 5],
        dict(max_window_layers=1),
    ),
    "qwen's windows that follow the default": (
        config("qwen3", use_sliding_window=True, sliding_window=8, num_hidden_layers=30, head_dim=16),
        [0, 5, 28, 29],
        dict(layer_types=[_FULL, _FULL, _SLIDING, _SLIDING]),
    ),
    "qwen's windows that are off": (config("qwen2", max_window_layers=3, sliding_window=8), [0, 3], {}),
    "no_rope_layers": (
        config("smollm3", no_rope_layers=[1, 1, 0] * 2, no_rope_layer_interval=3),
        [0, 2, 3],
        dict(no_rope_layers=[1, 0, 1], no_rope_layer_interval=None),
    ),
    "every fourth layer without RoPE": (
        config("smollm3", no_rope_layer_interval=4, num_hidden_layers=8),
        [0, 3, 4, 5, 7],
        dict(no_rope_layers=[1, 0, 1, 1, 0], no_rope_layer_interval=None),
    ),
    "every fourth layer without RoPE, still": (
        config("smollm3", no_rope_layer_interval=4, num_hidden_layers=8),
        [0, 1, 2, 3],
        {},
    ),
    "every fourth layer without a window": (
        config("olmo3", num_hidden_layers=8),
        [0, 3, 4, 7],
        dict(layer_types=[_SLIDING, _FULL, _SLIDING, _FULL]),
    ),
    "every second layer without a window": (
        config("gpt_oss", num_local_experts=4, head_dim=16),
        [0, 3, 4],
        dict(layer_types=None),
    ),
    "every second layer with a window, unlike its rule": (
        config("gpt_oss", num_local_experts=4, head_dim=16),
        [1, 2],
        dict(layer_types=[_FULL, _SLIDING]),
    ),
    "every sixth layer without a window": (
        config("gemma3_text", sliding_window_pattern=3, head_dim=16),
        [1, 2, 3],
        dict(layer_types=[_SLIDING, _FULL, _SLIDING], sliding_window_pattern=None),
    ),
    "a prefix of dense layers": (
        config("glm4_moe", **_GLM | dict(first_k_dense_replace=2)),
        [1, 3, 4],
        dict(first_k_dense_replace=1),
    ),
    "the default prefix of dense layers": (
        config("glm4_moe", **{key: value for key, value in _GLM.items() if key != "first_k_dense_replace"}),
        [1, 3, 4],
        dict(first_k_dense_replace=0),
    ),
    "a dense layer that readers assume": (
        config("glm4_moe_lite", **_MOE, first_k_dense_replace=1, n_group=1, topk_group=1),
        [1, 3, 4],
        dict(first_k_dense_replace=0, mlp_layer_types=["sparse"] * 3),
    ),
    "mlp_layer_types": (
        config(
            "glm4_moe_lite",
            **_MOE,
            n_group=1,
            topk_group=1,
            mlp_layer_types=["dense", "sparse", "dense", "sparse", "sparse", "sparse"],
        ),
        [0, 2, 5],
        dict(mlp_layer_types=["dense", "dense", "sparse"]),
    ),
    "indexer_types": (
        config(
            "glm_moe_dsa",
            **_DSA,
            n_group=1,
            topk_group=1,
            indexer_types=["full"] * 6,
            layer_types=["indexed_attention"] * 6,
        ),
        [1, 2, 3],
        dict(indexer_types=["full"] * 3, layer_types=["indexed_attention"] * 3, first_k_dense_replace=1),
    ),
    "older names of layer types": (
        config("deepseek_v32", **_DSA, n_group=1, topk_group=1, layer_types=["deepseek_sparse_attention"] * 6),
        [1, 2, 3],
        dict(layer_types=["deepseek_sparse_attention"] * 3, first_k_dense_replace=1),
    ),
    "attn_type_list": (
        config("minimax_m2", attn_type_list=[1] * 6, num_local_experts=8),
        [0, 2],
        dict(attn_type_list=[1, 1]),
    ),
    "numbers of dense layers": (
        config("qwen3_moe", mlp_only_layers=[1, 4], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        [0, 1, 3, 4],
        dict(mlp_only_layers=[1, 3], decoder_sparse_step=1),
    ),
    "in a nested config": (
        {"model_type": "mistral3", "text_config": config("mistral", layer_types=[_FULL] * 6, sliding_window=None)},
        [0, 2],
        {"text_config": config("mistral", layer_types=[_FULL] * 2, sliding_window=None, num_hidden_layers=2)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_settings_follow_their_layers(name):
    given, kept, changes = CASES[name]
    family = family_of(given)
    arch, pruned = family.architecture(given), family.prune_config(given, kept)
    changes = changes if "text_config" in changes else {"num_hidden_layers": len(kept)} | changes
    expected = given | changes
    assert pruned == {key: expected[key] for key in expected if changes.get(key, 0) is not None}
    # what the pruned config describes is the model of the kept layers
    assert family.architecture(pruned) == arch.pruned(kept)


@pytest.mark.parametrize(
    "given, said",
    [
        (config("smollm3", no_rope_layers=[1, 0]), "names 2 layers, but the model has 6"),
        (config("ministral", layer_types=[_FULL, "chunked_attention"] * 3), "names 'chunked_attention'"),
        (config("ministral", layer_types=[_SLIDING] * 6, sliding_window=None), "but sliding_window is null"),
        (config("mistral", layer_types=[_FULL, _SLIDING] * 3, sliding_window=8), "contradicts sliding_window 8"),
        (config("minimax_m2", attn_type_list=[0, 1] * 3, num_local_experts=8), "attn_type_list in config.json names 0"),
        (config("llama", layer_types=[_SLIDING] * 6), "sliding-window attention is not supported"),
        (config("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0 is not supported"),
        (config("minimax_m2", qk_norm_type="per_head"), "qk_norm_type 'per_head' is not supported"),
        (config("gpt_oss", num_local_experts=4, num_experts_per_tok=1), "num_experts_per_tok 1 can't be expressed"),
        (config("gpt_oss", num_local_experts=4, experts_per_token=2), "contradicts num_experts_per_tok 4"),
        (config("gpt_oss", num_local_experts=2), "num_experts_per_tok 4 is more than the 2 experts"),
        (config("PanguEmbedded", bias=True, attention_bias=False), "are one setting"),
        (config("PanguEmbedded"), "lacks the key 'bias'"),
        (config("phi3", partial_rotary_factor=0.35), "an even number"),
        (config("phi3", rope_scaling={"type": "longrope"}), "'longrope' is not supported"),
        (config("glm_moe_dsa", **_DSA, indexer_types=["full", "shared"] * 3), "names 'shared', which is not supported"),
        (config("glm_moe_dsa", **_DSA, index_topk_freq=2), "share the choice of an earlier indexer"),
        (config("glm_moe_dsa", **_DSA, index_topk_pattern="FFSFFS"), "share the choice of an earlier indexer"),
        (config("olmo3", rope_theta=1e4), "is ambiguous"),
        (config("kimi_k25"), "'text_config' in config.json is None"),
        (config("kimi_k25", text_config=config("llama")), "model_type 'llama' in text_config is not supported"),
        (config("ministral3"), "'rope_parameters' in config.json is None"),
    ],
)
def test_what_is_not_understood_is_refused(given, said):
    with pytest.raises(MegapruneError) as caught:
        family_of(given).architecture(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
