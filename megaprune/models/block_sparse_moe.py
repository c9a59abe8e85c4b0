"""Mixtral (``mixtral``) and MiniMax-M2 (``minimax_m2``): every layer has experts, named ``block_sparse_moe``.

MiniMax-M2 normalizes query and key over all heads together, rotates a part of each head, and routes by sigmoid.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaprune.models.gqa import INPUT_NORM_RULES, attention_rules, gqa_architecture
from megaprune.models.keys import edited
from megaprune.models.layer_settings import per_layer
from megaprune.models.mla import check_chosen, sigmoid_router
from megaprune.models.settings import HFConfig, whole, whole_or_none
from megaprune.models.shards import COPY
from megaprune.models.tables import (
    HF,
    MEGATRON,
    MODEL_RULES,
    Architecture,
    Family,
    WeightRule,
    expert_rules,
    mlp_norm_rule,
)
from megaprune.models.windows import no_windows, windows_everywhere
from megaprune.utils.errors import MegapruneError

_BLOCK = "block_sparse_moe"
_RULES = (*expert_rules(_BLOCK, "w1", "w3", "w2"), mlp_norm_rule("post_attention_layernorm", moe=True))
_EXPERT_BIAS_RULE = WeightRule(MEGATRON + "mlp.router.expert_bias", (HF + f"{_BLOCK}.e_score_correction_bias",), COPY)
# Settings of MiniMax's earlier models, which have one value each in every released M2.
_FIXED: dict[str, Any] = {
    "qk_norm_type": "per_layer",
    "use_qk_norm": True,
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
}
# Read by no code of the model: of layers that are not released, of shared experts of size 0, and of dense MLPs.
_UNUSED = ("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "shared_moe_mode", "mlp_intermediate_size")


def _expert_fields(config: HFConfig, default: int) -> dict[str, Any]:
    experts = whole(config, "num_local_experts", default)
    return dict(
        num_moe_experts=experts,
        moe_ffn_hidden_size=whole(config, "intermediate_size"),
        moe_layer_freq=[1] * whole(config, "num_hidden_layers"),
    )


def _mixtral(config: HFConfig) -> Architecture:
    fields = _expert_fields(config, default=8)
    chosen = check_chosen(config, fields["num_moe_experts"], default=2)
    router: dict[str, Any] = dict(
        moe_router_topk=chosen, moe_router_score_function="softmax", moe_router_pre_softmax=False
    )
    windows = windows_everywhere(config, default=None)
    return gqa_architecture(config, max_positions=131072, groups=8, theta=1000000.0, **fields, **router, **windows)


def _minimax_m2(config: HFConfig) -> Architecture:
    name = config.get("model_type")
    for key, value in _FIXED.items():
        if key in config and config[key] != value:
            raise MegapruneError(f"{name}: {key} {config[key]!r} is not supported, only {value!r}")
    for key in _UNUSED:
        config.get(key)
    per_layer(config, "attn_type_list", whole(config, "num_hidden_layers"), (1,))
    whole_or_none(config, "sliding_window", None)  # transformers and the makers' own code read none
    fields = _expert_fields(config, default=256)
    router = sigmoid_router(config, check_chosen(config, fields["num_moe_experts"], default=8))
    head_dim, rotated = whole(config, "head_dim", 128), whole_or_none(config, "rotary_dim", None)
    rope = edited(config, {} if rotated is None else {"partial_rotary_factor": rotated / head_dim}, ("rotary_dim",))
    arch = gqa_architecture(
        rope,
        max_positions=196608,
        head_dim=128,
        groups=8,
        theta=5000000.0,
        partial=1.0,
        moe_router_enable_expert_bias=True,
        **fields,
        **router,
        **no_windows(config),
    )
    return replace(arch, qk_norm_over_width=True)


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    bias = (_EXPERT_BIAS_RULE,) if arch.transformer.get("moe_router_enable_expert_bias") else ()
    return INPUT_NORM_RULES + attention_rules(arch) + _RULES + bias


FAMILIES: Sequence[Family] = tuple(
    Family(
        model_type=name,
        describe=describe,
        model_rules=MODEL_RULES,
        layer_rules=_layer_rules,
        modules_in_transformers=((rf"\b{_BLOCK}\.", "mlp."),),
    )
    for name, describe in (("mixtral", _mixtral), ("minimax_m2", _minimax_m2))
)
