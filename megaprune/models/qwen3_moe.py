"""Qwen3 mixture-of-experts models (``model_type: qwen3_moe``): softmax routing, no shared experts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaprune.models.gqa import INPUT_NORM_RULES, attention_rules, gqa_architecture
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.settings import flag, text, whole, whole_list
from megaprune.models.tables import (
    EXPERT_RULES,
    MLP_RULES,
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    mlp_norm_rule,
)
from megaprune.models.windows import windows_if_used
from megaprune.utils.errors import MegapruneError


def _architecture(config: HFConfig) -> Architecture:
    num_layers = whole(config, "num_hidden_layers")
    arch = gqa_architecture(
        config,
        max_positions=32768,
        groups=4,
        qk_layernorm=True,
        moe_ffn_hidden_size=whole(config, "moe_intermediate_size"),
        moe_layer_freq=[int(_is_moe(config, layer)) for layer in range(num_layers)],
        **_router_fields(config),
        **windows_if_used(config),
    )
    return replace(arch, output_bias=flag(config, "attention_bias", False))


def _router_fields(config: HFConfig) -> dict[str, Any]:
    name = config.get("model_type")
    # transformers 5 writes the second name
    experts = whole(config, "num_experts" if "num_experts" in config else "num_local_experts")
    chosen, normalized = whole(config, "num_experts_per_tok"), flag(config, "norm_topk_prob", False)
    if chosen > experts:
        raise MegapruneError(f"{name}: num_experts_per_tok {chosen} is more than the {experts} experts")
    if chosen == 1 and normalized:
        raise MegapruneError(
            f"{name}: norm_topk_prob true with num_experts_per_tok 1 can't be expressed: Megatron-Core does not "
            "normalize the score of a single expert"
        )
    text(config, "scoring_func", "softmax", only="softmax")
    return dict(
        num_moe_experts=experts,
        moe_router_topk=chosen,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not normalized,
    )


def _is_moe(config: HFConfig, layer: int) -> bool:
    step = whole(config, "decoder_sparse_step", 1)
    return layer not in whole_list(config, "mlp_only_layers") and (layer + 1) % step == 0


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    moe = arch.is_moe(layer)
    norms = (*INPUT_NORM_RULES, mlp_norm_rule("post_attention_layernorm", moe))
    return norms + attention_rules(arch) + (EXPERT_RULES if moe else MLP_RULES)


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    """Return the pruned config. Dense layers are listed by their new numbers, because a regular step is not kept."""
    pruned = prune_layer_settings(config, kept)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        pruned["mlp_only_layers"] = [new for new, layer in enumerate(kept) if not _is_moe(config, layer)]
        pruned["decoder_sparse_step"] = 1
    return pruned


FAMILY = Family(
    model_type="qwen3_moe",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
)
