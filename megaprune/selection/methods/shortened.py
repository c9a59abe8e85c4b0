"""Shortened LLaMA (Kim et al., 2024): one shot, by perplexity or by its first-order estimate."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, register
from megaprune.utils.errors import UsageError

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator

# The first layers and the last ones that always stay.
_KEEPS = (4, 2)


def _kept(budget: Budget, protected: Set[int]) -> Set[int]:
    first, last = _KEEPS
    keeps = protected | set(range(first)) | set(range(budget.num_layers - last, budget.num_layers))
    if sum(budget.costs[layer] for layer in keeps) > budget.limit:
        raise UsageError(
            f"--method shortened keeps the first {first} layers and the last {last}, which is more than remain: prune "
            "fewer layers, or choose another method"
        )
    return keeps


def _check(budget: Budget, protected: Set[int]) -> None:
    _kept(budget, protected)


@register(
    "shortened",
    calibrated=True,
    check=_check,
    gradients=lambda options: "weights" if options.get("criterion") == "taylor" else None,
    description="cross-entropy without each layer, or its first-order estimate (Shortened LLaMA)",
)
def shortened(evaluator: "Evaluator", budget: Budget, protected: Set[int], *, criterion: str = "perplexity") -> Choice:
    """Keep the layers whose removal raises the loss most per cost; `criterion` is perplexity or taylor."""
    import torch

    from megaprune.selection.one_shot import top_layers

    keeps = _kept(budget, protected)
    if criterion == "taylor":
        scores = evaluator.taylor_importance()
    else:
        (whole,) = evaluator.losses([range(budget.num_layers)], "ce")
        scores = (evaluator.without_each(keeps, "ce") - whole) / torch.tensor(budget.costs)
    return Choice(top_layers(scores, budget, keeps), scores.tolist())
