"""Forward and backward passes through Megatron's pipeline schedules."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaprune import device
from megaprune.mcore import parallel
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.step_times import StepTimes

T = TypeVar("T")


class MicroBatch(Protocol):
    """The inputs and labels of a pass, [b, s] each, and the numbers of the windows that the rows hold."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def loss_mask(self) -> Tensor: ...

    @property
    def position_ids(self) -> Tensor: ...

    @property
    def sample_ids(self) -> Sequence[int]: ...


class LossTokens:
    """The tokens of a numbered micro-batch that this rank's logits [s, b, vocab / tp] predict.

    Losses read labels and masks here alone; they are laid out as the logits are, and moved to the device once.
    """

    def __init__(self, batch: MicroBatch, number: int) -> None:
        self.number = number
        self._batch = batch

    @cached_property
    def labels(self) -> Tensor:
        """The next tokens, int64 [s, b]."""
        return self._batch.labels.t().to(device.torch_device())

    @cached_property
    def loss_mask(self) -> Tensor:
        """1 for each token whose loss counts, float32 [s, b]."""
        return self._batch.loss_mask.t().to(device.torch_device())


def forward(
    model: PipelineModel,
    batches: Sequence[MicroBatch],
    collect: Callable[[Tensor, LossTokens], T],
    before: Callable[[LossTokens], None] | None = None,
) -> list[T]:
    """Run micro-batches forward without gradients. Collective.

    Args:
        model: this rank's part of the model, bare or in wrappers.
        batches: micro-batches of this rank, all of one shape.
        collect: called on the last pipeline stage with the logits [s, b, vocab / tp] and the tokens that they
            predict.
        before: called on every stage before a micro-batch's pass, in order.

    Returns:
        The results of `collect` on the last pipeline stage; an empty list on the others.
    """
    training = model.training
    model.eval()
    step = _forward_step(batches, lambda logits, tokens: lambda _, non_loss_data: collect(logits, tokens), before)
    with torch.no_grad():
        collected = _run(model, batches, step, forward_only=True, collect_non_loss_data=True)
    model.train(training)
    return collected


def forward_backward(
    model: PipelineModel,
    batches: Sequence[MicroBatch],
    loss: Callable[[Tensor, LossTokens], Tensor],
    announce: Callable[[int], None] | None = None,
    times: StepTimes | None = None,
) -> list[Tensor]:
    """Run micro-batches forward and backward; gradients accumulate in the model's gradient buffers. Collective.

    Args:
        model: this rank's part of the model in Megatron's DDP wrapper.
        batches: micro-batches of this rank, all of one shape.
        loss: called on the last pipeline stage with the logits [s, b, vocab / tp] and the tokens that they
            predict; returns a scalar. The schedule takes the mean over micro-batches and replicas.
        announce: called on every stage with the number of a micro-batch before its forward pass, and again before its
            backward pass, since the passes of several micro-batches may alternate.
        times: measures the passes.

    Returns:
        The detached losses on the last pipeline stage; an empty list on the others.
    """

    def with_copy(logits: Tensor, tokens: LossTokens) -> Any:
        def loss_func(_: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits, tokens)
            return value, value.detach().clone()

        return loss_func

    before = None if announce is None else lambda tokens: announce(tokens.number)
    return _run(model, batches, _forward_step(batches, with_copy, before, announce, times), forward_only=False)


def mean_token_loss(
    model: PipelineModel,
    batches: Sequence[MicroBatch],
    weights: Callable[[LossTokens], Tensor],
    token_losses: Callable[[Tensor, LossTokens], Tensor],
) -> float:
    """Run micro-batches forward and backward with the weighted mean of their tokens' losses. Collective.

    The mean is taken over the global batch, so that the loss does not depend on the division into micro-batches.

    Args:
        model: this rank's part of the model in Megatron's DDP wrapper.
        batches: micro-batches of this rank, all of one shape.
        weights: called on the last pipeline stage with a micro-batch's tokens; returns their weights [s, b].
        token_losses: called on the last pipeline stage with the logits [s, b, vocab / tp] and the tokens that they
            predict; returns their losses [s, b].

    Returns:
        The mean loss in nats per token, the same on every rank.
    """
    return mean_loss_parts(model, batches, weights, token_losses, [1.0])[0]


def mean_loss_parts(
    model: PipelineModel,
    batches: Sequence[MicroBatch],
    weights: Callable[[LossTokens], Tensor],
    token_losses: Callable[[Tensor, LossTokens], Tensor],
    shares: Sequence[float],
    announce: Callable[[int], None] | None = None,
    times: StepTimes | None = None,
) -> list[float]:
    """Run micro-batches forward and backward with a sum of weighted means of their tokens' losses. Collective.

    Each part of the loss has its own weights, and its mean is taken over the global batch.

    Args:
        model: as in `mean_token_loss`.
        batches: as in `mean_token_loss`.
        weights: as in `mean_token_loss`; with several parts [parts, s, b].
        token_losses: as in `mean_token_loss`; with several parts [parts, s, b].
        shares: factor of each part in the loss.
        announce: as in `forward_backward`.
        times: as in `forward_backward`.

    Returns:
        The mean of each part in nats per token, before the factor, the same on every rank.
    """
    tokens = [LossTokens(batch, number) for number, batch in enumerate(batches)]
    weighing: list[Tensor] = []
    factors = torch.tensor(shares, device=device.torch_device())
    scale: float | Tensor = 0.0
    parts: list[Tensor] = []
    if parallel.is_last_stage():
        weighing = [weights(of_batch) for of_batch in tokens]
        # The scale cancels the means that the schedule and DDP take over micro-batches and replicas.
        total = parallel.sum_over_data_parallel(torch.stack([_sums(w, shares) for w in weighing]).sum(0))
        scale = len(batches) * parallel.data_parallel_size() / total.clamp(min=torch.finfo(total.dtype).tiny)

    def loss(logits: Tensor, given: LossTokens) -> Tensor:
        of_batch = tokens[given.number]  # already on the device
        found = _sums(weighing[given.number] * token_losses(logits, of_batch), shares) * scale
        parts.append(found.detach())
        return (found * factors).sum()

    forward_backward(model, batches, loss, announce, times)
    means = torch.zeros(len(shares), device=device.torch_device())
    if parts:
        means = parallel.sum_over_data_parallel(torch.stack(parts).mean(0)) / parallel.data_parallel_size()
    return parallel.broadcast_from_last_stage(means.tolist())


def _sums(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Return the sums [parts] of values [s, b], or [parts, s, b] with several parts."""
    return values.reshape(len(shares), -1).sum(-1)


def _forward_step(
    batches: Sequence[MicroBatch],
    loss_func_for: Callable[[Tensor, LossTokens], Any],
    before: Callable[[LossTokens], None] | None,
    before_backward: Callable[[int], None] | None = None,
    times: StepTimes | None = None,
) -> Callable[[Any, torch.nn.Module], tuple[Tensor, Any]]:
    """Return the schedule's step function, which takes micro-batch numbers from its data iterator."""
    target = device.torch_device()

    def step(numbers: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        batch = batches[number]
        tokens = LossTokens(batch, number)
        if before is not None:
            before(tokens)
        if times is not None:
            times.forward_begins()
        output = model(
            input_ids=batch.tokens.to(target, non_blocking=True),
            position_ids=batch.position_ids.to(target, non_blocking=True),
            attention_mask=None,  # causal attention throughout
            labels=batch.labels,  # makes LogitsModel return the logits without a copy
        )
        if times is not None:
            times.forward_ends(output)
        if before_backward is not None and output.requires_grad:
            output.register_hook(lambda _: before_backward(number))
        return output, loss_func_for(output, tokens)

    return step


def _run(model: PipelineModel, batches: Sequence[MicroBatch], step: Any, **kwargs: Any) -> list[Any]:
    """Run the pipeline schedule over all micro-batches and return the results of the last stage."""
    micro_batch_size, seq_length = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(batches))),
        model=model.scheduled,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        **kwargs,
    )
