import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import GumbelTopK, gumbel_noise, gumbel_topk_mask
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.one_shot import random_layers, top_layers
from megaprune.utils.errors import UsageError

# 3 dense layers, then MoE layers that are ten times as large
COSTS = (10, 10, 10, *[100] * 9)
PROTECTED = frozenset({0, 11})


def cost(layers):
    return sum(COSTS[layer] for layer in layers)


def is_exact(layers, limit):
    """Return whether layers are within the limit, and no layer that is left out would still fit."""
    left_out = set(range(12)) - set(layers)
    return cost(layers) <= limit and all(cost(layers) + COSTS[layer] > limit for layer in left_out)


def test_number_of_layers_must_fit():
    Budget.of_layers(12, 2).check(PROTECTED)
    Budget.of_layers(12, 12).check(frozenset())
    for num_kept in (0, -1, 13):
        with pytest.raises(UsageError, match="--num-layers-to-prune"):
            Budget.of_layers(12, num_kept).check(frozenset())
    with pytest.raises(UsageError, match=r"leaves 1, but --protect-layers keeps 2 \(0, 11\)"):
        Budget.of_layers(12, 1).check(PROTECTED)


def test_protected_layers_must_fit_the_parameters():
    Budget(COSTS, 110).check(PROTECTED)
    with pytest.raises(UsageError, match=r"--target-params: leaves 109 .*\(0, 11\) have 110"):
        Budget(COSTS, 109).check(PROTECTED)
    with pytest.raises(UsageError, match="the smallest layer have 10"):
        Budget(COSTS, 9).check(frozenset())


def test_every_layer_that_fits_is_taken_in_order():
    budget = Budget(COSTS, 335)
    assert budget.take([5, 6, 7, 8, 0, 1, 2]) == [0, 1, 2, 5, 6, 7]
    assert budget.take([5, 6, 7, 8, 0, 1, 2], PROTECTED) == [0, 1, 2, 5, 6, 11]
    assert budget.fewest_layers(PROTECTED) == [0, 1, 2, 3, 4, 11]
    assert Budget.of_layers(12, 4).fewest_layers(PROTECTED) == [0, 1, 2, 11]


@pytest.mark.parametrize("limit", [110, 250, 555, 921])
def test_selections_are_exact(limit):
    budget = Budget(COSTS, limit)
    for seed in range(30):
        for kept in (
            random_layers(budget, PROTECTED, seed),
            top_layers(torch.randn(12, generator=torch.Generator().manual_seed(seed)), budget, PROTECTED),
        ):
            assert set(kept) >= PROTECTED and is_exact(kept, limit)


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.05])
def test_masks_are_exact_and_the_relaxation_spends_the_limit(temperature):
    costs = torch.tensor(COSTS, dtype=torch.float32)
    for step, limit in enumerate(range(15, 925, 65)):
        scores = torch.randn(12, generator=torch.Generator().manual_seed(step))
        mask, soft = gumbel_topk_mask(scores, limit, temperature, gumbel_noise(12, 0, step), COSTS)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert is_exact(mask.nonzero().flatten().tolist(), limit)
        assert (soft @ costs).item() == pytest.approx(limit, rel=1e-4)


def test_equal_costs_are_the_exact_k():
    scores, noise = torch.randn(12, generator=torch.Generator().manual_seed(0)), gumbel_noise(12, 0, 0)
    plain, priced = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    mask, soft = gumbel_topk_mask(plain, 7, 0.7, noise)
    priced_mask, priced_soft = gumbel_topk_mask(priced, 7 * 450, 0.7, noise, [450] * 12)
    assert torch.equal(mask, priced_mask)
    torch.testing.assert_close(soft, priced_soft)
    weights = torch.arange(12.0)
    (soft @ weights).backward()
    (priced_soft @ weights).backward()
    torch.testing.assert_close(plain.grad, priced.grad, atol=1e-6, rtol=1e-4)


def test_gradient_of_the_priced_relaxation():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    noise, costs = gumbel_noise(6, 0, 0).double(), [10, 10, 100, 100, 100, 100]
    for limit in (15, 150, 333):
        assert torch.autograd.gradcheck(lambda s, b=limit: gumbel_topk_mask(s, b, 0.5, noise, costs)[1], scores)


def test_nothing_or_everything_is_no_choice():
    for limit, expected in ((5, 0.0), (sum(COSTS), 1.0)):
        mask, _ = gumbel_topk_mask(torch.zeros(12, requires_grad=True), limit, 1.0, torch.zeros(12), COSTS)
        assert mask.eq(expected).all() and not mask.requires_grad


def test_initial_scores_are_harm_per_parameter():
    kl = torch.tensor([1.0, 1.0, 1.0, 5.0])
    by_layer = scores_from_kl(kl, frozenset())
    by_parameter = scores_from_kl(kl, frozenset(), costs=[10, 10, 100, 100])
    assert by_layer[3] > by_layer[0] and by_parameter[0] > by_parameter[3] > by_parameter[2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_weighs_harm_against_price(seed):
    """Each dense layer matters less than any MoE layer, but one of them more per parameter."""
    harm = torch.tensor([9.0, 0.0, 0.8, *[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0], 9.0])
    limit = 10 + 100 + 4 * 100 + 10
    search = GumbelTopK(torch.zeros(12), Budget(COSTS, limit), PROTECTED, 150, seed=seed)
    for step in range(150):
        mask = search.mask(step).requires_grad_()
        assert is_exact(mask.nonzero().flatten().tolist(), search.limit_at(step))
        (grad,) = torch.autograd.grad(((1 - mask) * harm).sum(), mask)
        search.update(grad, step)
    assert search.kept_layers() == [0, 2, 4, 6, 8, 10, 11]
