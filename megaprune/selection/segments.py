"""Contiguous segments of layers: all of them, the best one, and the cut that the removal of one leaves."""

import itertools
from collections.abc import Sequence, Set

from megaprune.selection.budget import Budget
from megaprune.selection.greedy import Evaluate
from megaprune.utils.errors import MegapruneError


def segments(budget: Budget, protected: Set[int]) -> list[list[int]]:
    """Return the kept layers for each removable contiguous segment: for each first layer, the shortest that is long
    enough.

    Empty if no segment between protected layers is long enough.
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
    # If layers differ in cost, a layer may fit again after the removal; a shorter segment is then a candidate itself.
    return [kept for kept in found if kept and budget.take([*kept, *range(budget.num_layers)], protected) == kept]


def cut_positions(kept: Sequence[int], num_layers: int) -> list[int]:
    """Return the positions, among the kept layers, of the layers after a cut; a cut at the end has the number of
    layers.
    """
    padded = [-1, *kept, num_layers]
    return [i for i, (before, behind) in enumerate(itertools.pairwise(padded)) if behind - before > 1]


def cuts(kept: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the first and the last layer of each contiguous segment of removed layers."""
    padded = [-1, *kept, num_layers]
    return [(before + 1, behind - 1) for before, behind in itertools.pairwise(padded) if behind - before > 1]


def cut_position(kept: Sequence[int], num_layers: int) -> int:
    """Return the position, among the kept layers, of the layer after the cut; their number if the cut is at the end.

    Raises:
        MegapruneError: the removed layers are not exactly one contiguous segment.
    """
    cuts = cut_positions(kept, num_layers)
    if len(cuts) != 1:
        raise MegapruneError(
            f"--recovery-layers endpoints needs one contiguous cut; the kept layers {list(kept)} have {len(cuts)}"
        )
    return cuts[0]


def endpoints(kept: Sequence[int], num_layers: int) -> list[int]:
    """Return the positions, among the kept layers, of the layers next to the cut (CLP's endpoint tuning): two, or one
    if the cut is at an end.

    Raises as `cut_position`.
    """
    behind = cut_position(kept, num_layers)
    return [position for position in (behind - 1, behind) if 0 <= position < len(kept)]


def best_segment(budget: Budget, protected: Set[int], evaluate: Evaluate) -> list[int] | None:
    """Return the kept layers for the segment whose removal costs least; of ties, the first. None if there is no
    segment.
    """
    candidates = segments(budget, protected)
    if not candidates:
        return None
    losses = evaluate(candidates)
    return candidates[min(range(len(candidates)), key=lambda i: losses[i])]
