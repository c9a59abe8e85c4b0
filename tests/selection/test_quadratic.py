"""The quadratic selector: its fit, its exact minimum, and its search on losses whose best set is known."""

import itertools
import math
import random
from contextlib import contextmanager

import pytest
import torch

from megaprune.selection import find
from megaprune.selection.branch_and_bound import minimizers
from megaprune.selection.budget import Budget
from megaprune.selection.masks import masks_of, shared_cost
from megaprune.selection.quadratic import QuadraticSearch, choose_by_quadratic, num_windows, passes
from megaprune.selection.quadratic_fit import Quadratic, fit
from megaprune.utils.errors import UsageError

LAYERS = 12
PROTECTED = frozenset({0, 11})
SIX = Budget.of_layers(LAYERS, 6)
# dense layers in front, MoE layers behind
PRICED = Budget((10, 10, 10, *[100] * 9), 455)
WINDOW = 1000


def energies(seed, num_layers=LAYERS, strength=0.3):
    """A quadratic loss of the usual form: layers that differ, and pairs that help or hurt each other."""
    rng = random.Random(seed)
    linear = [rng.lognormvariate(0, 1) for _ in range(num_layers)]
    pairs = [[0.0] * num_layers for _ in range(num_layers)]
    for i, j in itertools.combinations(range(num_layers), 2):
        pairs[i][j] = pairs[j][i] = rng.gauss(0.1, strength) / (j - i) ** 0.5
    return Quadratic(linear, pairs)


def all_sets(budget, protected=PROTECTED):
    """Every set of kept layers within the budget to which no layer can be added."""
    free, costs = [i for i in range(budget.num_layers) if i not in protected], budget.costs
    found = []
    for number in range(len(free) + 1):
        for gone in itertools.combinations(free, number):
            room = budget.limit - sum(cost for i, cost in enumerate(costs) if i not in gone)
            if room >= 0 and all(costs[i] > room for i in gone):
                found.append([i for i in range(budget.num_layers) if i not in gone])
    return found


def gone_of(kept, num_layers=LAYERS):
    return tuple(i for i in range(num_layers) if i not in kept)


class Planted:
    """Evaluator of a loss given by the removed layers, with noise that is the same at each call; counts its cost."""

    def __init__(self, loss, noise=0.0, seed=0, windows=1):
        self.loss, self.noise, self.seed, self.windows, self.tokens = loss, noise, seed, windows, 0
        self.known = {}

    def _measured(self, kept):
        draw = random.Random(f"{self.seed} {kept}").gauss(0, self.noise)
        return self.loss(gone_of(kept)) * math.exp(draw)

    def losses(self, kept_sets, loss="kl", share=1.0):
        new = [kept for kept in dict.fromkeys(map(tuple, kept_sets)) if kept not in self.known]
        if new:
            self.tokens += math.ceil(shared_cost(masks_of(new, LAYERS), loss) * WINDOW * self.windows)
        self.known.update({kept: self._measured(kept) for kept in new})
        return [self.known[tuple(kept)] for kept in kept_sets]

    def without_each(self, protected, loss="kl"):
        found = torch.full((LAYERS,), float("inf"))
        for layer in set(range(LAYERS)) - protected:
            (found[layer],) = self.losses([[i for i in range(LAYERS) if i != layer]])
        return found

    def affordable(self, kept_sets, tokens):
        costs = [shared_cost(masks_of(kept_sets[:n], LAYERS), "kl") * WINDOW for n in range(1, len(kept_sets) + 1)]
        return sum(cost <= tokens for cost in costs)

    @contextmanager
    def counting(self):
        before = self.tokens
        yield lambda: self.tokens - before

    def tokens_of(self, layers):
        return math.ceil(layers / LAYERS * WINDOW * self.windows)


def chosen(loss, budget, tokens, noise=0.0, seed=0):
    """The method's choice, and the share of all sets that are better."""
    evaluator, held_out = Planted(loss, noise, seed), Planted(loss, noise / 2, seed + 1, windows=4)
    choice = choose_by_quadratic(evaluator, held_out, budget, PROTECTED, tokens, seed)
    losses = sorted(loss(gone_of(kept)) for kept in all_sets(budget))
    return choice, losses.index(loss(gone_of(choice.kept_layers))) / len(losses), evaluator.tokens + held_out.tokens


@pytest.mark.parametrize("budget", [SIX, PRICED, Budget((3, 5, 2, 7, 1, 4, 6, 2, 3, 5, 4, 2), 25)])
@pytest.mark.parametrize("seed", range(4))
def test_branch_and_bound_equals_brute_force(budget, seed):
    model = energies(seed, strength=0.6)
    expected = sorted(all_sets(budget), key=lambda kept: model.energy(gone_of(kept)))
    assert minimizers(model, budget, PROTECTED, 5) == expected[:5]
    known = [gone_of(kept) for kept in expected[:3]]
    assert minimizers(model, budget, PROTECTED, 2, known) == expected[3:5]
    assert minimizers(model, budget, PROTECTED, len(expected) + 9) == expected


def test_a_budget_that_keeps_all_layers_or_only_the_protected_ones():
    model = energies(0)
    assert minimizers(model, Budget.of_layers(LAYERS, LAYERS), PROTECTED, 3) == [list(range(LAYERS))]
    assert minimizers(model, Budget.of_layers(LAYERS, 2), PROTECTED, 3) == [[0, 11]]


def test_a_search_that_is_cut_off_returns_the_best_so_far():
    model = energies(1, 40)
    half = Budget.of_layers(40, 20)
    found = minimizers(model, half, frozenset(), 3, most_nodes=200)
    assert len(found) == 3 and all(len(kept) == 20 for kept in found)
    rng = random.Random(0)
    drawn = [model.energy(rng.sample(range(40), 20)) for _ in range(200)]
    assert model.energy(gone_of(found[0], 40)) < min(drawn)


@pytest.mark.parametrize(("name", "loss"), [("none", lambda x: x), ("sqrt", lambda x: x * x), ("log", math.exp)])
def test_the_fit_predicts_sets_that_it_has_not_seen(name, loss):
    model, rng = energies(2), random.Random(0)
    sets = [gone_of(kept) for kept in all_sets(SIX)]
    scale = 3 / max(map(model.energy, sets))
    measured = {gone: loss(scale * model.energy(gone)) for gone in rng.sample(sets, 70)}
    guide = Quadratic(model.linear, [[0.0] * LAYERS] * LAYERS)
    found = fit(measured, [guide])
    assert found.transform == name
    others = [gone for gone in sets if gone not in measured]
    pairs = torch.tensor([[found.energy(gone), model.energy(gone)] for gone in others], dtype=torch.float64)
    ranks = pairs.argsort(0).argsort(0).double()
    assert torch.corrcoef(ranks.T)[0, 1] > 0.95


def test_losses_that_are_not_finite_are_left_out_of_the_fit():
    model = energies(3)
    measured = {gone_of(kept): model.energy(gone_of(kept)) + 5 for kept in all_sets(SIX)[::3]}
    damaged = measured | {gone_of(all_sets(SIX)[1]): math.inf}
    assert fit(measured, [model]) == fit(damaged, [model])


@pytest.mark.parametrize("budget", [SIX, PRICED])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_set_of_a_quadratic_loss_is_found(budget, seed):
    model = energies(seed)
    tokens = int(passes(budget, PROTECTED) * WINDOW) + 1
    choice, better, spent = chosen(lambda gone: 5 + model.energy(gone), budget, tokens, seed=seed)
    assert better == 0 and spent <= tokens
    assert len(choice.candidates) == 4
    assert [c["kept_layers"] for c in choice.candidates if c["chosen"]] == [choice.kept_layers]


def test_noise_costs_little():
    """With 5% of noise in every measurement, where the median set is 1.6 times as bad as the best."""
    shares = []
    for seed in range(8):
        model = energies(seed)
        tokens = int(passes(SIX, PROTECTED) * WINDOW) + 1
        shares.append(chosen(lambda gone, model=model: 5 + model.energy(gone), SIX, tokens, 0.05, seed)[1])
    assert sum(shares) / len(shares) < 0.02 and max(shares) < 0.1


def test_a_loss_that_is_not_finite_is_never_chosen():
    """Sets without layer 4 overflow, alone or with others."""
    model = energies(5)
    tokens = int(passes(SIX, PROTECTED) * WINDOW) + 1
    choice, _, _ = chosen(lambda gone: math.inf if 4 in gone else 5 + model.energy(gone), SIX, tokens)
    assert 4 in choice.kept_layers and math.isfinite(choice.candidates[0]["kl"])


def test_more_tokens_measure_more_sets_and_few_tokens_still_choose():
    model = energies(6)
    found = []
    for tokens in (1, passes(SIX, PROTECTED) * WINDOW, 3 * passes(SIX, PROTECTED) * WINDOW):
        evaluator = Planted(lambda gone: 5 + model.energy(gone))
        search = QuadraticSearch(evaluator, SIX, PROTECTED)
        guides = search.guides()

        def affordable(sets, evaluator=evaluator, search=search, tokens=tokens):
            return max(not search.measured, evaluator.affordable(sets, tokens - evaluator.tokens))

        search.begin(guides, affordable)
        search.improve(guides, affordable)
        found.append(len(search.measured))
    assert found[0] == 1 and found[0] < found[1] < found[2]


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(UsageError, match="--selection-budget 100 is too small: give at least"):
        num_windows(SIX, PROTECTED, 100, 12, asked=True)
    assert num_windows(SIX, PROTECTED, 100, 12, asked=False) == 1
    least = math.ceil(passes(SIX, PROTECTED) * 12)
    assert num_windows(SIX, PROTECTED, 2 * least, 12, asked=True) == 2


def test_the_method_is_registered():
    method = find("quadratic")
    assert method.needs_held_out and method.flags == {"selection_budget", "seed"}
    model = energies(7)
    evaluators = [Planted(lambda gone: 5 + model.energy(gone), windows=windows) for windows in (1, 4)]
    choice = method.choose(SIX, PROTECTED, {"selection_budget": 60_000, "seed": 0}, *evaluators)
    assert len(choice.kept_layers) == 6
