"""Interface through which methods evaluate layers on calibration data."""

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

# KL(original || masked model), or cross-entropy with the data.
LossKind = Literal["kl", "ce"]


class Evaluator(Protocol):
    """Losses of the original model without some of its layers, on calibration windows; the same on every rank.

    `tokens` counts the cost in tokens that run forward through all layers. Layers whose outputs are shared with the
    previous pass, and layers that are left out, cost nothing. A backward pass counts as two forward passes.
    """

    tokens: int

    def losses(self, kept_sets: Sequence[Sequence[int]], loss: LossKind = "kl", share: float = 1.0) -> list[float]:
        """Return the loss of the model with each set of kept layers, in nats per token, on a share of the windows."""

    def affordable(self, kept_sets: Sequence[Sequence[int]], tokens: int) -> int:
        """Return how many of these sets, counted from the first, can be evaluated by KL within a number of tokens."""

    def without_each(self, protected: Set[int], loss: LossKind = "kl") -> Tensor:
        """Return the loss without each layer, [num_layers]; infinite for protected layers, which are not measured."""

    def mask_gradient(self, mask: Tensor, step: int) -> Tensor:
        """Return the gradient of the KL with respect to a mask, [num_layers], on a few windows that change at each
        step.
        """

    def tokens_of_a_gradient(self) -> int:
        """Return the cost of `mask_gradient`, in tokens."""

    def tokens_of(self, layers: int) -> int:
        """Return the cost of running a number of layers on all windows, in tokens."""

    def block_influence(self) -> Tensor:
        """Return ShortGPT's score of each layer, [num_layers], divided by the layer's cost."""

    def taylor_importance(self) -> Tensor:
        """Return the first-order change of the loss without each layer, [num_layers], divided by the layer's cost."""

    def counting(self) -> AbstractContextManager[Callable[[], int]]:
        """Yield a function that returns the tokens spent since the block began."""
