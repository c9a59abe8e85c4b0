"""SLEB (Song et al., 2024)."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.greedy import greedy_layers
from megaprune.selection.registry import register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


@register("sleb", calibrated=True, description="greedy removal by cross-entropy (SLEB)")
def sleb(evaluator: "Evaluator", budget: Budget, protected: Set[int]) -> list[int]:
    """Remove one layer at a time, always the one whose removal leaves the lowest cross-entropy."""
    return greedy_layers(budget, protected, lambda sets: evaluator.losses(sets, "ce"))
