"""Sheared-LLaMA's search (Xia et al., 2024), layers only."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register

if TYPE_CHECKING:
    from megaprune.selection.selector import Selector


@register("sheared", searches=True, description="hard concrete gates, learned with the weights (Sheared-LLaMA)")
def sheared(budget: Budget, protected: Set[int], num_steps: int, *, seed: int) -> "Selector":
    """Learn hard concrete gates under a Lagrangian that drives the removed share to its target."""
    from megaprune.selection.hard_concrete import HardConcrete

    return HardConcrete(budget, protected, num_steps, seed=seed)
