"""CLP: a contiguous segment, found by the gradient of a soft gate."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register
from megaprune.utils.errors import MegapruneError, UsageError

if TYPE_CHECKING:
    from megaprune.selection.concave_gate import ConcaveGate
    from megaprune.selection.evaluator import Evaluator


def _gate(budget: Budget, protected: Set[int], steps: int) -> "ConcaveGate":
    from megaprune.selection.concave_gate import ConcaveGate

    try:
        return ConcaveGate(budget, protected, steps)
    except UsageError:
        raise
    except MegapruneError as error:
        raise UsageError(f"--method clp: {error}") from None


def _check(budget: Budget, protected: Set[int]) -> None:
    _gate(budget, protected, 1)


@register(
    "clp",
    calibrated=True,
    gradients=lambda _: "mask",
    contiguous=True,
    budgets=["layers"],
    recovers="endpoints",
    check=_check,
    description="a contiguous segment, by the gradient of a concave gate (CLP)",
)
def clp(evaluator: "Evaluator", budget: Budget, protected: Set[int], *, search_iters: int) -> list[int]:
    """Find a segment by the gradient of a gate; compare the final segments and those one layer away by KL."""
    gate = _gate(budget, protected, search_iters)
    for step in range(search_iters):
        gate.update(evaluator.mask_gradient(gate.mask(step), step), step)
    ends = gate.kept_sets()
    losses = evaluator.losses(ends)
    return ends[min(range(len(ends)), key=lambda i: losses[i])]
