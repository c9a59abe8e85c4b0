"""Layers given by the user."""

from collections.abc import Sequence, Set

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register


@register("manual", budgets=["list"], description="the layers given by --prune-layers")
def manual(budget: Budget, protected: Set[int], *, prune_layers: Sequence[int]) -> list[int]:
    """Keep all layers except those that the user names, protected or not."""
    from megaprune.selection.one_shot import manual_layers

    return manual_layers(budget.num_layers, prune_layers)
