"""Selections that need no search: the best by score, the user's own, and the random control."""

import random
from collections import Counter
from collections.abc import Iterable, Set

import torch
from torch import Tensor

from megaprune.errors import MegapruneError, UsageError
from megaprune.selection.selector import check_num_kept


def top_layers(scores: Tensor, num_kept: int, protected: Set[int]) -> list[int]:
    """The protected layers and the highest-scoring others, `num_kept` in all, ascending.

    `scores` is [num_layers]; those of protected layers are not looked at. Of equal scores the lower
    layer is kept, so that every rank and every run answers the same. Raises UsageError if the numbers
    don't fit, MegapruneError if a score is NaN.
    """
    check_num_kept(len(scores), num_kept, protected)
    free = [layer for layer in range(len(scores)) if layer not in protected]
    free_scores = scores[free]
    if free_scores.isnan().any():
        layer = free[int(free_scores.isnan().nonzero()[0])]
        raise MegapruneError(f"the score of layer {layer} is not a number: layers cannot be ranked by it")
    order = torch.sort(free_scores, descending=True, stable=True).indices
    best = [free[i] for i in order[: num_kept - len(protected)].tolist()]
    return sorted([*protected, *best])


def random_layers(num_layers: int, num_kept: int, protected: Set[int], seed: int) -> list[int]:
    """The protected layers and a uniform draw from the others, `num_kept` in all, ascending."""
    check_num_kept(num_layers, num_kept, protected)
    free = [layer for layer in range(num_layers) if layer not in protected]
    return sorted([*protected, *random.Random(seed).sample(free, num_kept - len(protected))])


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
