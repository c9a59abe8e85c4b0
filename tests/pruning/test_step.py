"""A training step: the loss and gradients of the global batch, however it is cut, and those of transformers."""

import pytest
import torch

from megaprune.distillation.teachers import OnlineTeacher
from megaprune.mcore.builder import EngineOptions, build_model, vocab_shard
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.pruning.step import Objective, search_step, train_step
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def source(tiny_model):
    return HFSource(tiny_model("qwen3"))


def build(source, gate=None):
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()), gate)
    import_weights(model, source)
    return model


def step(source, kind, sizes, searching):
    """The step's result, and its gradients: of the parameters and, where it searches, of the mask."""
    gate, selector = LayerGate(), tiny.FixedMask()
    options = OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=1.0)
    trainer = Trainer(build(source, gate), EngineOptions(ParallelSizes()), options)
    shard = vocab_shard(source.family.architecture(source.config))
    teacher = None if kind == "ce" else OnlineTeacher(build(source), shard, 10)
    objective = Objective(kind, "rest", shard, teacher)
    if searching:
        result = search_step(trainer, tiny.uneven_batches(sizes), objective, 0, selector, gate)
    else:
        result = train_step(trainer, tiny.uneven_batches(sizes), objective, 0)
    # clipping has scaled them, by the same factor where the norm is the same
    grads = {name: p.main_grad.clone() for name, p in trainer.model.named_parameters()}
    return result, grads | ({"mask": selector.mask_grad} if searching else {})


@pytest.mark.parametrize("kind", ["ce", "kl", "adaptive"])
def test_the_global_batch_counts_not_the_micro_batches(source, kind):
    (result, grads), *others = [step(source, kind, sizes, True) for sizes in ([4], [2, 2], [1, 1, 1, 1])]
    assert result.loss > 0.1 and result.grad_norm > 0.1 and grads["mask"].abs().min() > 1e-4
    assert torch.equal(result.mask, tiny.FixedMask().mask(0))
    for other, other_grads in others:
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(
                other_grads[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4, msg=name
            )


def test_loss_and_gradient_are_those_of_transformers(source):
    model = tiny.load_hf(source.folder)
    total, count = 0.0, 0.0
    for batch in tiny.uneven_batches([1, 3]):
        losses = torch.nn.functional.cross_entropy(
            model(batch.tokens).logits.transpose(1, 2), batch.labels, reduction="none"
        )
        total, count = total + (losses * batch.loss_mask).sum(), count + batch.loss_mask.sum()
    loss = total / count
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    result, _ = step(source, "ce", [2, 2], searching=False)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.lr == 1e-3


def test_a_teacher_teaches_nothing_to_itself(source):
    result, _ = step(source, "kl", [4], searching=False)
    assert abs(result.loss) < 1e-6 and result.grad_norm < 1e-4


def test_a_loss_that_is_not_finite_is_refused(source):
    model = build(source)
    with torch.no_grad():
        model.output_layer.weight[5, 5] = float("nan")
    options = OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=1.0)
    trainer = Trainer(model, EngineOptions(ParallelSizes()), options)
    objective = Objective("ce", "rest", vocab_shard(source.family.architecture(source.config)), None)
    with pytest.raises(MegapruneError, match="the loss is nan at iteration 7"):
        train_step(trainer, tiny.uneven_batches([4]), objective, 6)
