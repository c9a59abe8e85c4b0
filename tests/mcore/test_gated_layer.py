"""The gate on the layers of a model, against its formula under autograd and against the model without the layers."""

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megaprune.distillation.losses import cross_entropy
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import GatedTransformerLayer, LayerGate
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")

MASKS = {
    "ones": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "zeros": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "hard": [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    "soft": [0.25, 0.0, 1.0, 0.5, 0.0, 1.5, 0.75],
}
RECOMPUTE = [None, "selective", "full"]


@pytest.fixture(scope="module")
def source(tiny_model):
    return HFSource(tiny_model("qwen3"))


def build(source, gate=None, kept=None, recompute=None):
    arch = source.family.architecture(source.config)
    arch = arch if kept is None else arch.pruned(kept)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes(), recompute_granularity=recompute), gate)
    import_weights(model, source, kept)
    return model


def gradients(source, mask, gate, recompute=None, trainable=""):
    """Return the gradients of the parameters whose names contain ``trainable``, and of the mask, over two
    micro-batches.
    """
    model = build(source, gate, recompute=recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    shard = vocab_shard(source.family.architecture(source.config))
    batches = [tiny.make_batch(tokens) for tokens in tiny.random_tokens(4, 21).split(2)]
    gate.set(torch.tensor(mask))
    schedule.forward_backward(model, batches, lambda logits, tokens: cross_entropy(logits, tokens.labels, shard).mean())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # a layer that was skipped has no gradient where autograd computes zeros
    return {name: 0.0 if grad is None else grad for name, grad in grads.items()} | {"mask": gate.take_gradient()}


def forward_by_formula(self, hidden_states, *args, **kwargs):
    out, context = TransformerLayer.forward(self, hidden_states, *args, **kwargs)
    return hidden_states + self.gate.mask[self.layer_number - 1] * (out - hidden_states), context


@pytest.fixture(scope="module")
def expected_gradients(source):
    """Return a function that computes the gradients by the formula."""
    computed = {}

    def get(mask, trainable=""):
        if (mask, trainable) not in computed:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(GatedTransformerLayer, "forward", forward_by_formula)
                computed[mask, trainable] = gradients(source, MASKS[mask], LayerGate(), trainable=trainable)
        return computed[mask, trainable]

    return get


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert expected["mask"].abs().min() > 1e-4
    for name, grad in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name]).expand_as(grad), grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("skip", [True, False])
def test_gradients_are_those_of_the_formula(source, expected_gradients, mask, recompute, skip):
    found = gradients(source, MASKS[mask], LayerGate(skip_masked_backward=skip), recompute)
    assert_same_gradients(found, expected_gradients(mask))


# of 4 windows: layer 2 and 4 are closed in all of them, and in those of the first micro-batch, layer 5
WINDOW_MASKS = torch.tensor(
    [
        [0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        [1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 1.0],
        [1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0],
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.25, 0.0],
    ]
)


def window_gradients(source, recompute, prepare, trainable=""):
    """Return the gradients of the parameters over two micro-batches of two windows, and those of `prepare`'s masks."""
    gate = LayerGate()
    model = build(source, gate, recompute=recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    shard = vocab_shard(source.family.architecture(source.config))
    batches = [tiny.make_batch(tokens) for tokens in tiny.random_tokens(4, 21).split(2)]
    announce = prepare(gate)

    def loss(logits, tokens):
        return cross_entropy(logits, tokens.labels, shard).mean()

    schedule.forward_backward(model, batches, loss, announce)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: 0.0 if grad is None else grad for name, grad in grads.items()}, gate.take_gradient()


@pytest.fixture(scope="module")
def expected_of_windows(source):
    def formula(self, hidden_states, *args, **kwargs):
        out, context = TransformerLayer.forward(self, hidden_states, *args, **kwargs)
        number = 0 if self.gate.batch is None else self.gate.batch
        mask = self.gate.mask[2 * number : 2 * number + 2, self.layer_number - 1]
        return hidden_states + mask[:, None] * (out - hidden_states), context

    def prepare(gate):
        gate.mask, gate.batch = WINDOW_MASKS.clone().requires_grad_(), None
        return lambda number: setattr(gate, "batch", number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatedTransformerLayer, "forward", formula)
        return window_gradients(source, None, prepare)


@pytest.mark.parametrize("together", [frozenset(), frozenset({2, 5})])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_masks_of_windows_are_those_of_the_formula(source, expected_of_windows, recompute, together):
    """A layer that no window of a micro-batch uses runs only if other ranks wait for it."""

    def prepare(gate):
        gate.set_windows(WINDOW_MASKS, 2, [together, together])
        return gate.run_micro_batch

    grads, of_mask = window_gradients(source, recompute, prepare)
    expected, expected_of_mask = expected_of_windows
    for name, grad in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(grads[name]).expand_as(grad), grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4, msg=name
        )
    half_open = (WINDOW_MASKS > 0) & (WINDOW_MASKS < 1)
    assert expected_of_mask[half_open].abs().min() > 1e-4
    torch.testing.assert_close(of_mask[half_open], expected_of_mask[half_open], atol=1e-6, rtol=1e-4)
    idle = {int(name.split(".")[2]) for name, grad in grads.items() if isinstance(grad, float)}
    assert idle == {2, 4} - together


@pytest.mark.parametrize("closed", [0, 7])
def test_frozen_weights_leave_a_graph(source, closed):
    """A pipeline stage needs one for its backward pass, even if none of its layers runs."""

    def prepare(gate):
        masks = WINDOW_MASKS.clone()
        masks[:, :closed] = 0.0
        gate.set_windows(masks, 2, [frozenset(), frozenset()])
        return gate.run_micro_batch

    grads, of_mask = window_gradients(source, None, prepare, "nothing")
    assert grads == {} and of_mask.isfinite().all()
    assert (of_mask.abs().max() > 1e-4) == (closed == 0)


@pytest.mark.parametrize("recompute", [None, "selective"])
def test_gradients_pass_layers_that_nothing_before_needs(source, expected_gradients, recompute):
    """Frozen embedding and first layers, masked or not, need no gradient."""
    trainable = "layers.5.mlp"
    found = gradients(source, MASKS["hard"], LayerGate(), recompute, trainable)
    assert_same_gradients(found, expected_gradients("hard", trainable))
    assert len(found) == 3


def test_masked_backward_is_skipped(source):
    """The layers whose mask is 0 leave no graph: their parameters get no gradient at all, not zeros."""
    found = gradients(source, MASKS["hard"], LayerGate())
    skipped = {int(name.split(".")[2]) for name, grad in found.items() if isinstance(grad, float)}
    assert skipped == {0, 3, 4, 6}


def logits(model):
    """Return [s, b, vocab] by the forward schedule, and again with a graph."""
    batch = tiny.make_batch(tiny.random_tokens())
    (by_schedule,) = schedule.forward(model, [batch], lambda logits, _: logits)
    with_graph = model.chunks[0](batch.tokens, batch.position_ids, None, labels=batch.labels)
    assert with_graph.requires_grad
    assert torch.equal(with_graph.detach(), by_schedule)
    return by_schedule


def test_a_mask_of_ones_changes_no_bit(source):
    gate = LayerGate()
    gated = build(source, gate)
    plain = logits(build(source))
    assert torch.equal(logits(gated), plain)  # no mask at all
    gate.set(torch.ones(7))
    assert torch.equal(logits(gated), plain)


@pytest.mark.parametrize("kept", [[0, 1, 2, 4, 6], [1, 2, 3], [3]])
@pytest.mark.parametrize("skip", [True, False])
def test_masked_model_is_the_pruned_model_bit_for_bit(source, kept, skip):
    gate = LayerGate(skip_masked_backward=skip)
    masked = build(source, gate)
    gate.set(torch.zeros(7).index_fill(0, torch.tensor(kept), 1.0))
    assert torch.equal(logits(masked), logits(build(source, kept=kept)))
