"""Evolutionary search over masks, in the style of DarwinLM (Tang et al., 2025) and EvoPress (Sieberling et al., 2024).

The search is elitist: a parent is replaced only by a better child. A mutation swaps kept and dropped layers. Children
are selected in several rounds, on a growing share of the calibration tokens; few of them are evaluated on all tokens.
"""

import random
from collections.abc import Callable, Sequence, Set

from megaprune.selection.budget import Budget

# Takes sets of kept layers and the share of the calibration data to use; gives the losses, lower = better.
EvaluateOnShare = Callable[[Sequence[Sequence[int]], float], Sequence[float]]
# The number of survivors of each round, and the round's share of the tokens.
SIFTINGS = ((4, 0.125), (2, 0.5), (1, 1.0))
# Maximum number of mutations drawn for each child; known ones are rejected.
_TRIES = 20


def evolve(
    start: Sequence[int],
    budget: Budget,
    protected: Set[int],
    evaluate: EvaluateOnShare,
    generations: int,
    offspring: int = 8,
    seed: int = 0,
) -> list[int]:
    """Return the best set of kept layers that was evaluated, ascending.

    Args:
        start: the first parent.
        generations: the number of generations of `offspring` new children each; fewer if no new ones are found.
    """
    rng = random.Random(seed)
    parent, parent_loss = sorted(start), evaluate([sorted(start)], 1.0)[0]
    met = {tuple(parent)}
    for _ in range(generations):
        children: list[list[int]] = []
        for _ in range(_TRIES * offspring):
            child = _mutated(parent, budget, protected, rng)
            if tuple(child) not in met:
                met.add(tuple(child))
                children.append(child)
            if len(children) == offspring:
                break
        if not children:
            break
        for survivors, share in SIFTINGS:
            losses = evaluate(children, share)
            order = sorted(range(len(children)), key=lambda i: losses[i])[:survivors]
            children, best = [children[i] for i in order], losses[order[0]]
        if best < parent_loss:
            parent, parent_loss = children[0], best
    return parent


def _mutated(parent: Sequence[int], budget: Budget, protected: Set[int], rng: random.Random) -> list[int]:
    """Return the parent with one or, less often, more of its layers swapped for dropped ones."""
    kept = [layer for layer in parent if layer not in protected]
    dropped = [layer for layer in range(budget.num_layers) if layer not in parent]
    swaps = min(rng.choice((1, 1, 2, 3)), len(kept), len(dropped))
    out, into = rng.sample(kept, swaps), rng.sample(dropped, swaps)
    rest = rng.sample(dropped, len(dropped))  # where layers differ in cost, others may fit beside them
    return budget.take([*into, *(layer for layer in kept if layer not in out), *rest], protected)
