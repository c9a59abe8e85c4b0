"""openPangu-Ultra-MoE (``model_type: pangu_ultra_moe``): DeepSeek's shape with sandwich norms and a plain router.

Its config.json comes in two spellings, the remote code's and vLLM's. Both are read; a pruned config carries both.
"""

from collections.abc import Sequence

from megaprune.models.mla import EXPERT_BIAS_RULE, SHARED_EXPERT_RULES, mla_fields, mla_rules, sigmoid_router_fields
from megaprune.models.tables import (
    EXPERT_RULES,
    HF,
    MEGATRON,
    MLP_RULES,
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    Shard,
    WeightRule,
    mlp_norm_rule,
    prune_dense_prefix,
    require,
)

# the remote code's spelling to vLLM's
_SPELLINGS = {
    "attention_q_lora_dim": "q_lora_rank",
    "attention_kv_lora_dim": "kv_lora_rank",
    "attention_qk_dim": "qk_nope_head_dim",
    "attention_qk_rope_dim": "qk_rope_head_dim",
    "attention_v_dim": "v_head_dim",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_dense_layers": "first_k_dense_replace",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# `post_attention_layernorm` stands behind attention here, not before the MLP as in LLaMA.
_SANDWICH_RULES = tuple(
    WeightRule(MEGATRON + f"{name}.weight", (HF + f"{name}.weight",), Shard.COPY)
    for name in ("post_attention_layernorm", "post_mlp_layernorm")
)


def _both_spellings(config: HFConfig) -> HFConfig:
    """The config with each setting under both names."""
    full = dict(config)
    for ours, theirs in _SPELLINGS.items():
        if ours in config:
            full.setdefault(theirs, config[ours])
        elif theirs in config:
            full[ours] = config[theirs]
    return full


def _architecture(config: HFConfig) -> Architecture:
    config = _both_spellings(config)
    fields = mla_fields(config)
    fields |= sigmoid_router_fields(config, fields["num_layers"])
    theta = float(config.get("rope_theta", 1e4))
    fields |= dict(rope_type="rope", rotary_base=theta, rotary_scaling_factor=1.0, mscale_all_dim=0.0)
    if config.get("router_enable_expert_bias"):
        fields["moe_router_enable_expert_bias"] = True
    return Architecture(
        transformer=fields,
        vocab_size=require(config, "vocab_size"),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        rotary_base=theta,
        tied=bool(config.get("tie_word_embeddings", False)),
        mla=True,
        sandwich_norm=bool(config.get("sandwich_norm", True)),
    )


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    moe = arch.is_moe(layer)
    if arch.sandwich_norm:
        # no fusing: the norm before the MLP keeps its own place in the sandwich layer
        rules = mla_rules(arch) + _SANDWICH_RULES + (mlp_norm_rule("pre_mlp_layernorm", moe),)
    else:
        rules = mla_rules(arch) + (mlp_norm_rule("post_attention_layernorm", moe),)
    if not moe:
        return rules + MLP_RULES
    bias = (EXPERT_BIAS_RULE,) if arch.transformer.get("moe_router_enable_expert_bias") else ()
    shared = SHARED_EXPERT_RULES if "moe_shared_expert_intermediate_size" in arch.transformer else ()
    return rules + EXPERT_RULES + bias + shared


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    return prune_dense_prefix(_both_spellings(config), kept, ("num_dense_layers", "first_k_dense_replace"))


FAMILY = Family(
    model_type="pangu_ultra_moe",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
    ignored=(r"rotary_emb\.inv_freq$",),
    mtp_keys=("num_mtp_layers", "num_nextn_predict_layers"),
    stacks_experts=False,
)
