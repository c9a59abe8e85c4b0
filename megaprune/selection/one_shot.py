"""Selections that need no search: the best by score, the user's own, and the random control."""

import random
from collections import Counter
from collections.abc import Iterable, Set

from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.utils.errors import MegapruneError, UsageError


def top_layers(scores: Tensor, budget: Budget, protected: Set[int]) -> list[int]:
    """The protected layers and the highest-scoring others that the budget has room for, ascending.

    `scores` is [num_layers]; those of protected layers are not looked at. Of equal scores the lower
    layer is kept, so that every rank and every run answers the same. Raises UsageError if the budget
    doesn't fit, MegapruneError if a score is NaN.
    """
    budget.check(protected)
    free = [layer for layer in range(len(scores)) if layer not in protected]
    if undefined := [layer for layer in free if scores[layer].isnan()]:
        raise MegapruneError(f"the score of layer {undefined[0]} is not a number: layers cannot be ranked by it")
    return budget.take(scores.sort(descending=True, stable=True).indices.tolist(), protected)


def random_layers(budget: Budget, protected: Set[int], seed: int) -> list[int]:
    """The protected layers and those of the others, in a random order, that the budget has room for; ascending.

    Where layers are counted, a uniform draw.
    """
    budget.check(protected)
    free = [layer for layer in range(budget.num_layers) if layer not in protected]
    return budget.take(random.Random(seed).sample(free, len(free)), protected)


def manual_layers(num_layers: int, pruned: Iterable[int]) -> list[int]:
    """What stays, ascending, when the user says what goes (`--prune-layers`, counted from 0 as in HF).

    Raises UsageError for an empty list, layers named twice or not in the model, and for all of them.
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
