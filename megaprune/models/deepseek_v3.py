"""DeepSeek-V3 and R1 (``model_type: deepseek_v3``), and Kimi-K2, which differs in name and numbers only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaprune.models.mla import EXPERT_BIAS_RULE, SHARED_EXPERT_RULES, mla_fields, mla_rules, sigmoid_router_fields
from megaprune.models.tables import (
    EXPERT_RULES,
    MLP_RULES,
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    mlp_norm_rule,
    prune_dense_prefix,
    require,
    rope_dict,
)
from megaprune.utils.errors import MegapruneError

# Megatron-Core scores a group by the sum of its best (topk // topk_group) experts, DeepSeek by that of its best two.
_SCORED_PER_GROUP = 2


def _architecture(config: HFConfig) -> Architecture:
    fields = mla_fields(config) | _rope_fields(config)
    fields |= sigmoid_router_fields(config, fields["num_layers"]) | _group_fields(config)
    name = config.get("model_type")
    if config.get("moe_layer_freq", 1) != 1:
        raise MegapruneError(f"{name}: moe_layer_freq {config['moe_layer_freq']} is not supported, only 1")
    if config.get("topk_method", "noaux_tc") != "noaux_tc":
        raise MegapruneError(f"{name}: topk_method {config['topk_method']!r} is not supported, only 'noaux_tc'")
    return Architecture(
        transformer=fields | dict(moe_router_enable_expert_bias=True),
        vocab_size=require(config, "vocab_size"),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        rotary_base=fields["rotary_base"],
        tied=bool(config.get("tie_word_embeddings", False)),
        mla=True,
    )


def _rope_fields(config: HFConfig) -> dict[str, Any]:
    rope, theta = rope_dict(config)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return dict(rope_type="rope", rotary_base=theta, rotary_scaling_factor=1.0, mscale_all_dim=0.0)
    if rope_type != "yarn":
        raise MegapruneError(f"{config.get('model_type')}: RoPE scaling {rope_type!r} is not supported, only 'yarn'")
    return dict(
        rope_type="yarn",
        rotary_base=theta,
        rotary_scaling_factor=rope["factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast", 32),
        beta_slow=rope.get("beta_slow", 1),
        mscale=rope.get("mscale", 1.0),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0),
    )


def _group_fields(config: HFConfig) -> dict[str, Any]:
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups == 1:
        return {}
    if require(config, "num_experts_per_tok") // chosen != _SCORED_PER_GROUP:
        raise MegapruneError(
            f"{config.get('model_type')}: num_experts_per_tok {config['num_experts_per_tok']} with topk_group {chosen} "
            f"can't be expressed: Megatron-Core scores a group as DeepSeek does only where their ratio is "
            f"{_SCORED_PER_GROUP}"
        )
    return dict(moe_router_num_groups=groups, moe_router_group_topk=chosen)


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    moe = arch.is_moe(layer)
    rules = mla_rules(arch) + (mlp_norm_rule("post_attention_layernorm", moe),)
    if not moe:
        return rules + MLP_RULES
    shared = SHARED_EXPERT_RULES if "moe_shared_expert_intermediate_size" in arch.transformer else ()
    return rules + EXPERT_RULES + (EXPERT_BIAS_RULE,) + shared


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    return prune_dense_prefix(config, kept, ("first_k_dense_replace",))


FAMILY = Family(
    model_type="deepseek_v3",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
    ignored=(r"rotary_emb\.inv_freq$",),
    mtp_keys=("num_nextn_predict_layers",),
)

KIMI_K2 = replace(FAMILY, model_type="kimi_k2", stacks_experts=False)
