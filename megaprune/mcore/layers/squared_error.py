"""A loss on hidden states that is added to the gradient where a layer ends, on the rank that runs the layer."""

from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def with_squared_error(states: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
    """Return the hidden states unchanged; their gradient gets that of the sum of factors x ||states - targets||^2.

    Args:
        states: [s, b, h], or [s / tp, b, h] under sequence parallelism, as the other arguments.
        targets: [s, b, h], without gradient.
        factors: [s, b], fp32, without gradient.
    """
    output = _SquaredError.apply(states, targets, factors)
    # The pipeline schedule frees the outputs that it has sent, and rejects views.
    return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(states, targets, factors)
        return states.view_as(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        states, targets, factors = ctx.saved_tensors
        error = (states.float() - targets.float()).mul_(2.0 * factors.unsqueeze(-1))
        return error.add_(grad).to(grad.dtype), None, None
