"""The default search of E3: its measurements against exact removals, and planted searches, on a small residual net."""

import io
import itertools
import random

import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.measured_topk import PROBE, MeasuredTopK
from megaprune.selection.selector import WindowSelector
from megaprune.utils.errors import MegapruneError, UsageError

LAYERS, GONE, WIDTH = 12, 4, 32
PROTECTED = frozenset({0, LAYERS - 1})
FREE = range(1, LAYERS - 1)
BUDGET = Budget.of_layers(LAYERS, LAYERS - GONE)


class Net:
    """Residual net whose layers 4 and 5 write the same thing: either alone can go for nothing, both together not."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=self.generator)

        self.into = [normal(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(LAYERS)]
        self.out = [normal(WIDTH, WIDTH) / WIDTH**0.5 * 0.5 * torch.exp(0.7 * normal(1)) for _ in range(LAYERS)]
        for weight in self.out:
            weight[:, -8:] = 0
        self.twin = normal(WIDTH, 8) / WIDTH**0.5 * 2
        self.head = normal(WIDTH, 48) * 2 / WIDTH**0.5

    def layer(self, number, x):
        if number not in (4, 5):
            return torch.tanh(x @ self.into[number]) @ self.out[number]
        plain = torch.cat([x[..., :-8], torch.zeros_like(x[..., -8:])], -1)
        return torch.cat([torch.zeros_like(x[..., :-8]), torch.tanh(plain @ self.twin) - x[..., -8:]], -1)

    def log_probabilities(self, x, masks):
        for number in range(LAYERS):
            x = x + masks[:, number, None, None] * self.layer(number, x)
        return (x @ self.head).log_softmax(-1)

    def batch(self, windows, tokens=16, generator=None):
        x = torch.randn(windows, tokens, WIDTH, generator=generator or self.generator)
        x[..., -8:] = 0
        return x

    def kl(self, x, masks):
        """Return the KL of each window."""
        teacher = self.log_probabilities(x, torch.ones_like(masks)).detach()
        student = self.log_probabilities(x, masks)
        return (teacher.exp() * (teacher - student)).sum(-1).mean(-1)

    def kl_of(self, x, gone):
        mask = torch.ones(1, LAYERS).index_fill(1, torch.tensor(sorted(gone), dtype=torch.long), 0.0)
        return self.kl(x, mask.expand(len(x), -1)).mean().item()

    def gradient(self, x, masks):
        masks = masks.clone().requires_grad_()
        return torch.autograd.grad(self.kl(x, masks).mean(), masks)[0]

    def first_kl(self, x):
        return torch.tensor([self.kl_of(x, {layer}) if layer in FREE else 0.0 for layer in range(LAYERS)])


def rank_correlation(found, expected):
    ranks = torch.stack([torch.as_tensor(v).argsort().argsort().double() for v in (found, expected)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measured_values_follow_the_exact_effect_of_removal(seed):
    """The gradient at gates that are fully open underestimates it."""
    net = Net(seed)
    x = net.batch(400)
    search = MeasuredTopK(torch.ones(LAYERS), BUDGET, PROTECTED, 1, seed=seed)
    mask, masks = search.mask(0), search.window_masks(0, len(x))
    search.update(net.gradient(x, masks), 0)
    gone, kept = ([layer for layer in FREE if mask[layer] == value] for value in (0, 1))
    base = net.kl_of(x, gone)
    exact = torch.tensor([net.kl_of(x, {*gone, layer}) - base for layer in range(LAYERS)])
    assert rank_correlation(search.values[kept], exact[kept]) >= 0.7
    assert search.values[kept].mean() == pytest.approx(exact[kept].mean().item(), rel=0.3)
    straight = -net.gradient(x, mask.expand(len(x), -1)).sum(0)
    assert straight[kept].mean() < 0.5 * exact[kept].mean()


def planted_rank(seed, shuffled, steps, windows):
    """Return the ranks of the first and of the searched mask among all masks by exact KL, and the search's masks."""
    net = Net(seed)
    x = net.batch(24)
    order = sorted(itertools.combinations(FREE, GONE), key=lambda gone: net.kl_of(x, gone))
    kl = net.first_kl(x)
    if shuffled:
        mixed = random.Random(seed).sample(list(FREE), len(FREE))
        kl[list(FREE)] = kl[mixed]
    search, met = MeasuredTopK(kl, BUDGET, PROTECTED, steps, seed=seed), []
    ranks = [order.index(tuple(sorted(set(range(LAYERS)) - set(search.kept_layers()))))]
    for step in range(steps):
        met.append(search.mask(step))
        masks = search.window_masks(step, windows)
        search.update(net.gradient(net.batch(windows), masks), step)
    ranks.append(order.index(tuple(sorted(set(range(LAYERS)) - set(search.kept_layers())))))
    return ranks, torch.stack(met)


def test_a_search_recovers_from_shuffled_scores():
    """210 masks: the searched ones are in the best 5%, where the first ones are anywhere."""
    ranks = torch.tensor([planted_rank(seed, True, 40, 4)[0] for seed in range(4)], dtype=torch.float32)
    assert ranks[:, 0].mean() > 40
    assert ranks[:, 1].mean() <= 10


def test_a_short_search_from_correct_scores_is_no_worse():
    ranks = torch.tensor([planted_rank(seed, False, 10, 8)[0] for seed in range(4)], dtype=torch.float32)
    assert ranks[:, 1].mean() <= ranks[:, 0].mean()


def test_a_search_explores_and_settles():
    """Layers change sides, and the last masks are nearly the one that is kept."""
    _, masks = planted_rank(0, False, 20, 8)
    dropped = (masks[:12] == 0).any(0)
    assert dropped.sum() > GONE + 1
    assert (masks[-1] != masks[-2]).sum() <= 2
    assert masks.sum(1)[0] > masks.sum(1)[-1] == LAYERS - GONE


def build(**changes):
    settings = {"kl": torch.linspace(0.01, 0.3, LAYERS), "budget": BUDGET, "protected": PROTECTED, "num_steps": 10}
    return MeasuredTopK(**(settings | {"seed": 1} | changes))


def test_masks_of_windows():
    search = build()
    assert isinstance(search, WindowSelector)
    for step in range(10):
        mask, masks = search.mask(step), search.window_masks(step, 16)
        probed = masks == PROBE
        assert mask.sum() == search.limit_at(step) and mask[list(PROTECTED)].all()
        assert (probed.sum(1) == search.probes_per_window).all() and not probed[:, list(PROTECTED)].any()
        assert torch.equal(torch.where(probed, mask, masks), mask.expand(16, -1))
        # on both sides of the limit, in every window; other layers in other windows
        both = min(search.probes_per_window // 2, int((mask == 0).sum()))
        assert ((probed & (mask == 0)).sum(1) == both).all()
        assert probed.any(0).sum() > search.probes_per_window
        # a window's mask depends on its number alone, not on how many there are
        assert torch.equal(search.window_masks(step, 4), masks[:4])
    # 4 * (step + 1) / 5, rounded up
    assert [search.limit_at(step) for step in range(10)] == [11, 10, 9, 8, 8, 8, 8, 8, 8, 8]


def test_masks_keep_to_a_budget_of_parameters():
    costs = (10, 3, 3, 3, 10, 10, 10, 10, 10, 10, 10, 10)
    search = build(budget=Budget(costs, 60))
    for step in range(10):
        mask = search.mask(step)
        spent = sum(cost for cost, value in zip(costs, mask, strict=True) if value)
        assert spent <= search.limit_at(step)
        assert all(spent + cost > search.limit_at(step) for cost, value in zip(costs, mask, strict=True) if not value)
    # the same harm for a smaller size counts more
    equal = build(kl=torch.full((LAYERS,), 0.1), budget=Budget(costs, 60)).scores
    assert equal[1] > equal[4]


@pytest.mark.parametrize("num_kept", [LAYERS, 2])
def test_no_choice_probes_nothing(num_kept):
    search = build(budget=Budget.of_layers(LAYERS, num_kept))
    before = search.scores
    for step in range(10):
        masks = search.window_masks(step, 4)
        assert not (masks == PROBE).any()
        search.update(torch.randn(4, LAYERS), step)
    assert torch.equal(search.scores, before) and len(search.kept_layers()) == num_kept


def trajectory(search, steps):
    met = []
    for step in steps:
        met.append(search.window_masks(step, 4))
        noise = torch.randn(4, LAYERS, generator=torch.Generator().manual_seed(step))
        search.update(-torch.linspace(0.3, 0.01, LAYERS) / 4 + 0.01 * noise, step)
    return torch.cat([*met, search.scores[None]])


@pytest.mark.parametrize("stop", [0, 1, 6])
def test_resumed_search_goes_on_bit_for_bit(stop):
    whole = build()
    trajectory(whole, range(stop))
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    resumed = build(kl=torch.zeros(LAYERS))  # the state holds the first KLs
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(trajectory(resumed, range(stop, 10)), trajectory(whole, range(stop, 10)))
    assert resumed.kept_layers() == whole.kept_layers() != build().kept_layers()


@pytest.mark.parametrize("change", [{"seed": 2}, {"num_steps": 11}, {"protected": frozenset()}, {"ramp": 1.0}])
def test_resuming_with_other_settings_is_refused(change):
    with pytest.raises(MegapruneError, match=f"cannot resume: the saved search has {next(iter(change))}"):
        build(**change).load_state_dict(build().state_dict())


def test_bad_settings_and_gradients_are_refused():
    for flag, change in [
        ("--search-iters", {"num_steps": 0}),
        ("--gumbel-temperature", {"temperature": 0.0}),
        ("--gumbel-anneal", {"anneal": 1.0}),
        ("--mask-ramp", {"ramp": 0.0}),
        ("--num-layers-to-prune", {"budget": Budget.of_layers(LAYERS, 1)}),
    ]:
        with pytest.raises(UsageError, match=flag):
            build(**change)
    with pytest.raises(MegapruneError, match="layer 1 is nan"):
        build(kl=torch.full((LAYERS,), torch.nan))
    with pytest.raises(MegapruneError, match="search step 3 is not finite"):
        build().update(torch.full((4, LAYERS), torch.inf), 3)
    with pytest.raises(MegapruneError, match="step 10 is outside"):
        build().mask(10)
