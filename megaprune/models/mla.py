"""Multi-head latent attention and sigmoid-routed experts: settings, weight rules and HF shapes of DeepSeek-V3 and its
relatives."""

from collections.abc import Sequence
from typing import Any

from megaprune.models.layer_settings import LayerRule, per_layer
from megaprune.models.rope import RopeScaling
from megaprune.models.settings import REQUIRED, flag, number, text, whole, whole_or_none, wrong
from megaprune.models.shards import COLUMN, COPY, ROW
from megaprune.models.tables import (
    ATTENTION,
    EXPERT_RULES,
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

# Megatron-Core scores a group by the sum of its best (topk // topk_group) experts, DeepSeek by that of its best two.
_SCORED_PER_GROUP = 2


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
        index_heads=arch.index_heads,
        index_head=arch.index_head_dim,
        index_query=arch.index_heads * arch.index_head_dim,
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
        # DeepSeek-V3.2's choice of the tokens to attend to
        "self_attn.indexer.wq_b.weight": ("index_query", "query_latent"),
        "self_attn.indexer.wk.weight": ("index_head", "hidden"),
        "self_attn.indexer.k_norm.weight": ("index_head",),
        "self_attn.indexer.k_norm.bias": ("index_head",),
        "self_attn.indexer.weights_proj.weight": ("index_heads", "hidden"),
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


def mla_fields(config: HFConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """Keyword arguments of ``MLATransformerConfig`` for the attention and the layers' sizes.

    Args:
        layer_type: what ``layer_types`` calls every layer, where it is present.

    Raises:
        MegapruneError: config.json lacks a key, or asks for something that can't be expressed.
    """
    text(config, "hidden_act", "silu", only="silu")
    refuse_attention_bias(config)
    num_layers, rope_dim = whole(config, "num_hidden_layers"), whole(config, "qk_rope_head_dim")
    per_layer(config, "layer_types", num_layers, (layer_type,))
    if rope_dim % 2:
        raise MegapruneError(f"{config.get('model_type')}: RoPE needs an even qk_rope_head_dim, not {rope_dim}")
    heads, content = whole(config, "num_attention_heads"), whole(config, "qk_nope_head_dim")
    # Both say what follows from other settings. Fewer key-value heads would share keys; more mean one for each head.
    key_value_heads = whole_or_none(config, "num_key_value_heads", None)
    if key_value_heads is not None and key_value_heads < heads:
        raise wrong(config, "num_key_value_heads", key_value_heads, f"{heads}, as in every model with latent attention")
    if whole_or_none(config, "qk_head_dim", None) not in (None, content + rope_dim):
        raise wrong(config, "qk_head_dim", config["qk_head_dim"], f"{content + rope_dim}, as its two parts are")
    return dict(
        multi_latent_attention=True,
        num_layers=num_layers,
        hidden_size=whole(config, "hidden_size"),
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=heads,
        layernorm_epsilon=number(config, "rms_norm_eps"),
        qk_layernorm=True,
        q_lora_rank=whole_or_none(config, "q_lora_rank"),
        kv_lora_rank=whole(config, "kv_lora_rank"),
        qk_head_dim=content,
        qk_pos_emb_head_dim=rope_dim,
        v_head_dim=whole(config, "v_head_dim"),
    )


def sigmoid_router_fields(config: HFConfig, moe_layers: Sequence[bool]) -> dict[str, Any]:
    """Keyword arguments for routed and shared experts.

    Args:
        moe_layers: for each layer, whether it has experts.

    Raises:
        MegapruneError: Megatron-Core's router can't express the config.
    """
    experts = whole(config, "n_routed_experts")
    expert_size = whole(config, "moe_intermediate_size")
    fields = dict(
        num_moe_experts=experts,
        moe_ffn_hidden_size=expert_size,
        moe_router_topk_scaling_factor=number(config, "routed_scaling_factor"),
        moe_layer_freq=[int(moe) for moe in moe_layers],
        **sigmoid_router(config, check_chosen(config, experts)),
    )
    if shared := whole_or_none(config, "n_shared_experts", None, least=0):
        fields["moe_shared_expert_intermediate_size"] = expert_size * shared
    return fields


def check_chosen(config: HFConfig, experts: int, default: Any = REQUIRED) -> int:
    """The number of experts that process a token (if the key is absent, `default`).

    Raises:
        MegapruneError: there are fewer.
    """
    chosen = whole(config, "num_experts_per_tok", default)
    if chosen > experts:
        raise MegapruneError(
            f"{config.get('model_type')}: num_experts_per_tok {chosen} is more than the {experts} routed experts"
        )
    return chosen


def sigmoid_router(config: HFConfig, chosen: int) -> dict[str, Any]:
    """Keyword arguments for a router with sigmoid scores, of which the chosen ones are normalized.

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
    if chosen == 1:
        raise MegapruneError(
            f"{name}: num_experts_per_tok 1 with sigmoid routing can't be expressed: Megatron-Core does not normalize "
            "the score of a single expert"
        )
    return dict(moe_router_topk=chosen, moe_router_score_function="sigmoid")


def after_dense_prefix(config: HFConfig, default: Any = REQUIRED) -> list[bool]:
    """For each layer, whether it has experts, by ``first_k_dense_replace`` (if it is absent, `default`)."""
    num_layers, dense = whole(config, "num_hidden_layers"), whole(config, "first_k_dense_replace", default, least=0)
    return [layer >= dense for layer in range(num_layers)]


def moe_layers_by_type(config: HFConfig, rule: LayerRule) -> list[bool]:
    """For each layer, whether it has experts, by ``mlp_layer_types`` or else by the rule.

    Raises:
        MegapruneError: the list is wrong, or ``first_k_dense_replace`` contradicts it.
    """
    num_layers = whole(config, "num_hidden_layers")
    types = per_layer(config, "mlp_layer_types", num_layers, ("dense", "sparse")) or rule.entries(config)
    moe, dense = [kind == "sparse" for kind in types], whole_or_none(config, "first_k_dense_replace", None, least=0)
    if dense is not None and moe != [layer >= dense for layer in range(num_layers)]:
        raise MegapruneError(
            f"{config.get('model_type')}: 'first_k_dense_replace' in config.json is {dense}, but readers of the config "
            f"take {moe.count(False)} layers as dense (mlp_layer_types): correct one of them"
        )
    return moe


def group_fields(config: HFConfig) -> dict[str, Any]:
    """Keyword arguments for the choice of experts within groups of them.

    Raises:
        MegapruneError: the groups don't fit the experts, or can't be expressed.
    """
    name, experts, per_token = config.get("model_type"), config["n_routed_experts"], config["num_experts_per_tok"]
    groups, chosen = whole(config, "n_group"), whole(config, "topk_group")
    size = experts // groups
    if chosen > groups or experts % groups or size < _SCORED_PER_GROUP or per_token > size * chosen:
        raise MegapruneError(
            f"{name}: n_group {groups} and topk_group {chosen} don't fit {experts} experts with {per_token} a token"
        )
    if groups == chosen:  # no group is left out
        return {}
    if per_token // chosen != _SCORED_PER_GROUP:
        raise MegapruneError(
            f"{name}: num_experts_per_tok {per_token} with topk_group {chosen} "
            f"can't be expressed: Megatron-Core scores a group as DeepSeek does only where their ratio is "
            f"{_SCORED_PER_GROUP}"
        )
    return dict(moe_router_num_groups=groups, moe_router_group_topk=chosen)


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


def mlp_or_expert_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    """The MLP of a layer: dense, or experts with a sigmoid router, and shared ones if the model has any."""
    if not arch.is_moe(layer):
        return MLP_RULES
    shared = SHARED_EXPERT_RULES if "moe_shared_expert_intermediate_size" in arch.transformer else ()
    return (*EXPERT_RULES, EXPERT_BIAS_RULE, *shared)
