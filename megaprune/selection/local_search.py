"""Swaps that improve a set of layers, and the choice among candidates."""

from collections.abc import Iterator, Mapping, Sequence, Set

from megaprune.selection.budget import Budget
from megaprune.selection.greedy import Evaluate


def neighbours(kept: Sequence[int], budget: Budget, protected: Set[int]) -> Iterator[list[int]]:
    """The sets that differ from this one by one layer that leaves and one that comes, and by what still fits then."""
    met = {tuple(kept)}
    dropped = [layer for layer in range(budget.num_layers) if layer not in kept]
    for comes in dropped:
        for leaves in kept:
            if leaves in protected:
                continue
            rest = [layer for layer in kept if layer != leaves]
            found = budget.take([*rest, comes, *(layer for layer in dropped if layer != comes), leaves], protected)
            if comes in found and tuple(found) not in met:
                met.add(tuple(found))
                yield found


def improve(
    kept: Sequence[int], loss: float, budget: Budget, protected: Set[int], evaluate: Evaluate, most: int
) -> tuple[list[int], float, int]:
    """Descends by the best swap until none helps, or `most` evaluations are used up.

    Returns the set, its loss, and how many evaluations it took.
    """
    best, used = sorted(kept), 0
    while used < most:
        found = list(neighbours(best, budget, protected))[: most - used]
        if not found:
            break
        losses = evaluate(found)
        used += len(found)
        i = min(range(len(found)), key=lambda i: losses[i])
        if losses[i] >= loss:
            break
        best, loss = found[i], losses[i]
    return best, loss, used


def best_of(candidates: Mapping[str, Sequence[int]], losses: Mapping[str, float]) -> str:
    """The name of the candidate with the lowest loss; of equals, the first named."""
    return min(candidates, key=lambda name: losses[name])
