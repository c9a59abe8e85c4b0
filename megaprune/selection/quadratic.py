"""Selection by a quadratic model of the loss of a mask (`--method quadratic`): measure, fit, minimize, repeat."""

import math
import random
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from megaprune.selection.branch_and_bound import minimizers
from megaprune.selection.budget import Budget
from megaprune.selection.evaluator import Evaluator
from megaprune.selection.masks import masks_of, sets_without_each, shared_cost
from megaprune.selection.quadratic_fit import Quadratic, fit
from megaprune.selection.registry import HELD_OUT_WINDOWS, Choice
from megaprune.utils.errors import UsageError

# Pairs of layers up to this distance are measured: they interact most.
_NEAR = 2
# Sets measured before the first fit, per removable layer, and at least.
_INITIAL, _FEWEST_INITIAL = 1.0, 6
# Sets measured in each round, per removable layer, and at least.
_BATCH, _SMALLEST_BATCH = 0.25, 4
# Rounds that a budget pays for in any case, and at most.
_ROUNDS, _MOST_ROUNDS = 5, 12
# Spreads of the noise with which initial sets are drawn around the best guess, against that of the layers' losses.
_TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
# The number of sets that are compared on held-out text.
_FINALISTS = 4
_TRIES = 20


@dataclass
class QuadraticSearch:
    """Search for the best set of kept layers by a quadratic model that is fitted again after each round.

    Args:
        measured: the losses of the sets measured so far, of the final size, by removed layers.
    """

    evaluator: Evaluator
    budget: Budget
    protected: Set[int]
    seed: int = 0
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)

    def measure(self, kept_sets: Sequence[Sequence[int]]) -> None:
        """Measure sets of kept layers that fit the budget."""
        losses = self.evaluator.losses(kept_sets)
        self.measured.update({self.gone(kept): loss for kept, loss in zip(kept_sets, losses, strict=True)})

    def guides(self) -> list[Quadratic]:
        """Measure the layers and the near pairs of layers alone. Return the sum of the layers' losses, and this sum
        with the pairs' interactions.
        """
        near = near_pairs(self.budget, self.protected)
        # together, so that sets with a common prefix share it
        self.evaluator.losses([*sets_without_each(self.budget, self.protected), *self._without(near)])
        layers = self.sum_of_layers()
        linear, pairs = layers.linear, [row.copy() for row in layers.pairs]
        for (i, j), loss in zip(near, self.evaluator.losses(self._without(near)), strict=True):
            if math.isfinite(loss):
                pairs[i][j] = pairs[j][i] = loss - linear[i] - linear[j]
        return [Quadratic(linear, pairs), layers]

    def sum_of_layers(self) -> Quadratic:
        """Measure the layers alone, and return the sum of their losses."""
        alone = self.evaluator.without_each(self.protected).tolist()
        most = max(filter(math.isfinite, alone), default=0.0)
        # a layer without which the loss is not finite is at least as bad as the worst of the others
        linear = [
            0.0 if layer in self.protected else loss if math.isfinite(loss) else 10 * most + 1
            for layer, loss in enumerate(alone)
        ]
        return Quadratic(linear, [[0.0] * len(linear) for _ in linear])

    def begin(self, guides: Sequence[Quadratic], affordable: Callable[[Sequence[Sequence[int]]], int]) -> None:
        """Measure sets around the best guess, and sets that are more and more random."""
        guide, free = guides[0], self._free()
        number = num_initial(len(free))
        drawn = minimizers(guide, self.budget, self.protected, max(1, number // 3), self.measured)
        rng, met = random.Random(self.seed), {*map(tuple, drawn), *(tuple(self._kept(gone)) for gone in self.measured)}
        losses = [math.log(max(guide.linear[layer] / self.budget.costs[layer], 1e-12)) for layer in free]
        mean = sum(losses) / len(losses)
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses)) or 1.0
        for i in range(_TRIES * number):
            if len(drawn) == number:
                break
            noise = _TEMPERATURES[i % len(_TEMPERATURES)] * spread
            draw = {layer: loss + noise * _gumbel(rng) for layer, loss in zip(free, losses, strict=True)}
            kept = self.budget.take(sorted(free, key=lambda layer: -draw[layer]), self.protected)
            if tuple(kept) not in met:
                met.add(tuple(kept))
                drawn.append(kept)
        self.measure(drawn[: affordable(drawn)])

    def improve(
        self,
        guides: Sequence[Quadratic],
        affordable: Callable[[Sequence[Sequence[int]]], int],
        rounds: int = _MOST_ROUNDS,
    ) -> None:
        """Measure in each round the best sets by the model fitted to all that was measured. End when there are no new
        ones, the tokens are spent, or after a number of rounds.
        """
        batch = size_of_batch(len(self._free()))
        for _ in range(rounds):
            if not any(map(math.isfinite, self.measured.values())):
                return
            found = minimizers(fit(self.measured, guides), self.budget, self.protected, batch, self.measured)
            found = found[: affordable(found)]
            if not found:
                return
            self.measure(found)

    def best(self, count: int) -> list[list[int]]:
        """Return the best measured sets of kept layers, the best first."""
        order = sorted(self.measured, key=lambda gone: (self.measured[gone], gone))
        return [self._kept(gone) for gone in order[:count]]

    def _free(self) -> list[int]:
        return [layer for layer in range(self.budget.num_layers) if layer not in self.protected]

    def gone(self, kept: Sequence[int]) -> tuple[int, ...]:
        """Return the removed layers for the kept ones."""
        return tuple(sorted(set(range(self.budget.num_layers)) - set(kept)))

    def _kept(self, gone: Sequence[int]) -> list[int]:
        return [layer for layer in range(self.budget.num_layers) if layer not in gone]

    def _without(self, gone_sets: Sequence[Sequence[int]]) -> list[list[int]]:
        return [self._kept(gone) for gone in gone_sets]


def near_pairs(budget: Budget, protected: Set[int]) -> list[tuple[int, int]]:
    """Return the pairs of removable layers that are measured alone."""
    free = [layer for layer in range(budget.num_layers) if layer not in protected]
    return [(i, j) for i in free for j in free if 0 < j - i <= _NEAR]


def num_initial(num_free: int) -> int:
    """Return the number of sets that are measured before the first fit."""
    return max(_FEWEST_INITIAL, round(_INITIAL * num_free))


def size_of_batch(num_free: int) -> int:
    """Return the number of sets that are measured in each round."""
    return max(_SMALLEST_BATCH, round(_BATCH * num_free))


def passes(budget: Budget, protected: Set[int]) -> float:
    """Return the maximum cost of the guides, the initial sets, some rounds, and the final comparison, in passes of the
    windows through all layers.
    """
    layers, most = budget.num_layers, _most_kept(budget, protected)
    pairs = [[layer for layer in range(layers) if layer not in pair] for pair in near_pairs(budget, protected)]
    guides = shared_cost(masks_of([*sets_without_each(budget, protected), *pairs], layers), "kl")
    num_free = layers - len(protected)
    sets = num_initial(num_free) + _ROUNDS * size_of_batch(num_free)
    measured = (sets * most + (1 + _ROUNDS) * layers) / layers
    return guides + measured + HELD_OUT_WINDOWS * _layers_compared(budget, protected) / layers


def num_windows(budget: Budget, protected: Set[int], tokens: int, seq_length: int, asked: bool) -> int:
    """Return the number of calibration windows with which the method stays within a number of tokens; at least one.

    Raises:
        UsageError: the user asked for this budget, and it is too small for one.
    """
    window = passes(budget, protected) * seq_length
    if asked and tokens < window:
        raise UsageError(f"--selection-budget {tokens} is too small: give at least {math.ceil(window)}")
    return max(1, int(tokens / window))


def choose_by_quadratic(
    evaluator: Evaluator, held_out: Evaluator, budget: Budget, protected: Set[int], tokens: int, seed: int = 0
) -> Choice:
    """Return the best set that the search measured, by KL on calibration text that it did not use.

    Args:
        tokens: the budget, in tokens that run forward through all layers.
        seed: seed of the initial sets.
    """
    budget.check(protected)
    search = QuadraticSearch(evaluator, budget, protected, seed)
    final = held_out.tokens_of(_layers_compared(budget, protected))

    def affordable(sets: Sequence[Sequence[int]]) -> int:
        return max(0 if search.measured else 1, evaluator.affordable(sets, tokens - evaluator.tokens - final))

    with evaluator.counting() as cost:
        guides = search.guides()
        search.begin(guides, affordable)
        search.improve(guides, affordable)
        spent = cost()
    finalists = search.best(_FINALISTS)
    kl = held_out.losses(finalists)
    chosen = min(range(len(finalists)), key=lambda i: kl[i])
    candidates: list[dict[str, Any]] = [
        {
            "name": f"quadratic, number {i + 1}",
            "kept_layers": kept,
            "kl": kl[i],
            "tokens": 0 if i else spent,
            "chosen": i == chosen,
        }
        for i, kept in enumerate(finalists)
    ]
    return Choice(finalists[chosen], None, candidates)


def _most_kept(budget: Budget, protected: Set[int]) -> int:
    cheapest_first = sorted(set(range(budget.num_layers)) - protected, key=lambda layer: budget.costs[layer])
    return len(budget.take(cheapest_first, protected))


def _layers_compared(budget: Budget, protected: Set[int]) -> int:
    """Return the maximum number of layers that run in the final comparison."""
    return budget.num_layers + _FINALISTS * _most_kept(budget, protected)


def _gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))
