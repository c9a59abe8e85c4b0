"""`--method auto`: the best of several methods' choices and of its swaps, within a budget of tokens."""

from collections.abc import Sequence
from typing import Any

from megaprune.importance.evaluator import Judge, masks_of, sets_without_each
from megaprune.importance.measures import shared_cost
from megaprune.importance.methods import Choice
from megaprune.selection.budget import Budget
from megaprune.selection.greedy import greedy_layers, num_layers_run
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.local_search import best_of, improve
from megaprune.selection.one_shot import top_layers
from megaprune.selection.segments import best_window, windows
from megaprune.utils.errors import UsageError

# The final judgement sees so many times the windows of a pass before.
HELD_OUT_WINDOWS = 4
# Of the budget, what the cheap candidates and the final judgement may take, and E3's search; swaps get what is left.
_CANDIDATES_SHARE = 0.7
_SEARCH_SHARE = 0.15
# A search of fewer steps would only hand back the scores that it began with.
_FEWEST_STEPS = 8
_MOST_STEPS = 60
# How many of the candidates are improved by swaps: a second one leads elsewhere where the first is a dead end.
_SWAPPED = 2
# kl-init, block influence, best window, greedy, search, and what swaps make of some
_MOST_CANDIDATES = 5 + _SWAPPED


def passes_of_candidates(budget: Budget, protected: frozenset[int]) -> float:
    """What the candidates and the final judgement cost at most, in passes of a judge's windows through all layers."""
    layers = budget.num_layers
    each = shared_cost(masks_of(sets_without_each(budget, protected), layers), "kl")
    segments = windows(budget, protected)
    contiguous = shared_cost(masks_of(segments, layers), "kl") if segments else 0.0
    greedy = num_layers_run(budget, protected) / layers
    final = HELD_OUT_WINDOWS * _layers_of_judgement(budget, protected) / layers
    return each + 1 + contiguous + greedy + final


def _layers_of_judgement(budget: Budget, protected: frozenset[int]) -> int:
    """What runs at most when the candidates are judged: the original, and the layers that each keeps."""
    cheapest_first = sorted(set(range(budget.num_layers)) - protected, key=lambda layer: budget.costs[layer])
    return budget.num_layers + _MOST_CANDIDATES * len(budget.take(cheapest_first, protected))


def num_windows(budget: Budget, protected: frozenset[int], tokens: int, seq_length: int, asked: bool) -> int:
    """How many calibration windows a pass of `auto` sees, so that it stays within so many tokens; at least one.

    Raises:
        UsageError: the user asked for this budget, and it is too small for one.
    """
    window = passes_of_candidates(budget, protected) * seq_length / _CANDIDATES_SHARE
    if asked and tokens < window:
        raise UsageError(f"--selection-budget {tokens} is too little: give at least {round(window) + 1}")
    return max(1, int(tokens / window))


def choose_automatically(
    judge: Judge, held_out: Judge, budget: Budget, protected: frozenset[int], tokens: int, seed: int = 0
) -> Choice:
    """The best of several methods' choices, and of the improvement by swaps of the best two, by KL on calibration text
    that none of them saw: never worse than a member by that measure.

    CLP is there as its oracle, the best of all contiguous segments, which costs less than its search. E3's search
    runs with frozen weights, where the budget has room for it.

    Args:
        tokens: the budget, in tokens forward through all layers.
        seed: of the search's noise.
    """
    found: dict[str, list[int]] = {}
    spent: dict[str, int] = {}

    def enter(name: str, kept: Sequence[int] | None, cost: int) -> None:
        if kept is not None:
            found[name], spent[name] = list(kept), cost

    with judge.counting() as cost:
        kl = judge.without_each(protected)
        scores = scores_from_kl(kl, protected, 1.0, budget.costs)
        enter("kl-init", top_layers(scores, budget, protected), cost())
    with judge.counting() as cost:
        enter("block influence", top_layers(judge.block_influence(), budget, protected), cost())
    with judge.counting() as cost:
        enter("best window", best_window(budget, protected, judge.losses), cost())
    with judge.counting() as cost:
        enter("greedy", greedy_layers(budget, protected, judge.losses), cost())
    steps = min(_MOST_STEPS, int(_SEARCH_SHARE * tokens / judge.tokens_of_a_gradient()))
    if steps >= _FEWEST_STEPS:
        with judge.counting() as cost:
            search = GumbelTopK(scores, budget, protected, steps, seed=seed, lr=0.1, ramp=0.5)
            for step in range(steps):
                search.update(judge.mask_gradient(search.mask(step), step), step)
            enter("e3, weights frozen", search.kept_layers(), cost())
    final = held_out.tokens_of(_layers_of_judgement(budget, protected))

    def affordable(sets: Sequence[Sequence[int]]) -> int:
        return judge.affordable(sets, tokens - judge.tokens - final)

    beginnings = {tuple(kept): name for name, kept in reversed(found.items())}
    losses = dict(zip(beginnings, judge.losses(list(beginnings)), strict=True))
    for kept in sorted(beginnings, key=lambda kept: losses[kept])[:_SWAPPED]:
        with judge.counting() as cost:
            swapped, _ = improve(kept, losses[kept], budget, protected, judge.losses, affordable)
            enter(f"{beginnings[kept]}, swapped", swapped, cost())

    kl = dict(zip(found, held_out.losses(list(found.values())), strict=True))
    chosen = best_of(found, kl)
    candidates: list[dict[str, Any]] = [
        {"name": name, "kept_layers": kept, "kl": kl[name], "tokens": spent[name], "chosen": name == chosen}
        for name, kept in found.items()
    ]
    return Choice(found[chosen], scores.tolist(), candidates, judge.tokens + held_out.tokens)
