"""Qwen3 dense models (``model_type: qwen3``): RMSNorm on the query and key heads."""

from dataclasses import replace

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.settings import flag
from megaprune.models.tables import MODEL_RULES, Architecture, Family, HFConfig
from megaprune.models.windows import prune_qwen_config, qwen_windows


def _architecture(config: HFConfig) -> Architecture:
    windows = qwen_windows(config)
    arch = gqa_architecture(config, max_positions=32768, head_dim=128, groups=32, qk_layernorm=True, **windows)
    return replace(arch, output_bias=flag(config, "attention_bias", False))


FAMILY = Family(
    model_type="qwen3",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=dense_layer_rules,
    prune_config=prune_qwen_config,
)
