"""The loss on hidden states: its value and gradient are those of transformers' hidden states, for any division of the
batch, with and without recomputation.
"""

import pytest
import torch

from megaprune.distillation.hidden_states import WithHiddenStates
from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import CachedTeacher, OnlineTeacher, SelfTeacher, vocab_shard
from megaprune.mcore.adapters import attach_adapters
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.pruning.step import train_step
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")

WEIGHT = 2.0
FAMILIES = {"qwen3": [0, 2, 3, 6], "deepseek_v3": [0, 2, 4]}


def step(source, kept, sizes, recompute=None, weight=WEIGHT):
    """Return the result and the gradients of a step whose loss is half cross-entropy and half distillation."""
    arch, engine = source.family.architecture(source.config), EngineOptions(ParallelSizes(), False, False, recompute)
    teacher_model = build_model(arch, [arch.num_layers], engine)
    import_weights(teacher_model, source)
    student = build_model(arch.pruned(kept), [len(kept)], engine)
    import_weights(student, source, kept)
    trainer = Trainer(student, engine, OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=0.0))
    teacher = OnlineTeacher(teacher_model, vocab_shard(arch), 10)
    objective = make_objective("kl", "rest", vocab_shard(arch), teacher, 0.0)
    if weight:
        objective = WithHiddenStates(objective, teacher, trainer.model, dict(enumerate(kept)), weight)
    result = train_step(trainer, tiny.uneven_batches(sizes), objective, 0)
    return result, {name: p.main_grad.clone() for name, p in trainer.model.named_parameters()}


def layer_outputs(model, tokens):
    """Return the logits of a model of transformers, and its layers' outputs, [b, s, h] each."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_are_those_of_transformers(tiny_model, family):
    source, kept = HFSource(tiny_model(family)), FAMILIES[family]
    teacher, student = tiny.load_hf(source.folder), tiny.load_hf(source.folder)
    student.model.layers = torch.nn.ModuleList([student.model.layers[layer] for layer in kept])
    lm, hidden, count = 0.0, 0.0, 0.0
    for batch in tiny.uneven_batches([4]):
        logits, found = layer_outputs(student, batch.tokens)
        wanted = [states.detach() for states in layer_outputs(teacher, batch.tokens)[1]]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        lm, count = lm + (losses * batch.loss_mask).sum(), count + batch.loss_mask.sum()
        for states, layer in zip(found, kept, strict=True):
            errors = (states - wanted[layer]).square().sum(-1) / wanted[layer].square().sum(-1)
            hidden = hidden + (errors * batch.loss_mask).sum() / len(kept)
    lm, hidden = lm / count, hidden / count
    (lm + WEIGHT * hidden).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()

    result, grads = step(source, kept, [2, 2])
    assert result.parts["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
    assert result.parts["hidden_loss"] == pytest.approx(hidden.item(), rel=1e-5)
    assert result.loss == pytest.approx((lm + WEIGHT * hidden).item(), rel=1e-5)
    assert torch.stack([grad.norm() for grad in grads.values()]).norm().item() == pytest.approx(norm.item(), rel=1e-4)
    assert hidden > 0.01 and step(source, kept, [4], weight=0.0)[0].loss == pytest.approx(lm.item(), rel=1e-5)


def test_the_global_batch_counts_not_the_micro_batches_and_recomputation_changes_nothing(tiny_model):
    source, kept = HFSource(tiny_model("qwen3")), FAMILIES["qwen3"]
    whole, grads = step(source, kept, [4])
    for sizes, recompute in (([1, 1, 1, 1], None), ([2, 2], "full")):
        other, other_grads = step(source, kept, sizes, recompute)
        assert other.parts == {name: pytest.approx(mean, rel=1e-5, abs=1e-7) for name, mean in whole.parts.items()}
        for name, grad in grads.items():
            torch.testing.assert_close(
                other_grads[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4, msg=name
            )


def test_a_teacher_that_is_the_student_has_the_hidden_states_of_the_whole_model(tiny_model):
    source, kept = HFSource(tiny_model("qwen3")), FAMILIES["qwen3"]
    arch, engine, gate = source.family.architecture(source.config), EngineOptions(ParallelSizes()), LayerGate()
    model = build_model(arch, [arch.num_layers], engine, gate)
    import_weights(model, source)
    attach_adapters(model, LoRAOptions(2, 4.0, ("linear_qkv", "linear_fc1")), seed=1)
    gate.bypass(set(range(arch.num_layers)) - set(kept))
    trainer = Trainer(model, engine, OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=0.0))
    teacher = SelfTeacher(trainer.ddp, gate, vocab_shard(arch), 10)
    objective = make_objective("kl", "rest", vocab_shard(arch), teacher, 0.0)
    objective = WithHiddenStates(objective, teacher, trainer.model, {layer: layer for layer in kept}, WEIGHT)
    result = train_step(trainer, tiny.uneven_batches([4]), objective, 0)
    expected = step(source, kept, [4])[0]
    assert result.parts == {name: pytest.approx(mean, rel=1e-5) for name, mean in expected.parts.items()}


def test_a_cached_teacher_has_no_hidden_states():
    teacher = CachedTeacher(None)
    with pytest.raises(MegapruneError, match="--hidden-loss-weight"):
        teacher.watched_layers(lambda *_: None)
    with pytest.raises(MegapruneError, match="--hidden-loss-weight"):
        teacher.stage_of_layers()
