"""openPangu-Ultra-MoE (``model_type: pangu_ultra_moe``): DeepSeek's shape with sandwich norms and a plain router.

Its config.json comes in two spellings, the remote code's and vLLM's. Both are read; a pruned config carries both.
"""

from collections.abc import Sequence

from megaprune.models.keys import edited
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.mla import (
    MLA,
    SHARED_EXPERT_RULES,
    after_dense_prefix,
    mla_fields,
    mla_rules,
    rope_fields,
    sigmoid_router_fields,
)
from megaprune.models.rope import read_rope
from megaprune.models.settings import flag, whole, whole_or_none
from megaprune.models.shards import COPY
from megaprune.models.tables import (
    EXPERT_RULES,
    HF,
    MEGATRON,
    MLP_RULES,
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    mlp_norm_rule,
)
from megaprune.utils.errors import MegapruneError

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

# `post_attention_layernorm` follows attention here and is not before the MLP as in LLaMA.
_SANDWICH_RULES = tuple(
    WeightRule(MEGATRON + f"{name}.weight", (HF + f"{name}.weight",), COPY)
    for name in ("post_attention_layernorm", "post_mlp_layernorm")
)

# beside the gate, not within it as in DeepSeek's checkpoints
_EXPERT_BIAS_RULE = WeightRule(MEGATRON + "mlp.router.expert_bias", (HF + "mlp.e_score_correction_bias",), COPY)


def _both_spellings(config: HFConfig) -> HFConfig:
    """Return the config with each setting under both names.

    Raises:
        MegapruneError: the two names of a setting hold different values.
    """
    full: HFConfig = {}
    for ours, theirs in _SPELLINGS.items():
        if ours in config and theirs in config and config[ours] != config[theirs]:
            raise MegapruneError(
                f"{config.get('model_type')}: {ours!r} and {theirs!r} in config.json are one setting, but hold "
                f"{config[ours]!r} and {config[theirs]!r}"
            )
        if ours in config:
            full[theirs] = config[ours]
        elif theirs in config:
            full[ours] = config[theirs]
    return edited(config, full)


def _architecture(config: HFConfig) -> Architecture:
    name, config = config.get("model_type"), _both_spellings(config)
    fields = mla_fields(config)
    fields |= sigmoid_router_fields(config, after_dense_prefix(config))
    if sinks := whole(config, "param_sink_number", 0, least=0):
        raise MegapruneError(f"{name}: param_sink_number {sinks} is not supported: attention has no sinks here, only 0")
    if (groups := whole_or_none(config, "n_group", 1)) not in (None, 1):
        raise MegapruneError(f"{name}: n_group {groups} is not supported: this family's router has no groups, only 1")
    positions = whole(config, "max_position_embeddings")
    theta, scaling = read_rope(config, positions, theta=None)
    if scaling is not None:
        raise MegapruneError(
            f"{name}: RoPE scaling {scaling.rope_type!r} is not supported: the model's own code has none"
        )
    if flag(config, "router_enable_expert_bias", False):
        fields["moe_router_enable_expert_bias"] = True
    return Architecture(
        transformer=fields | rope_fields(theta, None),
        attention=MLA,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=theta,
        tied=flag(config, "tie_word_embeddings", False),
        sandwich_norm=flag(config, "sandwich_norm", False),
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
    bias = (_EXPERT_BIAS_RULE,) if arch.transformer.get("moe_router_enable_expert_bias") else ()
    shared = SHARED_EXPERT_RULES if "moe_shared_expert_intermediate_size" in arch.transformer else ()
    return rules + EXPERT_RULES + bias + shared


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    prefixes = ("num_dense_layers", "first_k_dense_replace")
    return prune_layer_settings(dict(_both_spellings(config)), kept, prefixes=prefixes)


FAMILY = Family(
    model_type="pangu_ultra_moe",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
    ignored=(r"rotary_emb\.inv_freq$",),
    mtp_keys=("num_mtp_layers", "num_nextn_predict_layers"),
    stacks_experts=False,
)
