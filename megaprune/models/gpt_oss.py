"""GPT-OSS (``model_type: gpt_oss``).

Each head has an attention sink, every second layer a sliding window. Projections, routers and experts have biases, and
the experts' activation is clamped. The tables name each expert's part of the stored stacks, in which matrices are
[in, out] and columns of gate and up alternate.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megaprune.models.gqa import INPUT_NORM_RULES, attention_rules, gqa_architecture
from megaprune.models.keys import edited
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.settings import HFConfig, flag, number, whole
from megaprune.models.shards import ALTERNATING, COPY, TRANSPOSED_ROW, ShardKind
from megaprune.models.tables import HF, MEGATRON, MODEL_RULES, Architecture, Family, WeightRule, mlp_norm_rule
from megaprune.models.windows import EVERY_SECOND_FULL, windows_by_type
from megaprune.utils.errors import MegapruneError

# transformers' defaults
_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)
_THETA, _SIGMOID_FACTOR, _LIMIT, _WINDOW = 150000.0, 1.702, 7.0, 128


def _expert_rule(layer: str, kind: str, name: str, shard: ShardKind) -> WeightRule:
    return WeightRule(
        MEGATRON + f"mlp.experts.local_experts.{{expert}}.{layer}.{kind}",
        (HF + f"mlp.experts.{{expert}}.{name}",),
        shard,
        te=MEGATRON + f"mlp.experts.{layer}.{kind}{{expert}}",
        expert=True,
    )


_MOE_RULES = (
    *(WeightRule(MEGATRON + f"mlp.router.{x}", (HF + f"mlp.router.{x}",), COPY) for x in ("weight", "bias")),
    _expert_rule("linear_fc1", "weight", "gate_up_proj", ALTERNATING),
    _expert_rule("linear_fc1", "bias", "gate_up_proj_bias", ALTERNATING),
    _expert_rule("linear_fc2", "weight", "down_proj", TRANSPOSED_ROW),
    _expert_rule("linear_fc2", "bias", "down_proj_bias", COPY),
)


def _architecture(config: HFConfig) -> Architecture:
    config.get("initial_context_length")  # other code's name of a setting of RoPE
    if config.get("rope_parameters") is None and not config.get("rope_scaling"):
        config = edited(config, {"rope_parameters": _ROPE})
    arch = gqa_architecture(
        config,
        131072,
        head_dim=64,
        groups=8,
        theta=_THETA,
        moe_ffn_hidden_size=whole(config, "intermediate_size"),
        moe_layer_freq=[1] * whole(config, "num_hidden_layers"),
        softmax_type="learnable",
        glu_linear_offset=1.0,
        activation_func_clamp_value=float(number(config, "swiglu_limit", _LIMIT)),
        **_router_fields(config),
        **windows_by_type(config, EVERY_SECOND_FULL, default=_WINDOW),
    )
    return replace(
        arch,
        output_bias=flag(config, "attention_bias", True),
        mlp_bias=True,
        sigmoid_factor=float(number(config, "swiglu_alpha", _SIGMOID_FACTOR)),
    )


def _router_fields(config: HFConfig) -> dict[str, Any]:
    name = config.get("model_type")
    # transformers accepts the second name
    experts = whole(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    chosen = whole(config, "num_experts_per_tok", 4)
    if config.get("experts_per_token", chosen) != chosen:
        raise MegapruneError(
            f"{name}: experts_per_token {config['experts_per_token']!r} contradicts num_experts_per_tok {chosen}, "
            "which transformers reads"
        )
    if chosen > experts:
        raise MegapruneError(f"{name}: num_experts_per_tok {chosen} is more than the {experts} experts")
    if chosen == 1:
        raise MegapruneError(
            f"{name}: num_experts_per_tok 1 can't be expressed: Megatron-Core does not normalize the score of a single "
            "expert"
        )
    return dict(
        num_moe_experts=experts,
        moe_router_topk=chosen,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,
    )


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    norms = (*INPUT_NORM_RULES, mlp_norm_rule("post_attention_layernorm", moe=True))
    return norms + attention_rules(arch) + _MOE_RULES


FAMILY = Family(
    model_type="gpt_oss",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=partial(prune_layer_settings, rules=(EVERY_SECOND_FULL,)),
    stacks_whole_experts=True,
)
