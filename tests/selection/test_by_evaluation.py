"""Methods that compare sets of layers by a loss, on losses with a known best set."""

import itertools
import random

import pytest

from megaprune.selection.budget import Budget
from megaprune.selection.evolution import SIFTINGS, evolve
from megaprune.selection.greedy import greedy_layers, num_layers_run
from megaprune.selection.local_search import best_of, improve, neighbors
from megaprune.selection.masks import masks_of, shared_cost
from megaprune.selection.segments import best_segment, segments

PROTECTED = frozenset({0, 11})
SIX = Budget.of_layers(12, 6)
# dense layers in front, MoE layers behind
PRICED = Budget((10, 10, 10, *[100] * 9), 455)
USEFUL = (2, 5, 6, 9)


class Planted:
    """Loss by the number of useful layers that are removed; counts the sets that were evaluated."""

    def __init__(self, useful=USEFUL):
        self.useful, self.seen, self.shares = useful, [], []

    def __call__(self, sets, share=1.0):
        self.seen += [tuple(kept) for kept in sets]
        self.shares.append(share)
        return [sum(1.0 + 0.1 * i for i, layer in enumerate(self.useful) if layer not in kept) for kept in sets]


def redundant(sets):
    """Loss under which layers come in redundant pairs: of each pair, one must stay."""
    return [sum(not {layer, layer + 1} & set(kept) for layer in range(2, 10, 2)) for kept in sets]


def is_exact(kept, budget):
    cost = sum(budget.costs[layer] for layer in kept)
    left = set(range(12)) - set(kept)
    return kept == sorted(kept) and cost <= budget.limit and all(cost + budget.costs[i] > budget.limit for i in left)


def test_greedy_finds_planted_layers_and_redundancy():
    assert greedy_layers(SIX, PROTECTED, Planted()) == [0, 2, 5, 6, 9, 11]
    assert redundant([greedy_layers(SIX, PROTECTED, redundant)]) == [0]
    planted = Planted()
    greedy_layers(SIX, PROTECTED, planted)
    assert len(planted.seen) == 10 + 9 + 8 + 7 + 6 + 5


@pytest.mark.parametrize(("budget", "seed"), [(SIX, 0), (SIX, 1), (PRICED, 0), (PRICED, 1)])
def test_greedy_runs_no_more_layers_than_it_says(budget, seed):
    rng, layers = random.Random(seed), 0.0

    def evaluate(sets):
        nonlocal layers
        layers += 12 * shared_cost(masks_of(sets, 12), "kl")
        return [rng.random() for _ in sets]

    greedy_layers(budget, PROTECTED, evaluate)
    assert 0.5 * num_layers_run(budget, PROTECTED) < layers <= num_layers_run(budget, PROTECTED)


def test_greedy_by_price():
    kept = greedy_layers(PRICED, PROTECTED, Planted((1, 4, 7)))
    assert is_exact(kept, PRICED) and {0, 1, 4, 7, 11} <= set(kept)


def test_segments_are_all_those_between_protected_layers():
    found = segments(SIX, PROTECTED)
    assert len(found) == 5 and all(len(kept) == 6 and set(kept) >= PROTECTED for kept in found)
    assert found[0] == [0, 7, 8, 9, 10, 11] and found[-1] == [0, 1, 2, 3, 4, 11]
    assert len(segments(SIX, frozenset())) == 7
    assert segments(SIX, frozenset({5})) == [[0, 1, 2, 3, 4, 5]]
    assert segments(SIX, frozenset({3, 8})) == []
    assert all(is_exact(kept, PRICED) for kept in segments(PRICED, PROTECTED))


def test_best_segment_is_the_planted_one():
    assert best_segment(SIX, PROTECTED, Planted((1, 2, 9, 10))) == [0, 1, 2, 9, 10, 11]
    assert best_segment(SIX, frozenset({3, 8}), Planted()) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolution_finds_planted_layers(seed):
    start, planted = [0, 1, 3, 4, 7, 11], Planted()
    assert evolve(start, SIX, PROTECTED, planted, generations=40, seed=seed) == [0, 2, 5, 6, 9, 11]
    assert evolve(start, SIX, PROTECTED, Planted(), generations=0, seed=seed) == start
    assert {share for _, share in SIFTINGS} == set(planted.shares)
    for kept in planted.seen:
        assert is_exact(list(kept), SIX) and set(kept) >= PROTECTED


@pytest.mark.parametrize("first_useless", [1, 3, 5])
def test_evolution_finds_a_planted_segment(first_useless):
    """Only the whole segment can be removed without harm: each of its layers undoes the others' effect."""
    segment = set(range(first_useless, first_useless + 6))

    def evaluate(sets, share=1.0):
        return [
            sum(layer not in kept for layer in range(12) if layer not in segment) + 0.5 * bool(segment & set(kept))
            for kept in sets
        ]

    rest = sorted(set(range(12)) - segment)
    for seed in range(3):
        assert evolve([0, 1, 3, 5, 8, 11], SIX, PROTECTED, evaluate, generations=40, seed=seed) == rest


def test_evolution_is_elitist_and_repeatable():
    losses = []
    for generations in (0, 5, 20):
        kept = evolve([0, 1, 3, 4, 7, 11], SIX, PROTECTED, Planted(), generations, seed=3)
        losses += Planted()([kept])
        assert kept == evolve([0, 1, 3, 4, 7, 11], SIX, PROTECTED, Planted(), generations, seed=3)
    assert losses == sorted(losses, reverse=True)
    assert is_exact(evolve(PRICED.fewest_layers(PROTECTED), PRICED, PROTECTED, Planted(), 20), PRICED)


def test_neighbors_are_the_single_swaps():
    kept = [0, 1, 2, 3, 4, 11]
    found = list(neighbors(kept, SIX, PROTECTED))
    assert len(found) == len({tuple(other) for other in found}) == 4 * 6
    assert all(len(set(kept) - set(other)) == 1 and is_exact(other, SIX) for other in found)
    assert all(is_exact(other, PRICED) for other in neighbors(PRICED.fewest_layers(PROTECTED), PRICED, PROTECTED))


def test_swaps_descend_to_the_best_set_within_their_number():
    start = [0, 1, 2, 3, 4, 11]
    planted = Planted()
    best, loss = improve(start, Planted()([start])[0], SIX, PROTECTED, planted, len)
    assert (best, loss) == ([0, 2, 5, 6, 9, 11], 0.0) and len(planted.seen) == 4 * 24
    few = Planted()
    kept, _ = improve(
        start, Planted()([start])[0], SIX, PROTECTED, few, lambda sets: min(len(sets), 30 - len(few.seen))
    )
    assert len(few.seen) == 30 and is_exact(kept, SIX)
    assert improve(start, -1.0, SIX, PROTECTED, Planted(), len)[0] == start
    assert improve(start, 1.0, SIX, PROTECTED, Planted(), lambda sets: 0) == (start, 1.0)


def test_greedy_and_swaps_reach_the_best_of_all_sets():
    """Compare with an enumeration, on a loss in which layers depend on each other."""

    def loss(sets):
        def one(kept):
            gaps = [b - a for a, b in itertools.pairwise(kept)]
            return sum(gap**2 for gap in gaps) + 0.01 * sum(kept)

        return [one(kept) for kept in sets]

    every = [sorted({0, 11, *inner}) for inner in itertools.combinations(range(1, 11), 4)]
    best = min(loss(every))
    kept = greedy_layers(SIX, PROTECTED, loss)
    _, found = improve(kept, loss([kept])[0], SIX, PROTECTED, loss, len)
    assert found == pytest.approx(best)


def test_the_best_candidate_is_the_first_of_equals():
    assert best_of({"a": [0], "b": [1], "c": [2]}, {"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
