"""Grouped-query attention, RMSNorm, SwiGLU and RoPE: settings, weight rules and HF shapes of the GQA families."""

from typing import Any

from megaprune.models.rope import read_rope
from megaprune.models.settings import HFConfig, flag, layer_types, number, text, whole, whole_or_none
from megaprune.models.shards import COPY, QKV, ROW
from megaprune.models.tables import (
    ATTENTION,
    HF,
    MEGATRON,
    MLP_RULES,
    Architecture,
    AttentionKind,
    WeightRule,
    mlp_norm_rule,
    refuse_true,
)
from megaprune.utils.errors import MegapruneError


def _dimensions(arch: Architecture) -> dict[str, int]:
    query = arch.transformer["num_attention_heads"] * arch.head_dim
    return dict(query=query, key_value=arch.query_groups * arch.head_dim, attended=query, head=arch.head_dim)


GQA = AttentionKind(
    shapes={
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.k_proj.weight": ("key_value", "hidden"),
        "self_attn.v_proj.weight": ("key_value", "hidden"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.bias": ("key_value",),
        "self_attn.v_proj.bias": ("key_value",),
        "self_attn.q_norm.weight": ("head",),
        "self_attn.k_norm.weight": ("head",),
        "self_attn.o_proj.weight": ("hidden", "attended"),
    },
    dimensions=_dimensions,
)

GQA_RULES = (
    WeightRule(
        MEGATRON + "input_layernorm.weight",
        (HF + "input_layernorm.weight",),
        COPY,
        te=ATTENTION + "linear_qkv.layer_norm_weight",
    ),
    WeightRule(
        ATTENTION + "linear_qkv.weight",
        tuple(HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
        QKV,
    ),
    WeightRule(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), ROW),
)

DENSE_LAYER_RULES = GQA_RULES + (mlp_norm_rule("post_attention_layernorm", moe=False),) + MLP_RULES

QKV_BIAS_RULES = (
    WeightRule(ATTENTION + "linear_qkv.bias", tuple(HF + f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
)

QK_NORM_RULES = (
    WeightRule(ATTENTION + "q_layernorm.weight", (HF + "self_attn.q_norm.weight",), COPY),
    WeightRule(ATTENTION + "k_layernorm.weight", (HF + "self_attn.k_norm.weight",), COPY),
)


def gqa_architecture(
    config: HFConfig, max_positions: int, head_dim: int | None = None, groups: int | None = None, **transformer: Any
) -> Architecture:
    """The architecture of a model with grouped-query attention.

    Args:
        max_positions, head_dim, groups: transformers' defaults for what config.json may leave out; without one, the
            head dimension follows from the hidden size, and each attention head has a key-value head of its own.

    Raises:
        MegapruneError: the config asks for something that this can't express, or lacks a key.
    """
    name = config.get("model_type")
    text(config, "hidden_act", "silu", only="silu")
    for switch in ("mlp_bias", "use_mrope"):
        refuse_true(config, switch)
    num_layers = whole(config, "num_hidden_layers")
    sliding = {t for t in layer_types(config, num_layers) if t != "full_attention"}
    if flag(config, "use_sliding_window", False) or sliding:
        raise MegapruneError(f"{name}: sliding-window attention is not supported; set use_sliding_window to false")
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    query_groups = whole_or_none(config, "num_key_value_heads", groups) or heads
    if head_dim is not None:
        channels = whole(config, "head_dim", head_dim)
    else:
        channels = whole_or_none(config, "head_dim", None) or hidden // heads
    if heads % query_groups:
        raise MegapruneError(f"{name}: {heads} attention heads can't share {query_groups} key-value heads evenly")
    if channels % 2 or not channels:
        raise MegapruneError(f"{name}: RoPE needs an even head dimension, not {channels}")
    fields = dict(
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=query_groups,
        kv_channels=channels,
        layernorm_epsilon=number(config, "rms_norm_eps"),
    )
    positions = whole(config, "max_position_embeddings", max_positions)
    theta, scaling = read_rope(config, positions)
    return Architecture(
        transformer=fields | transformer,
        attention=GQA,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=theta,
        rope_scaling=scaling,
        tied=flag(config, "tie_word_embeddings", False),
    )
