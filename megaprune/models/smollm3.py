"""SmolLM3 (``model_type: smollm3``): some layers have no RoPE."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.layer_settings import LayerRule, per_layer, prune_layer_settings
from megaprune.models.settings import HFConfig, flag, whole, whole_or_none
from megaprune.models.tables import MODEL_RULES, Architecture, Family
from megaprune.models.windows import FULL, SLIDING, windows_by_type


def _with_rope(config: HFConfig) -> list[int]:
    interval = config.get("no_rope_layer_interval", 4)
    return [int((layer + 1) % interval != 0) for layer in range(config["num_hidden_layers"])]


def _types(config: HFConfig) -> list[str]:
    slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
    rope = config.get("no_rope_layers") or _with_rope(config)
    return [SLIDING if slides and not rotates else FULL for rotates in rope]


_ROPE_RULE = LayerRule("no_rope_layers", _with_rope, ("no_rope_layer_interval",))
_TYPE_RULE = LayerRule("layer_types", _types)


def _architecture(config: HFConfig) -> Architecture:
    num_layers = whole(config, "num_hidden_layers")
    whole(config, "no_rope_layer_interval", 4)
    whole_or_none(config, "max_window_layers", None, least=0)  # of Qwen's code, read by none of this family
    # the list's name notwithstanding, 1 means RoPE
    rope = per_layer(config, "no_rope_layers", num_layers, (0, 1)) or _with_rope(config)
    arch = gqa_architecture(config, max_positions=32768, groups=4, theta=2000000.0, **_windows(config))
    fields = arch.transformer if all(rope) else arch.transformer | {"no_rope_freq": [1 - int(entry) for entry in rope]}
    biases = flag(config, "attention_bias", False), flag(config, "mlp_bias", False)
    tied = flag(config, "tie_word_embeddings", True)
    return replace(arch, transformer=fields, output_bias=biases[0], mlp_bias=biases[1], tied=tied)


def _windows(config: HFConfig) -> dict[str, Any]:
    if flag(config, "use_sliding_window", False):
        return windows_by_type(config, _TYPE_RULE, default=None)
    whole_or_none(config, "sliding_window", None)
    # without the switch, transformers gives no layer a window
    per_layer(config, "layer_types", config["num_hidden_layers"], (FULL, SLIDING))
    return {}


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    return prune_layer_settings(config, kept, rules=(_ROPE_RULE, _TYPE_RULE))


FAMILY = Family(
    model_type="smollm3",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=dense_layer_rules,
    prune_config=_prune_config,
    tied_by_default=True,
)
