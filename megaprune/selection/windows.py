"""Contiguous segments: every one of them, which is the oracle of methods that look for the best."""

from collections.abc import Set

from megaprune.selection.budget import Budget
from megaprune.selection.greedy import Evaluate


def windows(budget: Budget, protected: Set[int]) -> list[list[int]]:
    """What stays when a contiguous segment goes: for each first layer of it, the shortest that is long enough.

    Empty if no segment between protected layers is.
    """
    budget.check(protected)
    excess = sum(budget.costs) - budget.limit
    found = []
    for first in range(budget.num_layers):
        freed = 0
        for last in range(first, budget.num_layers):
            if last in protected:
                break
            freed += budget.costs[last]
            if freed >= excess:
                found.append([layer for layer in range(budget.num_layers) if not first <= layer <= last])
                break
    return [kept for kept in found if kept]


def best_window(budget: Budget, protected: Set[int], evaluate: Evaluate) -> list[int] | None:
    """The segment whose removal hurts least, as what stays; of equals the first. None if there is no segment."""
    candidates = windows(budget, protected)
    if not candidates:
        return None
    losses = evaluate(candidates)
    return candidates[min(range(len(candidates)), key=lambda i: losses[i])]
