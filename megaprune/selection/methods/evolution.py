"""Evolutionary search without training, in the style of DarwinLM and EvoPress."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.evolution import evolve
from megaprune.selection.registry import register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator

_GENERATIONS = 40


@register("evolution", calibrated=True, description="mutations that swap layers, selected by KL (DarwinLM, EvoPress)")
def evolution(evaluator: "Evaluator", budget: Budget, protected: Set[int], *, seed: int) -> list[int]:
    """Start from the choice by block influence, and swap layers as long as this lowers the KL."""
    from megaprune.selection.one_shot import top_layers

    start = top_layers(evaluator.block_influence(), budget, protected)
    return evolve(
        start, budget, protected, lambda sets, share: evaluator.losses(sets, "kl", share), _GENERATIONS, seed=seed
    )
