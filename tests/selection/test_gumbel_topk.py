import io
import itertools

import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import GumbelTopK, gumbel_noise, gumbel_topk_mask
from megaprune.utils.errors import MegapruneError, UsageError

NO_NOISE = torch.zeros(12)
PROTECTED = frozenset({0, 11})


def ones(mask):
    return set(mask.nonzero().flatten().tolist())


@pytest.mark.parametrize("temperature", [2.0, 1.0, 0.1, 0.01])
def test_mask_keeps_exactly_k(temperature):
    for k in range(13):
        for step in range(5):
            mask, soft = gumbel_topk_mask(torch.randn(12), k, temperature, gumbel_noise(12, 0, step))
            assert mask.dtype == torch.float32
            assert sorted(mask.tolist()) == [0.0] * (12 - k) + [1.0] * k
            torch.testing.assert_close(soft.sum(), torch.tensor(float(k)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spread", [1.0, 3.0, 30.0])
def test_no_item_is_picked_twice_when_cold(spread):
    # Well-separated items and little temperature: the relaxation is the hard top k. With the logarithm added
    # after the division by the temperature, the leader would be picked again and again.
    scores = torch.arange(12.0) * spread
    for k in range(1, 12):
        mask, soft = gumbel_topk_mask(scores, k, 0.05, NO_NOISE)
        torch.testing.assert_close(soft, mask, atol=1e-3, rtol=0)
        assert ones(mask) == set(range(12 - k, 12))


def test_ties_go_to_the_lower_layer():
    mask, _ = gumbel_topk_mask(torch.zeros(40), 5, 1.0, torch.zeros(40))
    assert ones(mask) == {0, 1, 2, 3, 4}


def test_masks_are_draws_without_replacement_from_the_scores_softmax():
    # Top-1 of scores + Gumbel noise is a categorical draw.
    scores = torch.tensor([0.5, -1.0, 0.0, 1.0])
    draws = sum(gumbel_topk_mask(scores, 1, 1.0, gumbel_noise(4, 0, step))[0] for step in range(3000)) / 3000
    torch.testing.assert_close(draws, scores.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gradient_is_that_of_the_soft_mask(temperature):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    noise = gumbel_noise(6, 0, 0).double()
    weights = torch.randn(6, dtype=torch.float64, generator=generator)
    for k in range(1, 6):
        assert torch.autograd.gradcheck(lambda s, k=k: gumbel_topk_mask(s, k, temperature, noise)[1], scores)
        mask, soft = gumbel_topk_mask(scores, k, temperature, noise)
        (of_mask,) = torch.autograd.grad(mask @ weights, scores, retain_graph=True)
        (of_soft,) = torch.autograd.grad(soft @ weights, scores)
        assert torch.equal(of_mask, of_soft)


@pytest.mark.parametrize("gap", [20.0, 100.0, 1e4])
def test_gradient_of_saturated_scores_is_finite(gap):
    scores = (torch.arange(12.0) * gap).requires_grad_()
    for temperature, k in itertools.product([1.0, 0.1], range(1, 12)):
        mask, _ = gumbel_topk_mask(scores, k, temperature, NO_NOISE)
        (grad,) = torch.autograd.grad(mask @ torch.arange(12.0), scores)
        assert grad.isfinite().all()
        if temperature < 1:
            assert ones(mask) == set(range(12 - k, 12))


def test_bad_arguments_of_the_mask():
    with pytest.raises(UsageError, match="--gumbel-temperature"):
        gumbel_topk_mask(NO_NOISE, 3, 0.0, NO_NOISE)
    for k in (-1, 13):
        with pytest.raises(MegapruneError, match="of 12 layers"):
            gumbel_topk_mask(NO_NOISE, k, 1.0, NO_NOISE)


def test_noise_depends_on_seed_and_step_alone():
    first = gumbel_noise(12, 3, 5)
    torch.randn(7)
    assert torch.equal(first, gumbel_noise(12, 3, 5))
    # Seeds that agree in their low 32 bits are different seeds.
    others = [gumbel_noise(12, 4, 5), gumbel_noise(12, 3, 6), gumbel_noise(12, 3 + 2**32, 5)]
    assert not any(torch.equal(first, other) for other in others)
    many = torch.cat([gumbel_noise(100, 0, step) for step in range(200)])
    assert many.mean() == pytest.approx(0.5772, abs=0.03)
    assert many.std() == pytest.approx(1.2825, abs=0.03)


def test_kept_layers_fall_linearly_from_the_first_step_on():
    search = GumbelTopK(torch.zeros(12), Budget.of_layers(12, 6), PROTECTED, num_steps=13)
    # 6 * (step + 1) / 13, rounded up
    assert [search.limit_at(step) for step in range(13)] == [11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 6]
    half = GumbelTopK(torch.zeros(12), Budget.of_layers(12, 6), PROTECTED, num_steps=20, ramp=0.5)
    counts = [half.limit_at(step) for step in range(20)]
    assert counts[0] == 11 and counts[7] > 6 and counts[9:] == [6] * 11
    assert GumbelTopK(torch.zeros(12), Budget.of_layers(12, 6), PROTECTED, num_steps=1).limit_at(0) == 6
    # one layer over many steps: still none with all layers, whose only gradient would be rounding noise
    slow = GumbelTopK(torch.zeros(12), Budget.of_layers(12, 11), PROTECTED, num_steps=100)
    assert {slow.limit_at(step) for step in range(100)} == {11}


def test_temperature_is_annealed_linearly():
    search = GumbelTopK(torch.zeros(12), Budget.of_layers(12, 6), PROTECTED, num_steps=100, temperature=2.0, anneal=0.9)
    assert [search.temperature(step) for step in (0, 50, 99)] == pytest.approx([2.0, 1.1, 0.218])


def test_protected_layers_are_never_dropped():
    scores = torch.linspace(-1, 1, 12)
    search = GumbelTopK(scores, Budget.of_layers(12, 3), PROTECTED, num_steps=60, lr=0.5)
    for step in range(60):
        mask = search.mask(step)
        assert mask.shape == (12,) and mask.dtype == torch.float32 and not mask.requires_grad
        assert mask[[0, 11]].eq(1).all() and mask.sum() == search.limit_at(step)
        # A loss that would have the protected layers go.
        search.update(torch.tensor([100.0] + [0.1] * 10 + [100.0]), step)
    kept = search.kept_layers()
    assert len(kept) == 3 and {0, 11} <= set(kept)
    assert torch.equal(search.scores[[0, 11]], scores[[0, 11]])


def search_planted(loss_of, init_scores, num_steps, **settings):
    """Run a search against `loss_of(mask)` and return the 6 of 12 layers that it keeps."""
    search = GumbelTopK(init_scores, Budget.of_layers(12, 6), PROTECTED, num_steps, **settings)
    for step in range(num_steps):
        mask = search.mask(step).requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(mask), mask)
        search.update(grad, step)
    return search.kept_layers()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_finds_the_useful_layers(seed):
    useful = torch.zeros(12)
    useful[[2, 5, 6, 9]] = torch.tensor([1.0, 0.5, 0.8, 0.6])
    # Begun at a preference for useless layers, so that only the search can find the answer.
    misleading = -0.5 * (useful > 0).float()
    kept = search_planted(lambda mask: ((1 - mask) * useful).sum(), misleading, 150, seed=seed)
    assert kept == [0, 2, 5, 6, 9, 11]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_finds_a_set_that_no_layer_shows_alone(seed):
    # Layer l gives the output direction l // 2, which it needs, but not twice: of each of the pairs (2, 3),
    # (4, 5), (6, 7) and (8, 9) one layer is to stay, whichever. 16 of the 210 sets do.
    directions = torch.arange(12) // 2

    def loss(mask):
        output = torch.zeros(6).index_add(0, directions, mask)
        return (1 - output[1:5]).clamp_min(0).square().sum()

    kept = search_planted(loss, torch.zeros(12), 300, seed=seed, lr=0.1, ramp=0.8)
    assert [layer // 2 for layer in kept] == [0, 1, 2, 3, 4, 5]


def fake_gradient(mask, step):
    return (mask - 0.5) * torch.linspace(-1, 1, 12) + 0.1 * gumbel_noise(12, 99, step)


def trajectory(search, steps):
    masks = []
    for step in steps:
        masks.append(search.mask(step))
        search.update(fake_gradient(masks[-1], step), step)
    return torch.stack([*masks, search.scores])


def build(**changes):
    settings = {"num_kept": 5, "protected": PROTECTED, "num_steps": 40, "seed": 1} | changes
    return GumbelTopK(torch.linspace(1, -1, 12), Budget.of_layers(12, settings.pop("num_kept")), **settings)


@pytest.mark.parametrize("stop", [0, 1, 17])
def test_resumed_search_goes_on_bit_for_bit(stop):
    whole = build()
    trajectory(whole, range(stop))
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    resumed = build()
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(trajectory(resumed, range(stop, 40)), trajectory(whole, range(stop, 40)))
    assert torch.equal(trajectory(build(), range(40))[-1], whole.scores)
    assert resumed.kept_layers() == whole.kept_layers()


def test_saved_state_is_a_copy():
    search = build()
    trajectory(search, range(10))
    state = search.state_dict()
    before = state["scores"].clone(), state["adam"]["exp_avg"].clone()
    trajectory(search, range(10, 20))
    assert torch.equal(state["scores"], before[0]) and torch.equal(state["adam"]["exp_avg"], before[1])


@pytest.mark.parametrize("change", [{"num_kept": 6}, {"seed": 2}, {"num_steps": 41}, {"protected": frozenset()}])
def test_resuming_with_other_settings_is_refused(change):
    name = next(iter(change)).replace("num_kept", "limit")
    with pytest.raises(MegapruneError, match=f"cannot resume: the saved search has {name}"):
        build(**change).load_state_dict(build().state_dict())


def test_mask_may_be_asked_for_again_and_gradients_be_switched_off():
    plain, disturbed = build(), build()
    for step in range(40):
        mask = plain.mask(step)
        plain.update(fake_gradient(mask, step), step)
        with torch.no_grad():
            disturbed.mask(39 - step)
            disturbed.update(fake_gradient(disturbed.mask(step), step), step)
    assert torch.equal(plain.scores, disturbed.scores)
    assert not torch.equal(plain.scores, build().scores)


@pytest.mark.parametrize("num_kept", [12, 2])
def test_no_choice_moves_no_score(num_kept):
    search = build(num_kept=num_kept, ramp=0.01)
    for step in range(40):
        mask = search.mask(step)
        assert mask.sum() == num_kept
        search.update(torch.randn(12), step)
    assert torch.equal(search.scores, build().scores)


def test_bad_settings_and_gradients_are_refused():
    for flag, change in [
        ("--search-iters", {"num_steps": 0}),
        ("--gumbel-temperature", {"temperature": 0.0}),
        ("--gumbel-anneal", {"anneal": 1.0}),
        ("--mask-lr", {"lr": 0.0}),
        ("--num-layers-to-prune", {"num_kept": 1}),
    ]:
        with pytest.raises(UsageError, match=flag):
            build(**change)
    with pytest.raises(UsageError, match="--mask-ramp"):
        build(ramp=0.0)
    with pytest.raises(MegapruneError, match="finite"):
        GumbelTopK(torch.full((12,), torch.nan), Budget.of_layers(12, 5), PROTECTED, 40)
    with pytest.raises(MegapruneError, match="search step 3 is not finite"):
        build().update(torch.full((12,), torch.inf), 3)
    with pytest.raises(MegapruneError, match="step 40 is outside"):
        build().mask(40)
