"""Grouped-query attention, RMSNorm, gated MLPs and RoPE: settings, weight rules and HF shapes of the GQA families."""

from collections.abc import Sequence
from typing import Any

from megaprune.models.rope import partial_rotary, read_rope
from megaprune.models.settings import HFConfig, flag, number, text, whole, whole_or_none
from megaprune.models.shards import COLUMN, COPY, QKV, ROW
from megaprune.models.tables import (
    ATTENTION,
    HF,
    MEGATRON,
    MLP_BIAS_RULES,
    MLP_RULES,
    Architecture,
    AttentionKind,
    WeightRule,
    mlp_norm_rule,
    refuse_true,
)
from megaprune.utils.errors import MegapruneError


def _dimensions(arch: Architecture) -> dict[str, int]:
    query, key = arch.transformer["num_attention_heads"] * arch.head_dim, arch.query_groups * arch.head_dim
    whole_norm = arch.qk_norm_over_width
    return dict(
        query=query,
        key_value=key,
        query_key_value=query + 2 * key,
        attended=query,
        query_norm=query if whole_norm else arch.head_dim,
        key_norm=key if whole_norm else arch.head_dim,
        heads=arch.transformer["num_attention_heads"],
    )


GQA = AttentionKind(
    shapes={
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.k_proj.weight": ("key_value", "hidden"),
        "self_attn.v_proj.weight": ("key_value", "hidden"),
        "self_attn.qkv_proj.weight": ("query_key_value", "hidden"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.bias": ("key_value",),
        "self_attn.v_proj.bias": ("key_value",),
        "self_attn.q_norm.weight": ("query_norm",),
        "self_attn.k_norm.weight": ("key_norm",),
        "self_attn.o_proj.weight": ("hidden", "attended"),
        "self_attn.o_proj.bias": ("hidden",),
        "self_attn.sinks": ("heads",),
    },
    dimensions=_dimensions,
)

INPUT_NORM_RULES = (
    WeightRule(
        MEGATRON + "input_layernorm.weight",
        (HF + "input_layernorm.weight",),
        COPY,
        te=ATTENTION + "linear_qkv.layer_norm_weight",
    ),
)
_PROJECTION_RULES = (
    WeightRule(ATTENTION + "linear_qkv.weight", tuple(HF + f"self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    WeightRule(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), ROW),
)
_QKV_BIAS_RULES = (
    WeightRule(ATTENTION + "linear_qkv.bias", tuple(HF + f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
)
_OUTPUT_BIAS_RULES = (WeightRule(ATTENTION + "linear_proj.bias", (HF + "self_attn.o_proj.bias",), COPY),)
_SINK_RULES = (WeightRule(ATTENTION + "core_attention.softmax_offset", (HF + "self_attn.sinks",), COLUMN),)


def _qk_norm_rules(over_width: bool) -> tuple[WeightRule, ...]:
    kind = COLUMN if over_width else COPY  # a norm over all heads is cut with them
    return tuple(
        WeightRule(ATTENTION + f"{x}_layernorm.weight", (HF + f"self_attn.{x}_norm.weight",), kind) for x in "qk"
    )


def attention_rules(arch: Architecture) -> tuple[WeightRule, ...]:
    """Weights of one layer's attention, without the norm before it."""
    rules: tuple[WeightRule, ...] = _PROJECTION_RULES
    if arch.output_bias or arch.transformer.get("add_qkv_bias"):
        rules += _QKV_BIAS_RULES
    if arch.output_bias:
        rules += _OUTPUT_BIAS_RULES
    if arch.qk_norm_over_width or arch.transformer.get("qk_layernorm"):
        rules += _qk_norm_rules(arch.qk_norm_over_width)
    if arch.transformer.get("softmax_type") == "learnable":
        rules += _SINK_RULES
    return rules


def dense_layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    """Weights of one layer with a dense MLP and a norm before attention and MLP, as Llama names them."""
    norms = (*INPUT_NORM_RULES, mlp_norm_rule("post_attention_layernorm", moe=False))
    return norms + attention_rules(arch) + MLP_RULES + (MLP_BIAS_RULES if arch.mlp_bias else ())


def gqa_architecture(
    config: HFConfig,
    max_positions: int,
    head_dim: int | None = None,
    groups: int | None = None,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    activation: str | None = "hidden_act",
    also_about_rope: tuple[str, ...] = (),
    **transformer: Any,
) -> Architecture:
    """The architecture of a model with grouped-query attention.

    Args:
        max_positions, head_dim, groups, theta: transformers' defaults for what config.json may leave out; without one,
            the head dimension follows from the hidden size, and each attention head has a key-value head of its own.
        partial: the share of a head's dimensions that RoPE rotates if config.json does not say it; None for families
            that always rotate all.
        activation: the key of the activation, which must be SiLU; None if the family checks it.
        also_about_rope: keys about RoPE that the family itself reads.
        transformer: further keyword arguments of ``TransformerConfig``.

    Raises:
        MegapruneError: the config asks for something that this can't express, or lacks a key.
    """
    name = config.get("model_type")
    if activation is not None:
        text(config, activation, "silu", only="silu")
    refuse_true(config, "use_mrope")
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
        num_layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=query_groups,
        kv_channels=channels,
        layernorm_epsilon=number(config, "rms_norm_eps"),
    )
    positions = whole(config, "max_position_embeddings", max_positions)
    base, scaling = read_rope(config, positions, also_about_rope, theta, partial is not None)
    rotated = channels if partial is None else partial_rotary(config, channels, partial, scaling)
    return Architecture(
        transformer=fields | transformer,
        attention=GQA,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=base,
        rope_scaling=scaling,
        rotary_dim=None if rotated == channels else rotated,
        tied=flag(config, "tie_word_embeddings", False),
    )
