"""Sets of kept layers as masks, and the cost of evaluating many of them one after the other."""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.evaluator import LossKind


def masks_of(kept_sets: Sequence[Sequence[int]], num_layers: int) -> Tensor:
    """Return masks [number of sets, num_layers]: 1 for each kept layer."""
    masks = torch.zeros(len(kept_sets), num_layers)
    for mask, kept in zip(masks, kept_sets, strict=True):
        mask[list(kept)] = 1
    return masks


def sets_without_each(budget: Budget, protected: Set[int]) -> list[list[int]]:
    """Return, for each unprotected layer, the layers that stay without it."""
    layers = range(budget.num_layers)
    return [[other for other in layers if other != layer] for layer in layers if layer not in protected]


def shared_order(masks: Tensor) -> list[int]:
    """Return the order in which masks [n, num_layers] share most layers with the previous mask; the whole model is
    first.
    """
    return sorted(range(len(masks)), key=lambda i: [-value for value in masks[i].tolist()])


def shared_cost(masks: Tensor, loss: LossKind) -> float:
    """Return the cost of evaluating hard masks [n, num_layers] in that order, in passes through all layers of the
    model.

    A mask reuses the outputs of the layers before the first difference from the previous mask. KL also runs the
    original.
    """
    layers, before = 0, [1.0] * masks.shape[1] if loss == "kl" else []
    layers += len(before)
    for i in shared_order(masks):
        mask = masks[i].tolist()
        same = next((j for j, pair in enumerate(zip(mask, before, strict=False)) if pair[0] != pair[1]), len(before))
        layers += sum(value != 0 for value in mask[same:])
        before = mask
    return layers / masks.shape[1]
