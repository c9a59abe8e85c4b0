"""CLP's gate finds the planted segment by gradient alone."""

import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.concave_gate import ConcaveGate, notch
from megaprune.selection.segments import endpoints
from megaprune.utils.errors import MegapruneError, UsageError

PROTECTED = frozenset({0, 15})
FIVE = Budget.of_layers(16, 11)


def test_notch_is_a_segment_when_cold_and_concave_when_warm():
    cold = notch(16, torch.tensor(4.0), 5, 0.02)
    torch.testing.assert_close(cold, torch.tensor([1.0] * 4 + [0.0] * 5 + [1.0] * 7), atol=1e-6, rtol=0)
    warm = notch(16, torch.tensor(4.0), 5, 1.0)
    assert warm.argmin() == 6 and (warm[:7].diff() < 0).all() and (warm[6:].diff() > 0).all()
    torch.testing.assert_close(warm[2:7], warm[6:11].flip(0))
    start = torch.tensor(4.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: notch(16, a, 5, 0.7), start)


def searched(harm, num_steps=60, budget=FIVE, protected=PROTECTED):
    """Return a finished search on a loss to which each layer adds its harm as its gate closes."""
    gate = ConcaveGate(budget, protected, num_steps)
    for step in range(num_steps):
        mask = gate.mask(step).requires_grad_()
        assert all(mask[layer] == 1 for layer in protected)
        (grad,) = torch.autograd.grad(((1 - mask) * harm).sum(), mask)
        gate.update(grad, step)
    return gate


def harm_of(kept, harm):
    return sum(harm[layer].item() for layer in range(16) if layer not in kept)


@pytest.mark.parametrize("start", range(1, 11))
def test_search_finds_the_planted_segment(start):
    layers = torch.arange(16.0)
    harm = 0.1 + ((layers - (start + 2)).abs() - 2).clamp_min(0)  # rises on both sides of the segment
    gate = searched(harm)
    best = min(gate.kept_sets(), key=lambda kept: harm_of(kept, harm))
    assert best == [layer for layer in range(16) if not start <= layer < start + 5]


def test_other_beginnings_find_what_one_would_miss():
    harm = torch.ones(16)
    harm[1:4], harm[8:13] = 0.5, 0.0  # a shallow valley in front, the deep one behind a hill
    best = min(searched(harm, 90).kept_sets(), key=lambda kept: harm_of(kept, harm))
    assert best == [0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15]


@pytest.mark.parametrize("num_steps", [1, 2, 30, 31, 40, 100])
def test_every_beginning_comes_to_its_end(num_steps):
    gate = searched(torch.ones(16), num_steps)
    assert len(gate.state_dict()["ends"]) == min(3, num_steps)
    if num_steps >= 30:
        assert gate.temperature(num_steps - 1) == pytest.approx(0.25)


def test_every_answer_fits():
    for kept in searched(torch.rand(16)).kept_sets():
        assert len(kept) == 11 and set(kept) >= PROTECTED
    one = ConcaveGate(Budget.of_layers(16, 2), PROTECTED, 10)
    assert one.kept_sets() == [[0, 15]]


def test_resumed_search_goes_on_bit_for_bit():
    harm = torch.linspace(0, 1, 16)

    def steps(gate, first, last):
        for step in range(first, last):
            gate.update(-harm * (1 + gate.mask(step)), step)
        return gate

    whole = steps(ConcaveGate(FIVE, PROTECTED, 30), 0, 30)
    saved = steps(ConcaveGate(FIVE, PROTECTED, 30), 0, 7).state_dict()
    resumed = ConcaveGate(FIVE, PROTECTED, 30)
    resumed.load_state_dict(saved)
    assert steps(resumed, 7, 30).kept_sets() == whole.kept_sets() and resumed.start == whole.start


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UsageError, match="--num-layers-to-prune"):
        ConcaveGate(Budget.of_layers(16, 1), PROTECTED, 10)
    with pytest.raises(MegapruneError, match="not of parameters"):
        ConcaveGate(Budget((2,) * 16, 20), PROTECTED, 10)
    with pytest.raises(MegapruneError, match="no contiguous segment"):
        ConcaveGate(FIVE, frozenset(range(0, 16, 3)), 10)
    with pytest.raises(MegapruneError, match="not finite"):
        ConcaveGate(FIVE, PROTECTED, 10).update(torch.full((16,), torch.nan), 0)


def test_endpoints_stand_beside_the_cut():
    assert endpoints([0, 1, 2, 6, 7], 8) == [2, 3]
    assert endpoints([3, 4], 5) == [0]
    assert endpoints([0, 1], 5) == [1]
    for kept in ([0, 2, 4], [0, 1, 2]):
        with pytest.raises(MegapruneError, match="one contiguous cut"):
            endpoints(kept, 5 if len(kept) == 3 and kept[1] == 2 else 3)
