"""E3-Pruner's search."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from megaprune.selection.selector import Selector


@register("e3", searches=True, description="a Gumbel-TopK mask, learned with the weights (E3-Pruner)")
def e3(
    budget: Budget,
    protected: Set[int],
    num_steps: int,
    *,
    scores: "Tensor",
    gumbel_temperature: float,
    gumbel_anneal: float,
    mask_lr: float,
    mask_ramp: float,
    seed: int,
) -> "Selector":
    """Learn one score per layer, with one Gumbel-TopK mask per step."""
    from megaprune.selection.gumbel_topk import GumbelTopK

    return GumbelTopK(
        scores,
        budget,
        protected,
        num_steps,
        temperature=gumbel_temperature,
        anneal=gumbel_anneal,
        lr=mask_lr,
        seed=seed,
        ramp=mask_ramp,
    )
