"""A training step: the loss and gradients of the global batch, for any division of it, equal those of transformers."""

from contextlib import contextmanager

import pytest
import torch

from megaprune.distillation.objectives import Objective, make_objective
from megaprune.distillation.teachers import OnlineTeacher, vocab_shard
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.pruning.step import search_step, train_step
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


def trainer_of(model, clip_grad=1.0):
    options = OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=clip_grad)
    return Trainer(model, EngineOptions(ParallelSizes()), options)


def step(source, kind, sizes, searching, kd_alpha=1.0, clip_grad=1.0):
    """Return the step's result, and its gradients: of the parameters and, in a search, of the mask."""
    gate, selector = LayerGate(), tiny.FixedMask()
    trainer = trainer_of(build(source, gate), clip_grad)
    shard = vocab_shard(source.family.architecture(source.config))
    teacher = None if kind == "ce" else OnlineTeacher(build(source), shard, 10)
    objective = make_objective(kind, "rest", shard, teacher, kd_alpha)
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


class WindowMasks(tiny.FixedMask):
    """Selector with a half-open gate in each window of the step."""

    def window_masks(self, step, count):
        masks = self.mask(step).repeat(count, 1)
        masks[range(count), [(2 * window + 1) % 7 for window in range(count)]] = 0.5
        return masks


def test_masks_of_windows_follow_the_windows(source, monkeypatch):
    monkeypatch.setattr(tiny, "FixedMask", WindowMasks)
    (result, grads), *others = [step(source, "adaptive", sizes, True) for sizes in ([4], [2, 2], [1, 1, 1, 1])]
    assert grads["mask"].shape == (4, 7)
    # no token of the first window counts
    assert grads["mask"][0].abs().max() == 0 and grads["mask"][[1, 2, 3], [3, 5, 0]].abs().min() > 1e-3
    assert torch.equal(result.mask, WindowMasks().mask(0))
    half_open = WindowMasks().window_masks(0, 4) == 0.5
    for other, other_grads in others:
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
        torch.testing.assert_close(other_grads["mask"][half_open], grads["mask"][half_open], atol=1e-6, rtol=1e-4)


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


@pytest.mark.parametrize("kind", ["kl", "adaptive"])
def test_a_mixture_is_the_sum_of_its_parts_and_so_is_its_gradient(source, kind):
    (mixed, grads), (kd, kd_grads), (lm, lm_grads) = (
        step(source, of, [1, 3], searching=True, kd_alpha=alpha, clip_grad=0.0)
        for of, alpha in ((kind, 0.3), (kind, 1.0), ("ce", 1.0))
    )
    assert kd.loss > 1e-3 and not kd.parts and not lm.parts
    assert mixed.parts == {"kd_loss": pytest.approx(kd.loss, rel=1e-5), "lm_loss": pytest.approx(lm.loss, rel=1e-5)}
    assert mixed.loss == pytest.approx(0.3 * kd.loss + 0.7 * lm.loss, rel=1e-5)
    for name, grad in grads.items():
        wanted = 0.3 * kd_grads[name] + 0.7 * lm_grads[name]
        torch.testing.assert_close(grad, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4, msg=name)


def test_a_teacher_teaches_nothing_to_itself(source):
    result, _ = step(source, "kl", [4], searching=False)
    assert abs(result.loss) < 1e-6 and result.grad_norm < 1e-4


class Mixture(Objective):
    """Objective made of half of each of two objectives; hooks count the passes of layers while a step runs."""

    def __init__(self, *parts):
        self.parts, self.passes = parts, 0

    def targets(self, batches):
        return list(zip(*(part.targets(batches) for part in self.parts), strict=True))

    def token_weights(self, tokens, targets):
        return tokens.loss_mask

    def token_losses(self, logits, tokens, targets):
        found = [part.token_losses(logits, tokens, of) for part, of in zip(self.parts, targets, strict=True)]
        return torch.stack(found).mean(0)

    @contextmanager
    def watching(self, model):
        def count(*_):
            self.passes += 1

        hook = model.layers()[0].module.register_forward_hook(count)
        yield
        hook.remove()


def test_a_mixture_with_hooks_is_an_objective_too(source):
    shard = vocab_shard(source.family.architecture(source.config))
    trainer = trainer_of(build(source))
    teacher = OnlineTeacher(build(source), shard, 10)
    objective = Mixture(make_objective("ce", "rest", shard, None), make_objective("kl", "rest", shard, teacher))
    result = train_step(trainer, tiny.uneven_batches([2, 2]), objective, 0)
    alone = step(source, "ce", [2, 2], searching=False)[0]  # the teacher's own divergence is 0
    assert result.loss == pytest.approx(alone.loss / 2, rel=1e-4)
    assert objective.passes == 2 and not trainer.model.layers()[0].module._forward_hooks


def test_a_loss_that_is_not_finite_is_refused(source):
    model = build(source)
    with torch.no_grad():
        model.chunks[0].output_layer.weight[5, 5] = float("nan")
    trainer = trainer_of(model)
    objective = make_objective("ce", "rest", vocab_shard(source.family.architecture(source.config)), None)
    with pytest.raises(MegapruneError, match="the loss is nan at iteration 7"):
        train_step(trainer, tiny.uneven_batches([4]), objective, 6)
