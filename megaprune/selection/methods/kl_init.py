"""E3-Pruner's initial scores, without its search."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import Choice, register

if TYPE_CHECKING:
    from megaprune.selection.evaluator import Evaluator


@register("kl-init", calibrated=True, description="KL without each layer: the initial scores of e3")
def kl_init(evaluator: "Evaluator", budget: Budget, protected: Set[int], *, mask_init_scale: float | None) -> Choice:
    """Keep the layers whose removal, one at a time, changes the model's predictions most."""
    from megaprune.selection.initial_scores import scores_from_kl
    from megaprune.selection.one_shot import top_layers

    scores = scores_from_kl(evaluator.without_each(protected), protected, mask_init_scale or 1.0, budget.costs)
    return Choice(top_layers(scores, budget, protected), scores.tolist())
