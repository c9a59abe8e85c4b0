"""The oracle of methods that remove one contiguous segment."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register
from megaprune.selection.segments import best_segment, segments
from megaprune.utils.errors import UsageError

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


_NO_SEGMENT = "--method exhaustive: no contiguous segment between protected layers is long enough; protect fewer layers"


def _check(budget: Budget, protected: Set[int]) -> None:
    if not segments(budget, protected):
        raise UsageError(_NO_SEGMENT)


@register(
    "exhaustive",
    calibrated=True,
    contiguous=True,
    check=_check,
    description="every contiguous segment, by KL: the oracle of contiguous pruning",
)
def exhaustive(evaluator: "Evaluator", budget: Budget, protected: Set[int]) -> list[int]:
    """Remove the contiguous segment whose removal changes the model's predictions least."""
    kept = best_segment(budget, protected, evaluator.losses)
    if kept is None:
        raise UsageError(_NO_SEGMENT)
    return kept
