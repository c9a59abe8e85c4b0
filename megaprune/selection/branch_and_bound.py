"""Exact minimum of a quadratic energy over the sets of removed layers that a budget allows."""

import bisect
from collections.abc import Collection, Sequence, Set

from megaprune.selection.budget import Budget
from megaprune.selection.quadratic_fit import Quadratic

# With more nodes the search takes long; the best sets met until then are returned.
MOST_NODES = 50_000


def minimizers(
    model: Quadratic,
    budget: Budget,
    protected: Set[int],
    count: int,
    known: Collection[tuple[int, ...]] = (),
    most_nodes: int = MOST_NODES,
) -> list[list[int]]:
    """Return the `count` sets of kept layers of the lowest energy, the lowest first; ties keep the first met.

    Branch and bound, depth first. The result is exact unless `most_nodes` are exceeded. The sets are those that
    `Budget.take` gives: within the limit, and no layer that is left out would still fit.

    Args:
        known: sets of removed layers that are passed over.
    """
    search = _Search(model, budget, protected, count, set(known), most_nodes)
    search.descend()
    gone_sets = [gone for _, gone in search.best]
    return [[layer for layer in range(budget.num_layers) if layer not in gone] for gone in gone_sets]


class _Search:
    """Depth-first search over the free layers in a fixed order; each is removed or kept."""

    def __init__(
        self,
        model: Quadratic,
        budget: Budget,
        protected: Set[int],
        count: int,
        known: set[tuple[int, ...]],
        most_nodes: int,
    ) -> None:
        self.best: list[tuple[float, tuple[int, ...]]] = []
        self._budget, self._protected, self._count, self._known = budget, protected, count, known
        self._nodes_left = most_nodes
        free = [layer for layer in range(budget.num_layers) if layer not in protected]
        self._excess = sum(budget.costs) - budget.limit
        self._order = _promising_first(model, free, budget, self._excess)
        self._costs = [budget.costs[layer] for layer in self._order]
        self._linear = [model.linear[layer] for layer in self._order]
        self._pairs = [[model.pairs[i][j] for j in self._order] for i in self._order]
        self._equal = len(set(self._costs)) == 1
        self._most = _most_removed(self._costs, self._excess)
        self._halves = [self._half_sums(position) for position in range(len(free) + 1)]
        self._costs_behind = [sum(self._costs[position:]) for position in range(len(free) + 1)]

    def descend(self) -> None:
        """Search everything."""
        if self._excess <= 0:
            self._enter(0.0, [])
        else:
            self._visit(0, [], 0.0, self._linear, self._excess)

    def _half_sums(self, position: int) -> list[list[float]]:
        """Return, for each layer from a position on, half the sum of the q smallest pairs with the others behind the
        position, for each q. Each pair is thereby counted half at both of its layers.
        """
        rows = []
        for i in range(position, len(self._order)):
            smallest = sorted(self._pairs[i][j] for j in range(position, len(self._order)) if j != i)
            sums = [0.0]
            for value in smallest:
                sums.append(sums[-1] + value / 2)
            rows.append(sums)
        return rows

    def _visit(self, position: int, removed: list[int], energy: float, slopes: Sequence[float], needed: int) -> None:
        """Search the sets that contain these removed layers, and otherwise layers from a position on.

        Args:
            removed: positions in the order.
            slopes: the energy that each layer from the position on adds to the removed ones.
            needed: cost that is still to be removed.
        """
        if needed <= 0:
            self._enter(energy, removed)
            return
        if self._nodes_left <= 0 or self._costs_behind[position] < needed or len(removed) >= self._most:
            return
        self._nodes_left -= 1
        if (
            len(self.best) == self._count
            and energy + self._bound(position, len(removed), slopes, needed) >= (self.best[-1][0])
        ):
            return
        behind, pairs = slopes[1:], self._pairs[position]
        with_it = [slope + pairs[position + 1 + i] for i, slope in enumerate(behind)]
        removed.append(position)
        self._visit(position + 1, removed, energy + slopes[0], with_it, needed - self._costs[position])
        removed.pop()
        self._visit(position + 1, removed, energy, behind, needed)

    def _bound(self, position: int, num_removed: int, slopes: Sequence[float], needed: int) -> float:
        """Return a lower bound of the energy that layers from a position on add."""
        halves = self._halves[position]
        if self._equal:
            number = -(-needed // self._costs[0])
            values = [slope + half[number - 1] for slope, half in zip(slopes, halves, strict=True)]
            return sum(sorted(values)[:number])
        most = self._most - num_removed
        values = [slope + min(half[:most]) for slope, half in zip(slopes, halves, strict=True)]
        return self._cover(values, self._costs[position:], needed)

    def _cover(self, values: Sequence[float], costs: Sequence[int], needed: int) -> float:
        """Return the minimum of the values taken, the last one in part, whose costs cover what is needed."""
        total = 0.0
        for _, value, cost in sorted((value / cost, value, cost) for value, cost in zip(values, costs, strict=True)):
            if value >= 0 and needed <= 0:
                break
            share = 1.0 if value < 0 else min(1.0, needed / cost)
            total += share * value
            needed -= cost
        return total

    def _enter(self, energy: float, removed: Sequence[int]) -> None:
        """Record a complete set, if it is among the best and no removed layer would still fit."""
        if len(self.best) == self._count and energy >= self.best[-1][0]:
            return
        gone = tuple(sorted(self._order[position] for position in removed))
        slack = sum(self._budget.costs[layer] for layer in gone) - self._excess
        if gone in self._known or any(self._budget.costs[layer] <= slack for layer in gone):
            return
        bisect.insort(self.best, (energy, gone), key=lambda entry: entry[0])
        del self.best[self._count :]


def _most_removed(costs: Sequence[int], excess: int) -> int:
    """Return the maximum number of layers that are removed: without one of them, the excess is not reached."""
    number = total = 0
    for cost in sorted(costs):
        if total >= excess:
            break
        total += cost
        number += 1
    return number


def _promising_first(model: Quadratic, free: Sequence[int], budget: Budget, excess: int) -> list[int]:
    """Return the free layers: first those that a greedy choice removes, then the others by what they would add, so
    that the first complete set is good.
    """
    left, order = list(free), list[int]()
    slopes = list(model.linear)
    # each layer meets about as many others as are removed
    number = min(len(free), _most_removed([budget.costs[layer] for layer in free], excess))
    average = {i: sum(model.pairs[i][j] for j in free) / max(1, len(free) - 1) for i in free}
    while left:
        rest = max(0, number - 1 - len(order))
        layer = min(left, key=lambda i: ((slopes[i] + rest * average[i] / 2) / budget.costs[i], i))
        left.remove(layer)
        order.append(layer)
        if len(order) <= number:
            slopes = [slope + model.pairs[layer][i] for i, slope in enumerate(slopes)]
    return order
