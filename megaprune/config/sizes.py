"""The size of the pruned model, as the flags give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaprune.utils.errors import UsageError

if TYPE_CHECKING:
    from megaprune.config.schema import PruneConfig


def pruned_layers_of(text: str) -> list[int]:
    """Parse layer numbers such as ``3,7,9``.

    Raises:
        UsageError: the text is not a list of numbers.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--prune-layers {text!r} is not a list of layer numbers such as 3,7,9") from None


def num_layers_to_prune(config: PruneConfig, num_layers: int) -> int:
    """Return the number of layers to remove from a model of ``num_layers``; for flags that count layers."""
    if config.num_layers_to_prune is not None:
        return config.num_layers_to_prune
    assert config.prune_ratio is not None, "the size is given in parameters or as a list"
    return round(config.prune_ratio * num_layers)
