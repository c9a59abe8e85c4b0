"""DeepSeek-V3 and R1 (``model_type: deepseek_v3``), and Kimi-K2, which differs in name and numbers only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaprune.models.mla import (
    EXPERT_BIAS_RULE,
    MLA,
    SHARED_EXPERT_RULES,
    mla_fields,
    mla_rules,
    rope_fields,
    sigmoid_router_fields,
)
from megaprune.models.rope import read_rope
from megaprune.models.settings import flag, text, whole, whole_or_none
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
)
from megaprune.utils.errors import MegapruneError

# Megatron-Core scores a group by the sum of its best (topk // topk_group) experts, DeepSeek by that of its best two.
_SCORED_PER_GROUP = 2
# transformers' class and the makers' own code leave these norms at it, whatever rms_norm_eps is
_LATENT_NORM_EPSILON = 1e-6

# The router of every model of the family. transformers does not write these settings, and without them vLLM routes by
# softmax and without the biases of experts.
_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def _architecture(config: HFConfig) -> Architecture:
    name = config.get("model_type")
    fields = mla_fields(config)
    fields |= sigmoid_router_fields(config, fields["num_layers"]) | _group_fields(config)
    if whole(config, "moe_layer_freq", 1) != 1:
        raise MegapruneError(f"{name}: moe_layer_freq {config['moe_layer_freq']} is not supported, only 1")
    text(config, "topk_method", "noaux_tc", only="noaux_tc")
    if not flag(config, "rope_interleave", True):
        raise MegapruneError(
            f"{name}: rope_interleave false is not supported: Megatron-Core's latent attention rotates neighboring "
            "dimensions, as rope_interleave true does"
        )
    rope_dim = fields["qk_pos_emb_head_dim"]
    if whole_or_none(config, "head_dim", None) not in (None, rope_dim):
        raise MegapruneError(f"{name}: head_dim {config['head_dim']} is not qk_rope_head_dim {rope_dim}")
    positions = whole(config, "max_position_embeddings", 4096)
    theta, scaling = read_rope(config, positions, also_read=("rope_interleave",))
    return Architecture(
        transformer=fields | rope_fields(theta, scaling) | dict(moe_router_enable_expert_bias=True),
        attention=MLA,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=theta,
        rope_scaling=scaling,
        tied=flag(config, "tie_word_embeddings", False),
        latent_norm_epsilon=_LATENT_NORM_EPSILON,
    )


def _group_fields(config: HFConfig) -> dict[str, Any]:
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


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    moe = arch.is_moe(layer)
    rules = mla_rules(arch) + (mlp_norm_rule("post_attention_layernorm", moe),)
    if not moe:
        return rules + MLP_RULES
    shared = SHARED_EXPERT_RULES if "moe_shared_expert_intermediate_size" in arch.transformer else ()
    return rules + EXPERT_RULES + (EXPERT_BIAS_RULE,) + shared


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    pruned = prune_dense_prefix(config, kept, ("first_k_dense_replace",))
    return pruned | {name: value for name, value in _ROUTING.items() if name not in pruned}


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
