"""Methods that select layers by passes over calibration data: their measurements and their choices."""

import pytest
import torch

from megaprune.distillation.teachers import vocab_shard
from megaprune.importance.evaluator import LayerEvaluator
from megaprune.importance.measures import block_influence, mask_gradient, mask_losses
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.parallel import ParallelSizes
from megaprune.selection.auto import num_windows
from megaprune.selection.budget import Budget
from megaprune.selection.local_search import neighbors
from megaprune.selection.masks import shared_cost
from megaprune.selection.registry import find
from megaprune.selection.segments import segments
from megaprune.utils.errors import UsageError
from megaprune.weights.source import HFSource
from tests.helpers import tiny

BATCHES = tiny.uneven_batches([2, 2])
PROTECTED = frozenset({0, 6})
THREE = Budget.of_layers(7, 4)


@pytest.fixture(scope="module")
def gated(tiny_model):
    """Model of 7 layers behind its gate, the gate, and the shard."""
    parallel.initialize(ParallelSizes())
    source = HFSource(tiny_model("qwen3_tied"))
    arch, gate = source.family.architecture(source.config), LayerGate()
    model = build_model(arch, [7], EngineOptions(ParallelSizes()), gate)
    import_weights(model, source)
    yield model, gate, vocab_shard(arch)
    parallel.finish()


@pytest.fixture(scope="module")
def in_transformers(tiny_model):
    """Return a function that gives logits and hidden states of a batch from the model of some layers."""
    model = tiny.load_hf(tiny_model("qwen3_tied"))
    layers = list(model.model.layers)

    def run(tokens, kept=range(7)):
        model.model.layers = torch.nn.ModuleList(layers[layer] for layer in kept)
        with torch.no_grad():
            return model(tokens, output_hidden_states=True, use_cache=False)

    return run


def mask_of(kept):
    return torch.zeros(7).index_fill(0, torch.tensor(kept), 1.0)


def mean(values):
    """Return the mean, over tokens with loss, of the result of `values` for a batch, [b, s]."""
    total = sum((values(batch) * batch.loss_mask).sum() for batch in BATCHES)
    return (total / sum(batch.loss_mask.sum() for batch in BATCHES)).item()


def test_losses_under_masks_are_those_of_the_pruned_models(gated, in_transformers):
    model, gate, shard = gated
    sets = [[0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 6], [1, 5]]
    masks = torch.stack([mask_of(kept) for kept in sets])
    found = {loss: mask_losses(model, gate, BATCHES, masks, shard, loss) for loss in ("kl", "ce")}
    for i, kept in enumerate(sets):

        def kl(batch, kept=kept):
            teacher = in_transformers(batch.tokens).logits.log_softmax(-1)
            student = in_transformers(batch.tokens, kept).logits.log_softmax(-1)
            return (teacher.exp() * (teacher - student)).sum(-1)

        def ce(batch, kept=kept):
            logits = in_transformers(batch.tokens, kept).logits.transpose(1, 2)
            return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")

        assert found["kl"][i] == pytest.approx(mean(kl), rel=1e-4, abs=1e-6)
        assert found["ce"][i] == pytest.approx(mean(ce), rel=1e-5)
    assert gate.mask is None


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_masks_that_begin_alike_share_their_first_layers(gated, loss):
    model, gate, shard = gated
    sets = [[other for other in range(7) if other != layer] for layer in range(7)] + [[0, 2, 5, 6], [0, 2, 3, 6]]
    masks = torch.stack([mask_of(kept) for kept in sets])
    alone = torch.cat([mask_losses(model, gate, BATCHES, mask[None], shard, loss) for mask in masks])
    runs = []
    hooks = [layer.self_attention.register_forward_hook(lambda *_: runs.append(1)) for _, layer in model.layers()]
    together = mask_losses(model, gate, BATCHES, masks, shard, loss)
    for hook in hooks:
        hook.remove()
    assert torch.equal(together, alone)
    assert len(runs) == round(shared_cost(masks, loss) * 7) * len(BATCHES)
    assert len(runs) < (0.65 if loss == "kl" else 0.7) * sum(map(len, sets)) * len(BATCHES)


def test_block_influence_is_that_of_the_hidden_states(gated, in_transformers):
    found = block_influence(gated[0], BATCHES, 7)
    # transformers gives the last hidden state behind the final norm: the last layer is left out
    for layer in range(6):

        def influence(batch, layer=layer):
            hidden = in_transformers(batch.tokens).hidden_states
            return 1 - torch.cosine_similarity(hidden[layer], hidden[layer + 1], dim=-1)

        assert found[layer] == pytest.approx(mean(influence), rel=1e-4)
    assert 0 < found[6] < 2


def test_gradient_in_a_soft_mask_is_that_of_its_loss(gated):
    model, gate, shard = gated
    mask = torch.tensor([1.0, 0.8, 0.2, 0.5, 1.0, 0.0, 1.0])
    loss, grad = mask_gradient(model, gate, BATCHES, mask, shard)
    assert loss == pytest.approx(mask_losses(model, gate, BATCHES, mask[None], shard, "kl").item(), rel=1e-4)
    for layer in range(7):
        step = torch.zeros(7).index_fill(0, torch.tensor(layer), 0.02)
        both = torch.stack([mask + step, mask - step])
        above, below = mask_losses(model, gate, BATCHES, both, shard, "kl").tolist()
        assert grad[layer] == pytest.approx((above - below) / 0.04, rel=0.03, abs=2e-3), layer
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def evaluator_of(gated, batches=BATCHES, budget=THREE):
    model, gate, shard = gated
    return LayerEvaluator(model, gate, lambda count, skip: batches, len(batches), budget, shard)


def choose_layers(name, evaluator, budget, protected=PROTECTED, **flags):
    """Return the choice of a method, with these flags or its default ones."""
    usual = {"mask_init_scale": 1.0, "seed": 0, "search_iters": 60, "criterion": "perplexity"}
    method = find(name)
    return method.choose(budget, protected, method.options(usual | flags), evaluator)


@pytest.mark.parametrize(
    "method",
    ["kl-init", "shortgpt", "minitron", "sleb", "exhaustive", "evolution", pytest.param("clp", marks=pytest.mark.slow)],
)
def test_methods_keep_exactly_the_budget(gated, method):
    evaluators = [evaluator_of(gated) for _ in range(2)]
    choices = [choose_layers(method, evaluator, THREE) for evaluator in evaluators]
    assert choices[0] == choices[1]
    assert len(choices[0].kept_layers) == 4 and set(choices[0].kept_layers) >= PROTECTED
    assert evaluators[0].tokens == evaluators[1].tokens > 0


def test_choices_are_the_best_by_their_measure(gated):
    evaluator = evaluator_of(gated)
    without = {layer: evaluator.losses([[i for i in range(7) if i != layer]])[0] for layer in range(1, 6)}
    kl_init = choose_layers("kl-init", evaluator_of(gated), THREE)
    assert set(kl_init.kept_layers) == PROTECTED | set(sorted(without, key=without.get)[3:])
    segment = choose_layers("exhaustive", evaluator_of(gated), THREE).kept_layers
    assert evaluator.losses([segment])[0] == min(evaluator.losses(segments(THREE, PROTECTED)))
    one_less = Budget.of_layers(7, 6)
    first = choose_layers("sleb", evaluator_of(gated), one_less).kept_layers
    every = [[i for i in range(7) if i != layer] for layer in range(1, 6)]
    assert evaluator.losses([first], "ce")[0] == min(evaluator.losses(every, "ce"))


def test_shortened_keeps_the_first_four_and_the_last_two(gated):
    choice = choose_layers("shortened", evaluator_of(gated), Budget.of_layers(7, 6))
    assert choice.kept_layers == [0, 1, 2, 3, 5, 6]
    with pytest.raises(UsageError, match="shortened keeps the first 4 layers and the last 2"):
        choose_layers("shortened", evaluator_of(gated), THREE)


def test_shortened_weighs_what_is_lost_against_price():
    """Losses hardly differ; without weighing, the most expensive layer would always be removed."""
    budget, harm = Budget((*[10] * 6, *[100] * 6), 650), [0.5] * 12
    harm[4] = 0.0

    class Losses:
        tokens = 0

        def losses(self, sets, loss):
            return [8.9 + sum(harm[layer] for layer in range(12) if layer not in kept) for kept in sets]

        def without_each(self, protected, loss):
            return torch.tensor(self.losses([[i for i in range(12) if i != layer] for layer in range(12)], loss))

    assert 4 not in choose_layers("shortened", Losses(), budget).kept_layers


def test_taylor_importance_is_that_of_autograd(gated, tiny_model):
    model = tiny.load_hf(tiny_model("qwen3_tied")).train()
    total = sum(batch.loss_mask.sum() for batch in BATCHES)
    for batch in BATCHES:
        logits = model(batch.tokens, use_cache=False).logits.transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        ((losses * batch.loss_mask).sum() / total).backward()
    expected = torch.stack(
        [sum((p * p.grad).abs().sum() for p in layer.parameters()).detach() for layer in model.model.layers]
    )
    evaluator = evaluator_of(gated)
    torch.testing.assert_close(evaluator.taylor_importance(), expected, rtol=1e-4, atol=0)
    # and leaves nothing behind
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in gated[0].parameters())
    torch.testing.assert_close(evaluator.taylor_importance(), expected, rtol=1e-4, atol=0)
    choice = choose_layers("shortened", evaluator, Budget.of_layers(7, 6), criterion="taylor")
    assert choice.kept_layers == [0, 1, 2, 3, 5, 6]


def test_no_segment_is_refused(gated):
    with pytest.raises(UsageError, match="no contiguous segment"):
        choose_layers("exhaustive", evaluator_of(gated), THREE, frozenset({0, 2, 4, 6}))


def auto_evaluators(gated):
    return evaluator_of(gated), evaluator_of(gated, tiny.uneven_batches([1, 1, 1, 1])[1:])


@pytest.mark.slow
def test_auto_takes_the_best_of_its_candidates(gated):
    evaluator, held_out = auto_evaluators(gated)
    choice = find("auto").choose(THREE, PROTECTED, {"selection_budget": 100_000, "seed": 0}, evaluator, held_out)
    names = [candidate["name"] for candidate in choice.candidates]
    assert names[:6] == ["kl-init", "block influence", "best segment", "greedy", "e3, weights frozen", "quadratic"]
    assert len(names) == 9 and all(name.endswith(", swapped") for name in names[6:8]) and names[8] == "runner-up"
    chosen = [candidate for candidate in choice.candidates if candidate["chosen"]]
    assert len(chosen) == 1 and chosen[0]["kept_layers"] == choice.kept_layers
    assert chosen[0]["kl"] == min(candidate["kl"] for candidate in choice.candidates)
    assert held_out.losses([choice.kept_layers])[0] == chosen[0]["kl"]
    # with all the swaps it can pay, no single swap is better on the text that it looked at
    for swapped in (candidate["kept_layers"] for candidate in choice.candidates[6:8]):
        around = evaluator.losses([swapped, *neighbors(swapped, THREE, PROTECTED)])
        assert around[0] == min(around)


@pytest.mark.parametrize("tokens", [1, 3_000, 6_000, 20_000])
def test_auto_stays_within_its_budget(gated, tokens):
    """A budget below the cost of the candidates on one window leaves out swaps and search."""
    evaluator, held_out = auto_evaluators(gated)
    choice = find("auto").choose(THREE, PROTECTED, {"selection_budget": tokens, "seed": 0}, evaluator, held_out)
    if tokens == 1:
        assert [candidate["tokens"] for candidate in choice.candidates[4:]] == [0, 0, 0, 0]
    windows_seen = num_windows(THREE, PROTECTED, tokens, BATCHES[0].tokens.shape[1], asked=False)
    if windows_seen >= len(BATCHES):
        assert evaluator.tokens + held_out.tokens <= tokens


def test_auto_refuses_a_budget_that_is_too_small():
    with pytest.raises(UsageError, match="--selection-budget 100 is too small: give at least"):
        num_windows(THREE, PROTECTED, 100, 12, asked=True)
    assert num_windows(THREE, PROTECTED, 100, 12, asked=False) == 1
    assert num_windows(THREE, PROTECTED, 10**6, 12, asked=True) > 100
