"""Methods that choose layers: by passes over calibration data, or, made here, learners beside the training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megaprune.config.schema import Config
from megaprune.importance.evaluator import Judge
from megaprune.mcore import parallel
from megaprune.selection.budget import Budget
from megaprune.selection.concave_gate import ConcaveGate
from megaprune.selection.evolution import evolve
from megaprune.selection.greedy import greedy_layers
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.selection.hard_concrete import HardConcrete
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.one_shot import top_layers
from megaprune.selection.segments import best_window, windows
from megaprune.selection.selector import Selector
from megaprune.utils.errors import MegapruneError, UsageError

# Shortened LLaMA keeps the first four layers and the last two.
_SHORTENED_KEEPS = (4, 2)


@dataclass
class Choice:
    """What a method came to."""

    kept_layers: list[int]
    scores: list[float] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0


def check_method(method: str, budget: Budget, protected: frozenset[int]) -> None:
    """Refuses what a method can't choose within a budget, before a model is loaded.

    Raises:
        UsageError: names the method.
    """
    if method == "shortened":
        _kept_by_shortened(budget, protected)
    if method == "clp":
        _notch(budget, protected, 1)
    if method == "exhaustive" and not windows(budget, protected):
        raise UsageError(
            "--method exhaustive: no contiguous segment between protected layers is long enough; protect fewer"
        )


def choose_layers(
    method: str,
    judge: Judge,
    budget: Budget,
    protected: frozenset[int],
    scale: float = 1.0,
    seed: int = 0,
    steps: int = 60,
    criterion: str = "perplexity",
) -> Choice:
    """The layers that a method keeps.

    Args:
        scale: of the scores of `kl-init`, as the search would start from them.
        steps: of gradient, for `clp`.
        criterion: of `shortened`.

    Raises:
        UsageError: the method can't choose within this budget.
    """
    if method == "kl-init":
        scores = scores_from_kl(judge.without_each(protected), protected, scale, budget.costs)
        return Choice(top_layers(scores, budget, protected), scores.tolist(), tokens=judge.tokens)
    if method in ("shortgpt", "minitron"):
        scores = judge.block_influence()
        return Choice(top_layers(scores, budget, protected), scores.tolist(), tokens=judge.tokens)
    if method == "shortened":
        return _shortened(judge, budget, protected, criterion)
    if method == "sleb":
        kept = greedy_layers(budget, protected, lambda sets: judge.losses(sets, "ce"))
        return Choice(kept, tokens=judge.tokens)
    if method == "exhaustive":
        check_method(method, budget, protected)
        kept = best_window(budget, protected, judge.losses)
        return Choice(kept, tokens=judge.tokens)
    if method == "clp":
        return _clp(judge, budget, protected, steps)
    if method == "evolution":
        start = top_layers(judge.block_influence(), budget, protected)
        kept = evolve(start, budget, protected, lambda sets, share: judge.losses(sets, "kl", share), 40, seed=seed)
        return Choice(kept, tokens=judge.tokens)
    raise MegapruneError(f"{method} does not choose layers by calibration passes")


def make_selector(
    config: Config, budget: Budget, protected: frozenset[int], scores: Sequence[float] | None
) -> Selector:
    """The learner of a method that searches while it trains.

    Args:
        scores: the layers' first ones, where the method begins from any.
    """
    if config.prune.method == "sheared":
        return HardConcrete(budget, protected, config.search_iters, seed=config.recovery.seed)
    return GumbelTopK(
        torch.tensor(scores),
        budget,
        protected,
        config.search_iters,
        temperature=config.search.gumbel_temperature,
        anneal=config.search.gumbel_anneal,
        lr=config.search.mask_lr,
        seed=config.recovery.seed,
        ramp=config.search.mask_ramp,
        **_of_this_replica(config),
    )


def _of_this_replica(config: Config) -> dict[str, Any]:
    if not config.own_masks:
        return {}
    return {"replica": parallel.data_parallel_rank(), "average": parallel.mean_over_replicas}


def _notch(budget: Budget, protected: frozenset[int], steps: int) -> ConcaveGate:
    try:
        return ConcaveGate(budget, protected, steps)
    except UsageError:
        raise
    except MegapruneError as error:
        raise UsageError(f"--method clp: {error}") from None


def _clp(judge: Judge, budget: Budget, protected: frozenset[int], steps: int) -> Choice:
    gate = _notch(budget, protected, steps)
    for step in range(steps):
        gate.update(judge.mask_gradient(gate.mask(step), step), step)
    ends = gate.kept_sets()
    losses = judge.losses(ends)
    kept = ends[min(range(len(ends)), key=lambda i: losses[i])]
    return Choice(kept, tokens=judge.tokens)


def _kept_by_shortened(budget: Budget, protected: frozenset[int]) -> frozenset[int]:
    first, last = _SHORTENED_KEEPS
    keeps = protected | set(range(first)) | set(range(budget.num_layers - last, budget.num_layers))
    room = sum(budget.costs[layer] for layer in keeps)
    if room > budget.limit:
        raise UsageError(
            f"--method shortened keeps the first {first} layers and the last {last}, which is more than stays: prune "
            "less, or choose another method"
        )
    return keeps


def _shortened(judge: Judge, budget: Budget, protected: frozenset[int], criterion: str) -> Choice:
    keeps = _kept_by_shortened(budget, protected)
    if criterion == "taylor":
        scores = judge.taylor_importance()
    else:
        (whole,) = judge.losses([range(budget.num_layers)], "ce")
        scores = (judge.without_each(keeps, "ce") - whole) / torch.tensor(budget.costs)
    return Choice(top_layers(scores, budget, keeps), scores.tolist(), tokens=judge.tokens)
