"""The best of several methods, within a number of tokens."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


def _windows(budget: Budget, protected: Set[int], tokens: int, seq_length: int, asked: bool) -> int:
    from megaprune.selection.auto import num_windows

    return num_windows(budget, protected, tokens, seq_length, asked)


@register(
    "auto",
    calibrated=True,
    gradients=lambda _: "mask",
    windows=_windows,
    heals=True,
    description="recommended: the best of several cheap methods and of swaps, compared on held-out text and with their "
    "stitch",
)
def auto(
    evaluator: "Evaluator",
    budget: Budget,
    protected: Set[int],
    *,
    held_out: "Evaluator",
    selection_budget: int,
    seed: int,
) -> Choice:
    """Compare the choices of several methods by KL on windows that none of them used."""
    from megaprune.selection.auto import choose_automatically

    return choose_automatically(evaluator, held_out, budget, protected, selection_budget, seed)
