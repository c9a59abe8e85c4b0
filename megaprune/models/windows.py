"""Attention within a sliding window: which layers have one, by the different settings of config.json."""

from collections.abc import Sequence
from typing import Any

from megaprune.models.layer_settings import LayerRule, per_layer, prune_layer_settings
from megaprune.models.settings import HFConfig, flag, whole, whole_or_none
from megaprune.utils.errors import MegapruneError

FULL, SLIDING = "full_attention", "sliding_attention"


def window_fields(window: int | None, sliding: Sequence[bool]) -> dict[str, Any]:
    """Keyword arguments of ``TransformerConfig`` for layers that attend to a window.

    Args:
        window: number of tokens that a token attends to, itself included.
        sliding: for each layer, whether it has the window.
    """
    if window is None or not any(sliding):
        return {}
    return dict(window_size=(window - 1, 0), window_attn_skip_freq=[int(entry) for entry in sliding])


def no_windows(config: HFConfig) -> dict[str, Any]:
    """Check that every layer attends to all tokens before it; returns no keyword arguments.

    Raises:
        MegapruneError: config.json asks for windows.
    """
    types = per_layer(config, "layer_types", whole(config, "num_hidden_layers"), (FULL, SLIDING))
    if flag(config, "use_sliding_window", False) or SLIDING in (types or ()):
        raise MegapruneError(
            f"{config.get('model_type')}: sliding-window attention is not supported in this family, as transformers "
            "ignores it there; set use_sliding_window to false and remove layer_types"
        )
    return {}


def windows_by_type(config: HFConfig, rule: LayerRule | None = None, default: int | None = 4096) -> dict[str, Any]:
    """Keyword arguments for ``layer_types`` with ``sliding_window``.

    Args:
        rule: the types where the list is absent; None means windows everywhere.
        default: ``sliding_window`` if it is absent.

    Raises:
        MegapruneError: a layer has a window whose length is null, or the list is wrong.
    """
    num_layers, window = whole(config, "num_hidden_layers"), whole_or_none(config, "sliding_window", default)
    types = per_layer(config, "layer_types", num_layers, (FULL, SLIDING))
    if types is None:
        types = rule.entries(config) if rule else [FULL if window is None else SLIDING] * num_layers
    if window is None and SLIDING in types:
        raise MegapruneError(
            f"{config.get('model_type')}: layer_types in config.json names {SLIDING!r}, but sliding_window is null"
        )
    return window_fields(window, [kind == SLIDING for kind in types])


def windows_everywhere(config: HFConfig, default: int | None) -> dict[str, Any]:
    """Keyword arguments for a ``sliding_window`` of all layers, as transformers' class has it.

    Raises:
        MegapruneError: ``layer_types`` says something else, which transformers ignores in this family.
    """
    num_layers, window = whole(config, "num_hidden_layers"), whole_or_none(config, "sliding_window", default)
    types = per_layer(config, "layer_types", num_layers, (FULL, SLIDING))
    if types is not None and set(types) != {FULL if window is None else SLIDING}:
        raise MegapruneError(
            f"{config.get('model_type')}: layer_types in config.json contradicts sliding_window {window}, and "
            "transformers ignores it in this family: give the family that has it (ministral)"
        )
    return window_fields(window, [True] * num_layers)


def qwen_windows(config: HFConfig) -> dict[str, Any]:
    """Keyword arguments for Qwen's windows: those of ``layer_types``, or of the layers from ``max_window_layers``.

    Raises:
        MegapruneError: a setting is wrong, or the settings contradict each other.
    """
    num_layers = whole(config, "num_hidden_layers")
    used, window = flag(config, "use_sliding_window", False), whole_or_none(config, "sliding_window", 4096)
    after = _after_full_layers(config)
    types = per_layer(config, "layer_types", num_layers, (FULL, SLIDING)) or after
    if SLIDING in types and not used:
        raise MegapruneError(
            f"{config.get('model_type')}: layer_types in config.json names sliding-window attention, but "
            "use_sliding_window is false"
        )
    if SLIDING in types and window is None:
        raise MegapruneError(f"{config.get('model_type')}: use_sliding_window is true, but sliding_window is null")
    return window_fields(window, [kind == SLIDING for kind in types])


def _after_full_layers(config: HFConfig) -> list[str]:
    full = whole(config, "max_window_layers", 28, least=0)
    slides = config.get("use_sliding_window") is True and config.get("sliding_window", 4096) is not None
    return [SLIDING if slides and layer >= full else FULL for layer in range(config["num_hidden_layers"])]


QWEN_RULE = LayerRule("layer_types", _after_full_layers)
EVERY_SECOND_FULL = LayerRule("layer_types", lambda config: full_every(2, config))
EVERY_FOURTH_FULL = LayerRule("layer_types", lambda config: full_every(4, config))


def full_every(number: int, config: HFConfig) -> list[str]:
    """Return the types of layers of which every second, every fourth, ... one has no window."""
    return [SLIDING if (layer + 1) % number else FULL for layer in range(config["num_hidden_layers"])]


def windows_if_used(config: HFConfig) -> dict[str, Any]:
    """Keyword arguments for a ``sliding_window`` of all layers that ``use_sliding_window`` switches on.

    Raises:
        MegapruneError: ``layer_types`` says something else, which transformers ignores in this family.
    """
    whole(config, "max_window_layers", 28, least=0)  # other code reads it for dense families
    if flag(config, "use_sliding_window", False):
        return windows_everywhere(config, default=4096)
    whole_or_none(config, "sliding_window", None)
    return no_windows(config)


def prune_qwen_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    """The pruned config, with the number of layers without a window, which come first."""
    if not config.get("use_sliding_window"):
        return prune_layer_settings(config, kept)
    return prune_layer_settings(config, kept, prefixes=("max_window_layers",), rules=(QWEN_RULE,))
