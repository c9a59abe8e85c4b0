"""Qwen2 and Qwen2.5 dense models (``model_type: qwen2``): bias on query, key and value; small ones tie embeddings."""

from megaprune.models.gqa import DENSE_LAYER_RULES, QKV_BIAS_RULES, gqa_architecture
from megaprune.models.tables import (
    MODEL_RULES,
    Family,
    prune_dense_config,
)

FAMILY = Family(
    model_type="qwen2",
    architecture=lambda config: gqa_architecture(config, max_positions=32768, groups=32, add_qkv_bias=True),
    model_rules=MODEL_RULES,
    layer_rules=lambda arch, layer: DENSE_LAYER_RULES + QKV_BIAS_RULES,
    prune_config=prune_dense_config,
)
