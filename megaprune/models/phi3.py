"""Phi-3 and Phi-4 (``model_type: phi3``): query, key and value in one tensor, gate and up in another."""

from collections.abc import Sequence

from megaprune.models.gqa import INPUT_NORM_RULES, gqa_architecture
from megaprune.models.settings import HFConfig, whole_or_none
from megaprune.models.shards import FUSED_GATED, FUSED_QKV, ROW
from megaprune.models.tables import (
    ATTENTION,
    HF,
    MEGATRON,
    MODEL_RULES,
    Architecture,
    Family,
    WeightRule,
    mlp_norm_rule,
    refuse_true,
)
from megaprune.models.windows import windows_everywhere

_LAYER_RULES = (
    *INPUT_NORM_RULES,
    WeightRule(ATTENTION + "linear_qkv.weight", (HF + "self_attn.qkv_proj.weight",), FUSED_QKV),
    WeightRule(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), ROW),
    mlp_norm_rule("post_attention_layernorm", moe=False),
    WeightRule(MEGATRON + "mlp.linear_fc1.weight", (HF + "mlp.gate_up_proj.weight",), FUSED_GATED),
    WeightRule(MEGATRON + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), ROW),
)


def _architecture(config: HFConfig) -> Architecture:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        refuse_true(config, key)
    # of longrope, which is refused; it changes nothing without
    whole_or_none(config, "original_max_position_embeddings", None)
    return gqa_architecture(config, max_positions=4096, partial=1.0, **windows_everywhere(config, default=None))


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    return _LAYER_RULES


FAMILY = Family(
    model_type="phi3",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
)
