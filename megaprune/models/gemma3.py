"""Gemma 3's text models (``model_type: gemma3_text``).

Norms precede and follow attention and MLP, and multiply by 1 + weight. The embedding is scaled, MLPs have GELU, and
five of six layers have a sliding window with a RoPE of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megaprune.models.gqa import INPUT_NORM_RULES, attention_rules, gqa_architecture
from megaprune.models.keys import edited
from megaprune.models.layer_settings import LayerRule, prune_layer_settings
from megaprune.models.rope import read_rope_by_type
from megaprune.models.settings import HFConfig, flag, number, text, whole
from megaprune.models.shards import COPY
from megaprune.models.tables import (
    HF,
    MEGATRON,
    MLP_RULES,
    MODEL_RULES,
    Architecture,
    Family,
    WeightRule,
    mlp_norm_rule,
    refuse_true,
)
from megaprune.models.windows import FULL, SLIDING, full_every, windows_by_type
from megaprune.utils.errors import MegapruneError

_POST_NORM_RULES = (
    WeightRule(MEGATRON + "post_attention_layernorm.weight", (HF + "post_attention_layernorm.weight",), COPY),
    WeightRule(MEGATRON + "post_mlp_layernorm.weight", (HF + "post_feedforward_layernorm.weight",), COPY),
)
_PATTERN = "sliding_window_pattern"


def _types(config: HFConfig) -> list[str]:
    return full_every(config.get(_PATTERN) or 6, config)


_RULE = LayerRule("layer_types", _types, (_PATTERN, f"_{_PATTERN}"))


def _architecture(config: HFConfig) -> Architecture:
    name = config.get("model_type")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if config.get(key) is not None:
            raise MegapruneError(f"{name}: {key} {config[key]!r} is not supported: Megatron-Core's layers have none")
    if config.get("use_bidirectional_attention") is not None:
        refuse_true(config, "use_bidirectional_attention")
    whole(config, _PATTERN, 6)
    text(config, "hidden_activation", "gelu_pytorch_tanh", only="gelu_pytorch_tanh")
    config.get("hidden_act")  # of Gemma 1; hidden_activation replaces it
    positions = whole(config, "max_position_embeddings", 131072)
    ropes = read_rope_by_type(
        config, positions, {FULL: 1e6, SLIDING: 1e4}, full=FULL, theta_keys={SLIDING: "rope_local_base_freq"}
    )
    without = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")
    arch = gqa_architecture(
        edited(config, {}, without),
        131072,
        head_dim=256,
        groups=4,
        activation=None,
        qk_layernorm=True,
        layernorm_zero_centered_gamma=True,
        **windows_by_type(config, _RULE),
    )
    scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
    theta, scaling = ropes[FULL]
    if scaling is not None and scaling.attention_factor != 1:
        raise MegapruneError(f"{name}: RoPE scaling {scaling.rope_type!r} is not supported in this family")
    return replace(
        arch,
        rotary_base=theta,
        rope_scaling=scaling,
        window_rope=ropes[SLIDING] if "window_size" in arch.transformer else None,
        tied=flag(config, "tie_word_embeddings", True),
        sandwich_norm=True,
        output_bias=flag(config, "attention_bias", False),
        gelu=True,
        embedding_factor=math.sqrt(whole(config, "hidden_size")),
        attention_scale=scale,
    )


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    norms = (*INPUT_NORM_RULES, mlp_norm_rule("pre_feedforward_layernorm", moe=False), *_POST_NORM_RULES)
    return norms + attention_rules(arch) + MLP_RULES


FAMILY = Family(
    model_type="gemma3_text",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=partial(prune_layer_settings, rules=(_RULE,)),
    tied_by_default=True,
)
