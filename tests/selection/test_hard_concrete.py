"""Sheared-LLaMA's gates and its constrained search."""

import io

import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import gumbel_noise, uniform_noise
from megaprune.selection.hard_concrete import HardConcrete, expected_open, hard_concrete, never_all_open
from megaprune.utils.errors import MegapruneError, UsageError

PROTECTED = frozenset({0, 11})
SIX = Budget.of_layers(12, 6)


def test_gates_are_open_and_closed_as_often_as_expected():
    draws = torch.stack([uniform_noise(5, 0, step) for step in range(4000)])
    assert draws.min() > 0 and draws.max() < 1 and draws.mean() == pytest.approx(0.5, abs=0.01)
    log_alpha = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])
    gates = hard_concrete(log_alpha, draws)
    assert gates.min() == 0 and gates.max() == 1
    torch.testing.assert_close((gates > 0).float().mean(0), expected_open(log_alpha), atol=0.03, rtol=0)
    log_alpha = torch.randn(5, dtype=torch.float64, requires_grad=True)
    inner = torch.full((5,), 0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: hard_concrete(a * 0.1, inner), log_alpha)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ([1.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
        ([1.0, 0.9, 0.8], [1.0, 0.9, 0.1]),
        ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]),
        ([0.3, 0.2, 0.9], [0.3, 0.2, 0.9]),
    ],
)
def test_gates_are_closed_by_a_layer_in_all(gates, expected):
    gates = torch.tensor(gates, requires_grad=True)
    closed = never_all_open(gates)
    torch.testing.assert_close(closed, torch.tensor(expected))
    (grad,) = torch.autograd.grad(closed.sum(), gates)
    assert grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_no_step_of_a_search_is_the_whole_model(seed):
    """Such a model would be its own teacher, and its gradient rounding noise."""
    search = HardConcrete(SIX, PROTECTED, 40, seed=seed)
    for step in range(40):
        assert (1 - search.mask(step)).sum() > 0.999
        search.update(torch.zeros(12), step)
    everything_protected_but_one = HardConcrete(Budget.of_layers(3, 2), frozenset({0, 2}), 10)
    assert everything_protected_but_one.mask(0).tolist() == [1.0, 0.0, 1.0]


def searched(harm, seed, budget=SIX, num_steps=200):
    search = HardConcrete(budget, PROTECTED, num_steps, seed=seed)
    for step in range(num_steps):
        mask = search.mask(step)
        assert mask.min() >= 0 and mask.max() <= 1 and mask[[0, 11]].eq(1).all()
        mask.requires_grad_()
        (grad,) = torch.autograd.grad(((1 - mask) * harm).sum(), mask)
        search.update(grad, step)
    return search


@pytest.mark.parametrize(("num_steps", "seed"), [(200, 0), (200, 1), (200, 2), (50, 0), (50, 1), (20, 0), (1000, 0)])
def test_search_finds_the_useful_layers_and_meets_its_target(num_steps, seed):
    harm = torch.zeros(12)
    harm[[2, 5, 6, 9]] = torch.tensor([1.0, 0.5, 0.8, 0.6])
    search = searched(harm, seed, num_steps=num_steps)
    assert search.kept_layers() == [0, 2, 5, 6, 9, 11]
    gone = 1 - expected_open(search.scores)[1:11]
    assert gone.sum() == pytest.approx(6, abs=1.0)


@pytest.mark.parametrize("first_useless", range(1, 6))
def test_search_finds_a_planted_segment(first_useless):
    harm = torch.full((12,), 0.5)
    harm[first_useless : first_useless + 6] = 0.0
    kept = searched(harm, seed=first_useless).kept_layers()
    assert kept == [layer for layer in range(12) if not first_useless <= layer < first_useless + 6]


def test_parameters_are_a_budget_too():
    budget = Budget((10, 10, 10, *[100] * 9), 455)
    kept = searched(torch.linspace(0.1, 2, 12), 0, budget).kept_layers()
    cost = sum(budget.costs[layer] for layer in kept)
    left = set(range(12)) - set(kept)
    assert cost <= 455 and all(cost + budget.costs[i] > 455 for i in left) and set(kept) >= PROTECTED


def test_target_rises_linearly():
    search = HardConcrete(SIX, PROTECTED, 100, ramp=0.2)
    assert [search.target(step) for step in (0, 9, 19, 99)] == pytest.approx([0.025, 0.25, 0.5, 0.5])


@pytest.mark.parametrize("stop", [0, 1, 17])
def test_resumed_search_goes_on_bit_for_bit(stop):
    def go(search, steps):
        for step in steps:
            search.update((search.mask(step) - 0.5) + 0.1 * gumbel_noise(12, 9, step), step)
        return search

    whole = go(HardConcrete(SIX, PROTECTED, 40, seed=1), range(40))
    saved = io.BytesIO()
    torch.save(go(HardConcrete(SIX, PROTECTED, 40, seed=1), range(stop)).state_dict(), saved)
    saved.seek(0)
    resumed = HardConcrete(SIX, PROTECTED, 40, seed=1)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(go(resumed, range(stop, 40)).scores, whole.scores)
    with pytest.raises(MegapruneError, match="the saved search has seed = 1"):
        HardConcrete(SIX, PROTECTED, 40, seed=2).load_state_dict(whole.state_dict())


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="--num-layers-to-prune"):
        HardConcrete(Budget.of_layers(12, 1), PROTECTED, 10)
    with pytest.raises(MegapruneError, match="search step 3 is not finite"):
        HardConcrete(SIX, PROTECTED, 10).update(torch.full((12,), torch.inf), 3)
