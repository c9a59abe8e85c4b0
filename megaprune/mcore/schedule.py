"""Forward and backward passes of a batch through Megatron's pipeline schedules."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaprune import device
from megaprune.mcore import parallel


class MicroBatch(Protocol):
    """What a pass reads of a micro-batch: [b, s] each."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor


def forward(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    collect: Callable[[Tensor, int], Any],
    before: Callable[[int], None] | None = None,
) -> list[Any]:
    """Runs micro-batches forward without gradients.

    Args:
        collect: on the last stage, takes the logits [s, b, vocab / tp] and the micro-batch's number.
        before: called on every stage before a micro-batch's pass, in order.

    Returns:
        What ``collect`` gave, on the last pipeline stage; an empty list on the others.
    """
    training = model.training
    model.eval()
    step = _forward_step(batches, lambda logits, number: lambda _, non_loss_data: collect(logits, number), before)
    with torch.no_grad():
        collected = _run(model, batches, step, forward_only=True, collect_non_loss_data=True)
    model.train(training)
    return collected


def forward_backward(
    model: torch.nn.Module, batches: Sequence[MicroBatch], loss: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """Runs micro-batches forward and backward; gradients add up in the model's gradient buffers.

    Args:
        loss: on the last stage, the loss (a scalar) of the logits [s, b, vocab / tp] of a numbered micro-batch. The
            schedule takes the mean over micro-batches and replicas.

    Returns:
        The losses, detached, on the last pipeline stage; an empty list on the others.
    """

    def with_copy(logits: Tensor, number: int) -> Any:
        def loss_func(_: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits, number)
            return value, value.detach().clone()

        return loss_func

    return _run(model, batches, _forward_step(batches, with_copy, None), forward_only=False)


def mean_token_loss(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    weights: Callable[[int], Tensor],
    token_losses: Callable[[Tensor, int], Tensor],
) -> float:
    """Runs micro-batches forward and backward through the weighted mean of their tokens' losses. Collective.

    Normalised over the global batch, not over a micro-batch: the same loss however the batch is cut.

    Args:
        weights: on the last stage, the weights [s, b] of a numbered micro-batch's tokens.
        token_losses: on the last stage, the losses [s, b] of the logits [s, b, vocab / tp] of a numbered micro-batch.

    Returns:
        The mean; the same on every rank.
    """
    weighing: list[Tensor] = []
    scale = 0.0
    if parallel.is_last_stage():
        weighing = [weights(number) for number in range(len(batches))]
        # The schedule and DDP take means over micro-batches and replicas, which the scale undoes.
        total = parallel.sum_over_data_parallel(torch.stack([w.sum() for w in weighing]).sum())
        scale = len(batches) * parallel.data_parallel_size() / total.clamp(min=torch.finfo(total.dtype).tiny)

    def loss(logits: Tensor, number: int) -> Tensor:
        return (weighing[number] * token_losses(logits, number)).sum() * scale

    losses = forward_backward(model, batches, loss)
    mean = torch.zeros((), device=device.torch_device())
    if losses:
        mean = parallel.sum_over_data_parallel(torch.stack(losses).mean()) / parallel.data_parallel_size()
    return parallel.broadcast_from_last_stage(mean.item())


def _forward_step(
    batches: Sequence[MicroBatch],
    loss_func_for: Callable[[Tensor, int], Any],
    before: Callable[[int], None] | None,
) -> Callable[[Any, torch.nn.Module], tuple[Tensor, Any]]:
    target = device.torch_device()

    def step(numbers: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        if before is not None:
            before(number)
        batch = batches[number]
        output = model(
            input_ids=batch.tokens.to(target, non_blocking=True),
            position_ids=batch.position_ids.to(target, non_blocking=True),
            attention_mask=None,  # causal attention throughout
            labels=batch.labels,  # asks for the logits as they are: see LogitsModel
        )
        return output, loss_func_for(output, number)

    return step


def _run(model: torch.nn.Module, batches: Sequence[MicroBatch], step: Any, **kwargs: Any) -> list[Any]:
    micro_batch_size, seq_length = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(batches))),
        model=[model],
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        **kwargs,
    )
