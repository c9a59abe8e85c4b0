"""A quadratic model of the loss of a mask, minimized exactly."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


def _windows(budget: Budget, protected: Set[int], tokens: int, seq_length: int, asked: bool) -> int:
    from megaprune.selection.quadratic import num_windows

    return num_windows(budget, protected, tokens, seq_length, asked)


@register(
    "quadratic",
    calibrated=True,
    windows=_windows,
    description="a quadratic model of KL in the mask, fitted to measured masks and minimized under the budget",
)
def quadratic(
    evaluator: "Evaluator",
    budget: Budget,
    protected: Set[int],
    *,
    held_out: "Evaluator",
    selection_budget: int,
    seed: int,
) -> Choice:
    """Measure masks, fit the model, measure the masks that it predicts to be best, and repeat."""
    from megaprune.selection.quadratic import choose_by_quadratic

    return choose_by_quadratic(evaluator, held_out, budget, protected, selection_budget, seed)
