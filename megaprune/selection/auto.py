"""Best of several methods' choices and of their swaps, within a number of tokens (`--method auto`)."""

from collections.abc import Sequence, Set
from typing import Any

from megaprune.selection.budget import Budget
from megaprune.selection.evaluator import Evaluator
from megaprune.selection.greedy import greedy_layers, num_layers_run
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.local_search import best_of, improve
from megaprune.selection.masks import masks_of, sets_without_each, shared_cost
from megaprune.selection.one_shot import top_layers
from megaprune.selection.quadratic import QuadraticSearch
from megaprune.selection.registry import HELD_OUT_WINDOWS, Choice
from megaprune.selection.segments import best_segment, segments
from megaprune.utils.errors import UsageError

# Shares of the budget for the cheap candidates with the final comparison, and for E3's search; swaps get the rest.
_CANDIDATES_SHARE = 0.7
_SEARCH_SHARE = 0.15
# A search of fewer steps would return its initial scores.
_FEWEST_STEPS = 8
_MOST_STEPS = 60
# The number of candidates that swaps improve. A second one helps if the first is a local optimum.
_SWAPPED = 2
# Share of the tokens that are left for the sets that a quadratic model predicts to be best; swaps get the rest.
_QUADRATIC_SHARE = 0.5
# kl-init, block influence, best segment, greedy, search, quadratic, runner-up, and the results of swaps
_MOST_CANDIDATES = 7 + _SWAPPED


def passes_of_candidates(budget: Budget, protected: Set[int]) -> float:
    """Return the maximum cost of candidates and final comparison, in passes of the windows through all layers."""
    layers = budget.num_layers
    each = shared_cost(masks_of(sets_without_each(budget, protected), layers), "kl")
    contiguous_sets = segments(budget, protected)
    contiguous = shared_cost(masks_of(contiguous_sets, layers), "kl") if contiguous_sets else 0.0
    greedy = num_layers_run(budget, protected) / layers
    final = HELD_OUT_WINDOWS * _layers_compared(budget, protected) / layers
    return each + 1 + contiguous + greedy + final


def _layers_compared(budget: Budget, protected: Set[int]) -> int:
    """Return the maximum number of layers that run in the final comparison: the original's, and those of each
    candidate.
    """
    cheapest_first = sorted(set(range(budget.num_layers)) - protected, key=lambda layer: budget.costs[layer])
    return budget.num_layers + _MOST_CANDIDATES * len(budget.take(cheapest_first, protected))


def num_windows(budget: Budget, protected: Set[int], tokens: int, seq_length: int, asked: bool) -> int:
    """Return the number of calibration windows with which `auto` stays within a number of tokens; at least one.

    Raises:
        UsageError: the user asked for this budget, and it is too small for one.
    """
    window = passes_of_candidates(budget, protected) * seq_length / _CANDIDATES_SHARE
    if asked and tokens < window:
        raise UsageError(f"--selection-budget {tokens} is too small: give at least {round(window) + 1}")
    return max(1, int(tokens / window))


def choose_automatically(
    evaluator: Evaluator, held_out: Evaluator, budget: Budget, protected: Set[int], tokens: int, seed: int = 0
) -> Choice:
    """Return the best of several methods' choices and of swaps on the best two, by KL on calibration text that none of
    them used. By this measure the result is never worse than any candidate.

    CLP is represented by its oracle, the best of all contiguous segments, which costs less than CLP's search. E3's
    search runs with frozen weights if the budget allows it. The quadratic model is fitted to the sets of the final size
    that the methods before it measured.

    Args:
        tokens: the budget, in tokens that run forward through all layers.
        seed: seed of the search's noise.
    """
    found: dict[str, list[int]] = {}
    spent: dict[str, int] = {}

    def enter(name: str, kept: Sequence[int] | None, cost: int) -> None:
        if kept is not None:
            found[name], spent[name] = list(kept), cost

    quadratic = QuadraticSearch(evaluator, budget, protected, seed)

    def losses_of(kept_sets: Sequence[Sequence[int]]) -> list[float]:
        """Return losses, and let the quadratic model know those of the final size."""
        losses = evaluator.losses(kept_sets)
        quadratic.measured.update(
            (quadratic.gone(kept), loss)
            for kept, loss in zip(kept_sets, losses, strict=True)
            if budget.take([*kept, *range(budget.num_layers)], protected) == list(kept)
        )
        return losses

    with evaluator.counting() as cost:
        scores = scores_from_kl(evaluator.without_each(protected), protected, 1.0, budget.costs)
        enter("kl-init", top_layers(scores, budget, protected), cost())
    with evaluator.counting() as cost:
        enter("block influence", top_layers(evaluator.block_influence(), budget, protected), cost())
    with evaluator.counting() as cost:
        enter("best segment", best_segment(budget, protected, losses_of), cost())
    with evaluator.counting() as cost:
        enter("greedy", greedy_layers(budget, protected, losses_of), cost())
    steps = min(_MOST_STEPS, int(_SEARCH_SHARE * tokens / evaluator.tokens_of_a_gradient()))
    if steps >= _FEWEST_STEPS:
        with evaluator.counting() as cost:
            search = GumbelTopK(scores, budget, protected, steps, seed=seed, lr=0.1, ramp=0.5)
            for step in range(steps):
                search.update(evaluator.mask_gradient(search.mask(step), step), step)
            enter("e3, weights frozen", search.kept_layers(), cost())
    final = held_out.tokens_of(_layers_compared(budget, protected))

    def affordable(sets: Sequence[Sequence[int]]) -> int:
        return evaluator.affordable(sets, tokens - evaluator.tokens - final)

    losses_of(list(found.values()))
    with evaluator.counting() as cost:
        reserve = (1 - _QUADRATIC_SHARE) * max(0, tokens - evaluator.tokens - final)
        guides = [quadratic.sum_of_layers()]
        quadratic.improve(
            guides, lambda sets: evaluator.affordable(sets, int(tokens - evaluator.tokens - final - reserve))
        )
        enter("quadratic", quadratic.best(1)[0], cost())

    beginnings = {tuple(kept): name for name, kept in reversed(found.items())}
    losses = dict(zip(beginnings, evaluator.losses(list(beginnings)), strict=True))
    for kept in sorted(beginnings, key=lambda kept: losses[kept])[:_SWAPPED]:
        with evaluator.counting() as cost:
            swapped, _ = improve(kept, losses[kept], budget, protected, losses_of, affordable)
            enter(f"{beginnings[kept]}, swapped", swapped, cost())
    # the best set that no method chose
    others = [kept for kept in quadratic.best(len(found) + 1) if kept not in found.values()]
    enter("runner-up", others[0] if others else None, 0)

    kl = dict(zip(found, held_out.losses(list(found.values())), strict=True))
    chosen = best_of(found, kl)
    candidates: list[dict[str, Any]] = [
        {"name": name, "kept_layers": kept, "kl": kl[name], "tokens": spent[name], "chosen": name == chosen}
        for name, kept in found.items()
    ]
    return Choice(found[chosen], scores.tolist(), candidates)
