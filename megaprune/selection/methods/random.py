"""Control method: layers drawn at random."""

from collections.abc import Set

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register


@register("random", description="random layers (by --seed), the control of every comparison")
def random(budget: Budget, protected: Set[int], *, seed: int) -> list[int]:
    """Keep the protected layers and a random draw of the others."""
    from megaprune.selection.one_shot import random_layers

    return random_layers(budget, protected, seed)
