"""Multi-head latent attention and sigmoid-routed experts: settings, weight rules and HF shapes of DeepSeek-V3 and its
relatives."""

from typing import Any

from megaprune.models.rope import RopeScaling
from megaprune.models.settings import flag, layer_types, number, text, whole, whole_or_none
from megaprune.models.shards import COLUMN, COPY, ROW
from megaprune.models.tables import (
    ATTENTION,
    HF,
    MEGATRON,
    MLP_RULES,
    Architecture,
    AttentionKind,
    HFConfig,
    WeightRule,
    refuse_attention_bias,
)
from megaprune.utils.errors import MegapruneError


def _dimensions(arch: Architecture) -> dict[str, int]:
    fields, heads = arch.transformer, arch.transformer["num_attention_heads"]
    content, rope, value = fields["qk_head_dim"], fields["qk_pos_emb_head_dim"], fields["v_head_dim"]
    return dict(
        query=heads * (content + rope),
        key_value=heads * (content + value),
        attended=heads * value,
        query_latent=fields["q_lora_rank"],
        latent=fields["kv_lora_rank"],
        latent_and_rope=fields["kv_lora_rank"] + rope,
    )


MLA = AttentionKind(
    shapes={
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.q_a_proj.weight": ("query_latent", "hidden"),
        "self_attn.q_a_layernorm.weight": ("query_latent",),
        "self_attn.q_b_proj.weight": ("query", "query_latent"),
        "self_attn.kv_a_proj_with_mqa.weight": ("latent_and_rope", "hidden"),
        "self_attn.kv_a_layernorm.weight": ("latent",),
        "self_attn.kv_b_proj.weight": ("key_value", "latent"),
        "self_attn.o_proj.weight": ("hidden", "attended"),
    },
    dimensions=_dimensions,
)


def _down_projection(name: str, hf_name: str) -> WeightRule:
    # The local layer spec cuts the down-projections; Transformer Engine's holds a copy on every rank.
    return WeightRule(ATTENTION + name + ".weight", (HF + f"self_attn.{hf_name}.weight",), COLUMN, te_shard=COPY)


def _latent_norm(name: str, behind: str, hf_name: str) -> WeightRule:
    return WeightRule(
        ATTENTION + name + ".weight",
        (HF + f"self_attn.{hf_name}.weight",),
        COPY,
        te=ATTENTION + behind + ".layer_norm_weight",
    )


def _up_projection(name: str, hf_name: str) -> WeightRule:
    return WeightRule(ATTENTION + name + ".weight", (HF + f"self_attn.{hf_name}.weight",), COLUMN)


_QUERY_LORA_RULES = (
    _down_projection("linear_q_down_proj", "q_a_proj"),
    _latent_norm("q_layernorm", "linear_q_up_proj", "q_a_layernorm"),
    _up_projection("linear_q_up_proj", "q_b_proj"),
)
_QUERY_RULES = (_up_projection("linear_q_proj", "q_proj"),)
_LATENT_RULES = (
    WeightRule(MEGATRON + "input_layernorm.weight", (HF + "input_layernorm.weight",), COPY),
    _down_projection("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    _latent_norm("kv_layernorm", "linear_kv_up_proj", "kv_a_layernorm"),
    _up_projection("linear_kv_up_proj", "kv_b_proj"),
    WeightRule(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), ROW),
)

EXPERT_BIAS_RULE = WeightRule(MEGATRON + "mlp.router.expert_bias", (HF + "mlp.gate.e_score_correction_bias",), COPY)
SHARED_EXPERT_RULES = tuple(
    WeightRule(
        rule.megatron.replace("mlp.", "mlp.shared_experts."),
        tuple(name.replace("mlp.", "mlp.shared_experts.") for name in rule.hf),
        rule.shard,
    )
    for rule in MLP_RULES
)


def mla_rules(arch: Architecture) -> tuple[WeightRule, ...]:
    """Weights of one layer's attention; small relatives project the query without a latent."""
    return (_QUERY_LORA_RULES if arch.transformer["q_lora_rank"] else _QUERY_RULES) + _LATENT_RULES


def mla_fields(config: HFConfig) -> dict[str, Any]:
    """Keyword arguments of ``MLATransformerConfig`` for the attention and the layers' sizes.

    Raises:
        MegapruneError: config.json lacks a key, or asks for something that can't be expressed.
    """
    text(config, "hidden_act", "silu", only="silu")
    refuse_attention_bias(config)
    num_layers, rope_dim = whole(config, "num_hidden_layers"), whole(config, "qk_rope_head_dim")
    layer_types(config, num_layers)
    if rope_dim % 2:
        raise MegapruneError(f"{config.get('model_type')}: RoPE needs an even qk_rope_head_dim, not {rope_dim}")
    return dict(
        multi_latent_attention=True,
        num_layers=num_layers,
        hidden_size=whole(config, "hidden_size"),
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=whole(config, "num_attention_heads"),
        layernorm_epsilon=number(config, "rms_norm_eps"),
        qk_layernorm=True,
        q_lora_rank=whole_or_none(config, "q_lora_rank"),
        kv_lora_rank=whole(config, "kv_lora_rank"),
        qk_head_dim=whole(config, "qk_nope_head_dim"),
        qk_pos_emb_head_dim=rope_dim,
        v_head_dim=whole(config, "v_head_dim"),
    )


def sigmoid_router_fields(config: HFConfig, num_layers: int) -> dict[str, Any]:
    """Keyword arguments for routed and shared experts behind a dense prefix.

    Raises:
        MegapruneError: Megatron-Core's router can't express the config.
    """
    name = config.get("model_type")
    text(config, "scoring_func", "sigmoid", only="sigmoid")
    if not flag(config, "norm_topk_prob", True):
        raise MegapruneError(
            f"{name}: norm_topk_prob false with sigmoid routing can't be expressed: Megatron-Core always normalizes "
            "the chosen scores"
        )
    experts, chosen = whole(config, "n_routed_experts"), whole(config, "num_experts_per_tok")
    if chosen > experts:
        raise MegapruneError(f"{name}: num_experts_per_tok {chosen} is more than the {experts} routed experts")
    if chosen == 1:
        raise MegapruneError(
            f"{name}: num_experts_per_tok 1 with sigmoid routing can't be expressed: Megatron-Core does not normalize "
            "the score of a single expert"
        )
    dense = min(whole(config, "first_k_dense_replace", least=0), num_layers)
    expert_size = whole(config, "moe_intermediate_size")
    fields = dict(
        num_moe_experts=experts,
        moe_ffn_hidden_size=expert_size,
        moe_router_topk=chosen,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=number(config, "routed_scaling_factor"),
        moe_layer_freq=[0] * dense + [1] * (num_layers - dense),
    )
    if shared := whole_or_none(config, "n_shared_experts", None, least=0):
        fields["moe_shared_expert_intermediate_size"] = expert_size * shared
    return fields


def rope_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Keyword arguments of ``MLATransformerConfig`` for RoPE. The softmax's scale follows from the factor and
    ``mscale_all_dim``; the frequencies of a scaled RoPE are set on the built model."""
    if scaling is None or scaling.rope_type != "yarn":
        return dict(rope_type="rope", rotary_base=theta, rotary_scaling_factor=1.0, mscale_all_dim=0.0)
    return dict(
        rope_type="yarn",
        rotary_base=theta,
        rotary_scaling_factor=scaling.factor,
        mscale_all_dim=scaling.mscale_all_dim,
    )
