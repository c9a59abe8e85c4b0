"""LLaMA 2, 3, 3.1 and later dense text models (``model_type: llama``)."""

from megaprune.models.gqa import DENSE_LAYER_RULES, gqa_architecture
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
    return gqa_architecture(config, max_positions=2048)


FAMILY = Family(
    model_type="llama",
    architecture=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=lambda arch, layer: DENSE_LAYER_RULES,
    prune_config=prune_dense_config,
    # Early conversions of LLaMA 2 store RoPE's frequencies, which every reader computes.
    ignored=(r"rotary_emb\.inv_freq$",),
)
