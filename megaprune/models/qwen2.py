"""Qwen2 and Qwen2.5 dense models (``model_type: qwen2``): bias on query, key and value; small ones tie embeddings."""

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.tables import MODEL_RULES, Architecture, Family, HFConfig
from megaprune.models.windows import prune_qwen_config, qwen_windows


def _architecture(config: HFConfig) -> Architecture:
    return gqa_architecture(config, max_positions=32768, groups=32, add_qkv_bias=True, **qwen_windows(config))


FAMILY = Family(
    model_type="qwen2",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=dense_layer_rules,
    prune_config=prune_qwen_config,
)
