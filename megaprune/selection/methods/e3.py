"""E3-Pruner's search."""

from collections.abc import Set
from typing import TYPE_CHECKING

from megaprune.selection.budget import Budget
from megaprune.selection.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from megaprune.selection.selector import Selector


@register("e3", searches=True, description="a Gumbel-TopK mask, learned while the weights train (E3-Pruner)")
def e3(
    budget: Budget,
    protected: Set[int],
    num_steps: int,
    *,
    kl: "Tensor",
    search_preset: str,
    gumbel_temperature: float,
    gumbel_anneal: float,
    mask_ramp: float | None,
    mask_init_scale: float | None,
    mask_lr: float | None,
    lr: float,
    seed: int,
) -> "Selector":
    """Search with one Gumbel-TopK mask per step, by measured values of layers or by the paper's trained scores."""
    if search_preset == "measured":
        from megaprune.selection.measured_topk import MeasuredTopK

        return MeasuredTopK(
            kl,
            budget,
            protected,
            num_steps,
            temperature=gumbel_temperature,
            anneal=gumbel_anneal,
            seed=seed,
            ramp=0.5 if mask_ramp is None else mask_ramp,
        )
    from megaprune.selection.gumbel_topk import GumbelTopK
    from megaprune.selection.initial_scores import raw_scores, scores_from_kl

    raw = raw_scores(kl, protected, budget.costs)
    return GumbelTopK(
        raw if mask_init_scale is None else scores_from_kl(kl, protected, mask_init_scale, budget.costs),
        budget,
        protected,
        num_steps,
        temperature=gumbel_temperature,
        anneal=gumbel_anneal,
        lr=lr if mask_lr is None else mask_lr,
        seed=seed,
        ramp=1.0 if mask_ramp is None else mask_ramp,
        damped=False,
    )
