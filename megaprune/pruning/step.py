"""One training step: the teacher's targets, the student's pass, the gradients of weights and of the mask."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaprune import device
from megaprune.distillation.objectives import LossPart, Objective
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import LayerGate, frozen
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.selection.selector import Selector, WindowSelector
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
    own = None
    if isinstance(selector, WindowSelector):
        own = OwnWindows(batches)
        own.set_masks(gate, selector.window_masks(iteration, own.in_the_step), trainer.model)
    else:
        gate.set(mask, device.torch_device())
    with nullcontext() if train_weights else frozen(trainer.model):
        loss, parts = _forward_backward(trainer, batches, objective, iteration, gate.run_micro_batch)
    mask_grad = gate.take_gradient() if own is None else own.among_all(gate.take_gradient())
    mask_grad = parallel.reduce_mask_gradient(mask_grad, trainer.model.config.sequence_parallel)
    gate.set(None)
    selector.update(mask_grad, iteration)
    lr, grad_norm = trainer.step(iteration) if train_weights else (0.0, None)
    return StepResult(loss, lr, grad_norm, mask, parts)


class OwnWindows:
    """The windows of a step's global batch that are on this rank, by their numbers in it.

    The numbers do not depend on the division into micro-batches and replicas (see `megaprune.data.batches`).
    """

    def __init__(self, batches: Sequence[schedule.MicroBatch]) -> None:
        self._per_batch, replicas = batches[0].tokens.shape[0], parallel.data_parallel_size()
        self._numbers = torch.arange(len(batches) * replicas * self._per_batch).view(len(batches), replicas, -1)

    @property
    def in_the_step(self) -> int:
        """Return the number of windows of the global batch."""
        return self._numbers.numel()

    def set_masks(self, gate: LayerGate, masks: Tensor, model: PipelineModel) -> None:
        """Set the gate to this rank's part of the masks [windows of the step, num_layers].

        With expert parallelism, a layer of a micro-batch runs on all replicas or on none, because they exchange tokens.
        """
        together: list[frozenset[int]] = [frozenset()] * len(self._numbers)
        if model.config.expert_model_parallel_size > 1 or (model.config.expert_tensor_parallel_size or 1) > 1:
            used = masks[self._numbers].flatten(1, 2).any(1)
            together = [frozenset(row.nonzero().flatten().tolist()) for row in used]
        gate.set_windows(masks[self._own], self._per_batch, together, device.torch_device())

    def among_all(self, grad: Tensor) -> Tensor:
        """Return this rank's part [own windows, num_layers] in its place among [windows of the step, num_layers]."""
        return grad.new_zeros(self.in_the_step, grad.shape[1]).index_copy(0, self._own.to(grad.device), grad)

    @property
    def _own(self) -> Tensor:
        return self._numbers[:, parallel.data_parallel_rank()].flatten()


def _forward_backward(
    trainer: Trainer,
    batches: Sequence[schedule.MicroBatch],
    objective: Objective,
    iteration: int,
    announce: Callable[[int], None] | None = None,
) -> tuple[float, Mapping[str, float]]:
    """Accumulate gradients, and return the loss of the global batch and its parts."""
    with trainer.times.teaching():
        targets = objective.targets(batches)
    with objective.watching(trainer.model):
        means = schedule.mean_loss_parts(
            trainer.ddp,
            batches,
            lambda tokens: objective.token_weights(tokens, targets[tokens.number]),
            lambda logits, tokens: objective.token_losses(logits, tokens, targets[tokens.number]),
            list(objective.shares.values()),
            announce,
            trainer.times,
        )
    parts = {name: LossPart(share, mean) for (name, share), mean in zip(objective.shares.items(), means, strict=True)}
    parts |= objective.hook_losses()
    value = sum(part.share * part.mean for part in parts.values())
    if not value < float("inf"):
        raise MegapruneError(f"the loss is {value} at iteration {iteration + 1}: lower --lr, or check the data")
    return value, {name: part.mean for name, part in parts.items()} if len(parts) > 1 else {}
