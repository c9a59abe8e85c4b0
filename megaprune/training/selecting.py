"""Methods that choose layers: by passes over calibration data, or, made here, learners beside the training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch

from megaprune.config import Config
from megaprune.distillation.losses import VocabShard
from megaprune.errors import MegapruneError, UsageError
from megaprune.mcore.gated_layer import LayerGate
from megaprune.selection.budget import Budget
from megaprune.selection.concave_gate import ConcaveGate
from megaprune.selection.evolution import evolve
from megaprune.selection.greedy import greedy_layers, num_evaluations
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.selection.hard_concrete import HardConcrete
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.local_search import best_of, improve
from megaprune.selection.one_shot import top_layers
from megaprune.selection.selector import Selector
from megaprune.selection.windows import best_window, windows
from megaprune.training.data import Batch
from megaprune.training.scoring import block_influence, mask_gradient, mask_losses

# Shortened LLaMA keeps the first four layers and the last two.
_SHORTENED_KEEPS = (4, 2)
# calibration windows behind each step of CLP's search
_WINDOWS_OF_A_STEP = 4
# Of `auto`'s passes, those that are left for swaps.
_SWAPS_SHARE = 0.4
# Its final judgement sees so many times the windows of a pass before.
HELD_OUT_WINDOWS = 4


@dataclass
class Choice:
    """What a method came to."""

    kept_layers: list[int]
    scores: list[float] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0


class Judge:
    """Losses of the original model without some of its layers, on calibration data. Collective.

    Args:
        windows: gives this replica's share of so many calibration windows, behind so many; the same windows at every
            layout.
        num_windows: how many there are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        gate: LayerGate,
        windows: Callable[[int, int], Sequence[Batch]],
        num_windows: int,
        budget: Budget,
        shard: VocabShard,
    ) -> None:
        self.model, self.tokens = model, 0
        self._gate, self._shard, self._budget = gate, shard, budget
        self._windows = lru_cache(maxsize=4)(windows)
        self._num_windows = num_windows

    def losses(
        self, kept_sets: Sequence[Sequence[int]], loss: Literal["kl", "ce"] = "kl", share: float = 1.0
    ) -> list[float]:
        """One loss for each set of kept layers, in nats per token; on a share of the windows."""
        num_layers, batches = self._budget.num_layers, self._taken(len(kept_sets) + (loss == "kl"), share)
        masks = torch.zeros(len(kept_sets), num_layers)
        for mask, kept in zip(masks, kept_sets, strict=True):
            mask[list(kept)] = 1
        found = mask_losses(self.model, self._gate, batches, masks, self._shard, loss)
        if not found.isfinite().any():
            raise MegapruneError("no loss on the calibration windows is finite: look at the model and --train-data")
        return found.nan_to_num(nan=float("inf")).tolist()

    def without_each(self, protected: frozenset[int], loss: Literal["kl", "ce"] = "kl") -> torch.Tensor:
        """The loss without each layer, [num_layers]; of protected layers it is infinite, and not measured."""
        num_layers = self._budget.num_layers
        free = [layer for layer in range(num_layers) if layer not in protected]
        found = torch.full((num_layers,), float("inf"))
        if free:
            kept = [[other for other in range(num_layers) if other != layer] for layer in free]
            found[free] = torch.tensor(self.losses(kept, loss))
        return found

    def mask_gradient(self, mask: torch.Tensor, step: int) -> torch.Tensor:
        """The gradient of the KL in a soft mask, [num_layers], on a few windows, others at each step."""
        count = min(_WINDOWS_OF_A_STEP, self._num_windows)
        batches = self._windows(count, step * count % max(1, self._num_windows - count + 1))
        self.tokens += 2 * count * batches[0].tokens.shape[1]
        return mask_gradient(self.model, self._gate, batches, mask, self._shard)[1]

    def block_influence(self) -> torch.Tensor:
        """ShortGPT's score of each layer, [num_layers]."""
        return block_influence(self.model, self._taken(1), self._budget.num_layers)

    def _taken(self, passes: int, share: float = 1.0) -> Sequence[Batch]:
        """A share of the windows, whose tokens are booked so many times."""
        count = max(1, round(share * self._num_windows))
        batches = self._windows(count, 0)
        self.tokens += passes * count * batches[0].tokens.shape[1]
        return batches


def choose_layers(
    method: str,
    judge: Judge,
    budget: Budget,
    protected: frozenset[int],
    scale: float = 1.0,
    seed: int = 0,
    steps: int = 60,
) -> Choice:
    """The layers that a method keeps.

    Args:
        scale: of the scores of `kl-init`, as the search would start from them.
        steps: of gradient, for `clp`.

    Raises:
        UsageError: the method can't choose within this budget.
    """
    if method == "kl-init":
        scores = scores_from_kl(judge.without_each(protected), protected, scale, budget.costs)
        return Choice(top_layers(scores, budget, protected), scores.tolist(), tokens=judge.tokens)
    if method in ("shortgpt", "minitron"):
        scores = judge.block_influence() / torch.tensor(budget.costs)
        return Choice(top_layers(scores, budget, protected), scores.tolist(), tokens=judge.tokens)
    if method == "shortened":
        return _shortened(judge, budget, protected)
    if method == "sleb":
        kept = greedy_layers(budget, protected, lambda sets: judge.losses(sets, "ce"))
        return Choice(kept, tokens=judge.tokens)
    if method == "exhaustive":
        kept = best_window(budget, protected, judge.losses)
        if kept is None:
            raise UsageError(
                "--method exhaustive: no contiguous segment between protected layers is long enough; protect fewer"
            )
        return Choice(kept, tokens=judge.tokens)
    if method == "clp":
        return _clp(judge, budget, protected, steps)
    if method == "evolution":
        start = top_layers(judge.block_influence() / torch.tensor(budget.costs), budget, protected)
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
    )


def _clp(judge: Judge, budget: Budget, protected: frozenset[int], steps: int) -> Choice:
    try:
        gate = ConcaveGate(budget, protected, steps)
    except UsageError:
        raise
    except MegapruneError as error:
        raise UsageError(f"--method clp: {error}") from None
    for step in range(steps):
        gate.update(judge.mask_gradient(gate.mask(step), step), step)
    ends = gate.kept_sets()
    losses = judge.losses(ends)
    kept = ends[min(range(len(ends)), key=lambda i: losses[i])]
    return Choice(kept, tokens=judge.tokens)


def _shortened(judge: Judge, budget: Budget, protected: frozenset[int]) -> Choice:
    first, last = _SHORTENED_KEEPS
    keeps = protected | set(range(first)) | set(range(budget.num_layers - last, budget.num_layers))
    room = sum(budget.costs[layer] for layer in keeps)
    if room > budget.limit:
        raise UsageError(
            f"--method shortened keeps the first {first} layers and the last {last}, which is more than stays: prune "
            "less, or choose another method"
        )
    scores = judge.without_each(keeps, "ce") / torch.tensor(budget.costs)
    return Choice(top_layers(scores, budget, keeps), scores.tolist(), tokens=judge.tokens)


def auto_passes(budget: Budget, protected: frozenset[int]) -> int:
    """How many passes over its calibration data `auto` makes at most."""
    free = budget.num_layers - len(protected)
    final = HELD_OUT_WINDOWS * (5 + 1)
    fixed = 1 + (free + 1) + 2 * len(windows(budget, protected)) + 2 * num_evaluations(budget, protected) + final
    return round(fixed / (1 - _SWAPS_SHARE))


def choose_automatically(judge: Judge, held_out: Judge, budget: Budget, protected: frozenset[int]) -> Choice:
    """The best of several methods' choices, and of the best's improvement by swaps, by KL on calibration text that
    none of them saw: never worse than a member by that measure."""
    found: dict[str, list[int]] = {}
    tokens: dict[str, int] = {}

    def enter(name: str, kept: list[int] | None, before: int) -> None:
        if kept is not None:
            found[name], tokens[name] = kept, judge.tokens - before

    scores = scores_from_kl(judge.without_each(protected), protected, 1.0, budget.costs)
    enter("kl-init", top_layers(scores, budget, protected), 0)
    before = judge.tokens
    influence = judge.block_influence() / torch.tensor(budget.costs)
    enter("block influence", top_layers(influence, budget, protected), before)
    before = judge.tokens
    enter("best window", best_window(budget, protected, judge.losses), before)
    before = judge.tokens
    enter("greedy", greedy_layers(budget, protected, judge.losses), before)
    before = judge.tokens
    losses = dict(zip(found, judge.losses(list(found.values())), strict=True))
    best = best_of(found, losses)
    most = round(_SWAPS_SHARE * auto_passes(budget, protected))
    swapped, _, _ = improve(found[best], losses[best], budget, protected, judge.losses, most)
    enter(f"{best}, swapped", swapped, before)

    kl = dict(zip(found, held_out.losses(list(found.values())), strict=True))
    chosen = best_of(found, kl)
    candidates = [
        {"name": name, "kept_layers": kept, "kl": kl[name], "tokens": tokens[name], "chosen": name == chosen}
        for name, kept in found.items()
    ]
    return Choice(found[chosen], scores.tolist(), candidates, judge.tokens + held_out.tokens)
