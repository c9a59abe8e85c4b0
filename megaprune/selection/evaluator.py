"""The interface through which methods look at calibration data."""

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

# KL(original || masked model), or cross-entropy with the data.
LossKind = Literal["kl", "ce"]


class Evaluator(Protocol):
    """Losses of the original model without some of its layers, on calibration windows; the same on every rank.

    `tokens` counts what was spent, in tokens that went forward through all layers: layers that one pass shares with
    the one before it, or that are left out, cost nothing. A backward pass counts as two forward ones.
    """

    tokens: int

    def losses(self, kept_sets: Sequence[Sequence[int]], loss: LossKind = "kl", share: float = 1.0) -> list[float]:
        """One loss for each set of kept layers, in nats per token, on a share of the windows."""

    def affordable(self, kept_sets: Sequence[Sequence[int]], tokens: int) -> int:
        """The number of these sets, from the first on, whose KL costs at most so many tokens."""

    def without_each(self, protected: Set[int], loss: LossKind = "kl") -> Tensor:
        """The loss without each layer, [num_layers]; infinite for protected layers, which are not measured."""

    def mask_gradient(self, mask: Tensor, step: int) -> Tensor:
        """The gradient of the KL in a mask, [num_layers], on a few windows, other ones at each step."""

    def tokens_of_a_gradient(self) -> int:
        """The cost of `mask_gradient`."""

    def tokens_of(self, layers: int) -> int:
        """The cost of running so many layers on all windows."""

    def block_influence(self) -> Tensor:
        """ShortGPT's score of each layer, [num_layers], divided by the layer's cost."""

    def taylor_importance(self) -> Tensor:
        """The first-order change of the loss without each layer, [num_layers], divided by the layer's cost."""

    def counting(self) -> AbstractContextManager[Callable[[], int]]:
        """Gives a function that returns the tokens spent since the block began."""
