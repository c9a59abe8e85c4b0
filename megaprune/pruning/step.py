"""One training step: the teacher's targets, the student's pass, the gradients of weights and of the mask."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from megaprune import device
from megaprune.distillation.objectives import LossPart, Objective
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import LayerGate, frozen
from megaprune.mcore.optimizer import Trainer
from megaprune.selection.selector import Selector
from megaprune.utils.errors import MegapruneError


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step; the same on every rank.

    Args:
        parts: the means that the loss is made of, by the names of their metrics; empty if it has one part only.
    """

    loss: float
    lr: float
    grad_norm: float | None
    mask: Tensor | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def train_step(
    trainer: Trainer, batches: Sequence[schedule.MicroBatch], objective: Objective, iteration: int
) -> StepResult:
    """Run one step of recovery. Collective.

    Raises:
        MegapruneError: the loss is not finite.
    """
    trainer.zero_grad()
    loss, parts = _forward_backward(trainer, batches, objective, iteration)
    lr, grad_norm = trainer.step(iteration)
    return StepResult(loss, lr, grad_norm, parts=parts)


def search_step(
    trainer: Trainer,
    batches: Sequence[schedule.MicroBatch],
    objective: Objective,
    iteration: int,
    selector: Selector,
    gate: LayerGate,
    train_weights: bool = True,
) -> StepResult:
    """Run one step of a search, in which the weights and the layers' scores train together (E3-Pruner). Collective.

    Args:
        train_weights: False leaves the weights unchanged and computes no gradients for them.

    Raises:
        MegapruneError: the loss is not finite.
    """
    trainer.zero_grad()
    mask = selector.mask(iteration)
    gate.set(mask, device.torch_device())
    with nullcontext() if train_weights else frozen(trainer.model):
        loss, parts = _forward_backward(trainer, batches, objective, iteration)
    mask_grad = parallel.reduce_mask_gradient(gate.take_gradient(), trainer.model.config.sequence_parallel)
    gate.set(None)
    selector.update(mask_grad, iteration)
    lr, grad_norm = trainer.step(iteration) if train_weights else (0.0, None)
    return StepResult(loss, lr, grad_norm, mask, parts)


def _forward_backward(
    trainer: Trainer, batches: Sequence[schedule.MicroBatch], objective: Objective, iteration: int
) -> tuple[float, Mapping[str, float]]:
    """Accumulate gradients, and return the loss of the global batch and its parts."""
    targets = objective.targets(batches)
    with objective.watching(trainer.model):
        means = schedule.mean_loss_parts(
            trainer.ddp,
            batches,
            lambda tokens: objective.token_weights(tokens, targets[tokens.number]),
            lambda logits, tokens: objective.token_losses(logits, tokens, targets[tokens.number]),
            list(objective.shares.values()),
        )
    parts = {name: LossPart(share, mean) for (name, share), mean in zip(objective.shares.items(), means, strict=True)}
    parts |= objective.hook_losses()
    value = sum(part.share * part.mean for part in parts.values())
    if not value < float("inf"):
        raise MegapruneError(f"the loss is {value} at iteration {iteration + 1}: lower --lr, or check the data")
    return value, {name: part.mean for name, part in parts.items()} if len(parts) > 1 else {}
