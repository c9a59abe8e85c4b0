"""One training step: the teacher's targets, the student's pass, the gradients of weights and of the mask."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from megaprune import device
from megaprune.distillation.objectives import Objective
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import LayerGate, frozen
from megaprune.mcore.optimizer import Trainer
from megaprune.selection.selector import Selector
from megaprune.utils.errors import MegapruneError


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step; the same on every rank."""

    loss: float
    lr: float
    grad_norm: float | None
    mask: Tensor | None = None


def train_step(
    trainer: Trainer, batches: Sequence[schedule.MicroBatch], objective: Objective, iteration: int
) -> StepResult:
    """Run one step of recovery. Collective.

    Raises:
        MegapruneError: the loss is not finite.
    """
    trainer.zero_grad()
    loss = _forward_backward(trainer, batches, objective, iteration)
    lr, grad_norm = trainer.step(iteration)
    return StepResult(loss, lr, grad_norm)


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
        loss = _forward_backward(trainer, batches, objective, iteration)
    mask_grad = parallel.reduce_mask_gradient(gate.take_gradient(), trainer.model.config.sequence_parallel)
    gate.set(None)
    selector.update(mask_grad, iteration)
    lr, grad_norm = trainer.step(iteration) if train_weights else (0.0, None)
    return StepResult(loss, lr, grad_norm, mask)


def _forward_backward(
    trainer: Trainer, batches: Sequence[schedule.MicroBatch], objective: Objective, iteration: int
) -> float:
    """Accumulate gradients, and return the loss of the global batch."""
    targets = objective.targets(batches)
    with objective.watching(trainer.model):
        value = schedule.mean_token_loss(
            trainer.ddp,
            batches,
            lambda tokens: objective.token_weights(tokens, targets[tokens.number]),
            lambda logits, tokens: objective.token_losses(logits, tokens, targets[tokens.number]),
        )
    if not value < float("inf"):
        raise MegapruneError(f"the loss is {value} at iteration {iteration + 1}: lower --lr, or look at the data")
    return value
