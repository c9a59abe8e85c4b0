"""Qwen3 dense models (``model_type: qwen3``): RMSNorm on the query and key heads."""

from megaprune.models.gqa import DENSE_LAYER_RULES, QK_NORM_RULES, gqa_architecture
from megaprune.models.tables import (
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    prune_dense_config,
    refuse_attention_bias,
)


def _architecture(config: HFConfig) -> Architecture:
    refuse_attention_bias(config)
    return gqa_architecture(config, max_positions=32768, head_dim=128, groups=32, qk_layernorm=True)


FAMILY = Family(
    model_type="qwen3",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=lambda arch, layer: DENSE_LAYER_RULES + QK_NORM_RULES,
    prune_config=prune_dense_config,
)
