"""Qwen3 dense models (``model_type: qwen3``): RMSNorm on the query and key heads."""

from megaprune.errors import MegapruneError
from megaprune.models.tables import (
    GQA_LAYER_RULES,
    MODEL_RULES,
    QK_NORM_RULES,
    Architecture,
    Family,
    HFConfig,
    gqa_architecture,
    prune_dense_config,
)


def _architecture(config: HFConfig) -> Architecture:
    if config.get("attention_bias"):
        raise MegapruneError("qwen3: attention_bias true is not supported")
    return gqa_architecture(config, qk_layernorm=True)


FAMILY = Family(
    model_type="qwen3",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=GQA_LAYER_RULES + QK_NORM_RULES,
    prune_config=prune_dense_config,
)
