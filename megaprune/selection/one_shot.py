"""Selections without a search: the best by score, the user's own, and the random control."""

import random
from collections import Counter
from collections.abc import Iterable, Set

from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.utils.errors import MegapruneError, UsageError


def top_layers(scores: Tensor, budget: Budget, protected: Set[int]) -> list[int]:
    """Return the protected layers and the highest-scoring others that the budget has room for, ascending.

    `scores` is [num_layers]; those of protected layers are ignored. Ties keep the lower layer, so that every rank and
    every run gets the same answer.

    Raises:
        UsageError: the budget does not fit.
        MegapruneError: a score is NaN.
    """
    budget.check(protected)
    free = [layer for layer in range(len(scores)) if layer not in protected]
    if undefined := [layer for layer in free if scores[layer].isnan()]:
        raise MegapruneError(f"the score of layer {undefined[0]} is not a number: layers cannot be ranked by it")
    return budget.take(scores.sort(descending=True, stable=True).indices.tolist(), protected)


def random_layers(budget: Budget, protected: Set[int], seed: int) -> list[int]:
    """Return the protected layers and, in a random order, the others that the budget has room for; ascending.

    If layers are counted, this is a uniform draw.
    """
    budget.check(protected)
    free = [layer for layer in range(budget.num_layers) if layer not in protected]
    return budget.take(random.Random(seed).sample(free, len(free)), protected)


def manual_layers(num_layers: int, pruned: Iterable[int]) -> list[int]:
    """Return the kept layers, ascending, for the removed layers that the user names (`--prune-layers`, from 0 as in
    HF).

    Raises:
        UsageError: the list is empty, names a layer twice, names one that the model does not have, or names all.
    """
    pruned = list(pruned)
    if not pruned:
        raise UsageError("--prune-layers: no layer named; give layer numbers such as 3,7,9")
    if twice := [layer for layer, count in Counter(pruned).items() if count > 1]:
        raise UsageError(f"--prune-layers: layer {twice[0]} is named twice; name each layer once")
    if beyond := [layer for layer in pruned if not 0 <= layer < num_layers]:
        raise UsageError(
            f"--prune-layers: there is no layer {beyond[0]} in a model of {num_layers}; "
            f"give numbers from 0 to {num_layers - 1}"
        )
    if len(pruned) == num_layers:
        raise UsageError(f"--prune-layers: names all {num_layers} layers; leave at least one")
    return sorted(set(range(num_layers)) - set(pruned))
