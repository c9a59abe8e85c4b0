"""Greedy removal, as in SLEB (Song et al., 2024): one layer at a time, always the one whose removal costs least."""

from collections.abc import Callable, Sequence, Set

from megaprune.selection.budget import Budget

# Takes sets of kept layers; gives the loss of the model of each, lower = better.
Evaluate = Callable[[Sequence[Sequence[int]]], Sequence[float]]


def greedy_layers(budget: Budget, protected: Set[int], evaluate: Evaluate) -> list[int]:
    """Return the layers that stay, ascending. Every round evaluates each possible removal; ties keep the lower layer.

    If layers differ in cost, the order of removal follows from the loss alone, and not from the costs. Layers that
    still
    fit at the end are restored, the last removed first.
    """
    budget.check(protected)
    kept, removed = list(range(budget.num_layers)), list[int]()
    while sum(budget.costs[layer] for layer in kept) > budget.limit:
        free = [layer for layer in kept if layer not in protected]
        losses = evaluate([[other for other in kept if other != layer] for layer in free])
        _, _, layer = min((loss, -layer, layer) for loss, layer in zip(losses, free, strict=True))
        kept.remove(layer)
        removed.append(layer)
    return budget.take([*kept, *reversed(removed)], protected)


def num_layers_run(budget: Budget, protected: Set[int]) -> int:
    """Return the maximum number of layers that `greedy_layers` runs, where one calibration window through one layer
    counts 1, sets with a common prefix share it, and every round needs the original model too.
    """
    excess = sum(budget.costs) - budget.limit
    cheapest = sorted(cost for layer, cost in enumerate(budget.costs) if layer not in protected)
    freed = layers = 0
    for number, cost in enumerate(cheapest):
        if freed >= excess:
            break
        freed += cost
        kept = budget.num_layers - number
        layers += budget.num_layers + (kept - 1) + kept * (kept - 1) // 2
    return layers
