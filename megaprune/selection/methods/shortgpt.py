"""Block influence (ShortGPT, Men et al., 2024; Minitron, Muralidharan et al., 2024)."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


@register(
    "shortgpt",
    aliases=["minitron"],
    calibrated=True,
    description="block influence: 1 - cos(input, output) of each layer (ShortGPT, Minitron)",
)
def shortgpt(evaluator: "Evaluator", budget: Budget, protected: Set[int]) -> Choice:
    """Keep the layers with the highest mean over tokens of 1 - cos(input, output)."""
    from megaprune.selection.one_shot import top_layers

    scores = evaluator.block_influence()
    return Choice(top_layers(scores, budget, protected), scores.tolist())
