"""Qwen3 mixture-of-experts models (``model_type: qwen3_moe``): softmax routing, no shared experts."""

from collections.abc import Sequence

from megaprune.models.tables import (
    EXPERT_RULES,
    GQA_RULES,
    MLP_RULES,
    MODEL_RULES,
    QK_NORM_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    gqa_architecture,
    mlp_norm_rule,
    prune_dense_config,
    refuse_attention_bias,
    require,
)


def _architecture(config: HFConfig) -> Architecture:
    refuse_attention_bias(config)
    num_layers = require(config, "num_hidden_layers")
    return gqa_architecture(
        config,
        qk_layernorm=True,
        num_moe_experts=config.get("num_experts") or require(config, "num_local_experts"),
        moe_ffn_hidden_size=require(config, "moe_intermediate_size"),
        moe_router_topk=require(config, "num_experts_per_tok"),
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not config.get("norm_topk_prob", False),
        moe_layer_freq=[int(_is_moe(config, layer)) for layer in range(num_layers)],
    )


def _is_moe(config: HFConfig, layer: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    moe = arch.is_moe(layer)
    norm = mlp_norm_rule("post_attention_layernorm", moe)
    return GQA_RULES + QK_NORM_RULES + (norm,) + (EXPERT_RULES if moe else MLP_RULES)


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    """Dense layers are listed by their new numbers, since a step between MoE layers does not survive pruning."""
    pruned = prune_dense_config(config, kept)
    if config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) != 1:
        pruned["mlp_only_layers"] = [new for new, layer in enumerate(kept) if not _is_moe(config, layer)]
        pruned["decoder_sparse_step"] = 1
    return pruned


FAMILY = Family(
    model_type="qwen3_moe",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
)
