"""LLaMA 2, 3, 3.1 and later dense text models, SmolLM2 among them (``model_type: llama``)."""

from dataclasses import replace

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.settings import flag
from megaprune.models.tables import MODEL_RULES, Architecture, Family, HFConfig
from megaprune.models.windows import no_windows


def _architecture(config: HFConfig) -> Architecture:
    arch = gqa_architecture(config, max_positions=2048, **no_windows(config))
    biases = {key: flag(config, key, False) for key in ("attention_bias", "mlp_bias")}
    return replace(arch, output_bias=biases["attention_bias"], mlp_bias=biases["mlp_bias"])


FAMILY = Family(
    model_type="llama",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=dense_layer_rules,
    # Early conversions of LLaMA 2 store RoPE's frequencies, which every reader computes.
    ignored=(r"rotary_emb\.inv_freq$",),
)
