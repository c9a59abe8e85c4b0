"""Swaps that improve a set of layers, and the choice among candidates."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from megaprune.selection.budget import Budget
from megaprune.selection.greedy import Evaluate


def neighbors(kept: Sequence[int], budget: Budget, protected: Set[int]) -> Iterator[list[int]]:
    """Yield the sets that differ from this one by a swap of one kept layer for one dropped layer, and by layers that
    still fit then.
    """
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
    kept: Sequence[int],
    loss: float,
    budget: Budget,
    protected: Set[int],
    evaluate: Evaluate,
    affordable: Callable[[Sequence[Sequence[int]]], int],
) -> tuple[list[int], float]:
    """Apply the best swap repeatedly until none helps or the tokens are spent. Return the set and its loss.

    Args:
        affordable: returns how many of these sets, counted from the first, can still be evaluated.
    """
    best = sorted(kept)
    while True:
        found = list(neighbors(best, budget, protected))
        found = found[: affordable(found)]
        if not found:
            return best, loss
        losses = evaluate(found)
        i = min(range(len(found)), key=lambda i: losses[i])
        if losses[i] >= loss:
            return best, loss
        best, loss = found[i], losses[i]


def best_of(candidates: Mapping[str, Sequence[int]], losses: Mapping[str, float]) -> str:
    """Return the name of the candidate with the lowest loss; of ties, the first."""
    return min(candidates, key=lambda name: losses[name])
