"""LinearPatch (Chen et al., 2025): a linear map of the hidden states where a contiguous segment of layers was removed.

The map is x -> x H diag(d) H^T. H is an orthonormal Hadamard matrix. d is, for each channel of x H, the ratio of the
mean magnitude after the removed layers to that before them. Standard model classes have no place for the map, and the
residual stream prevents folding it into the layers before the cut. This implementation therefore fades it out: d moves
to 1 during recovery, and the exported model does not contain the map.

If the hidden size is not a power of two, H is block-diagonal with blocks of the largest power of two that divides it.
The paper does not cover this case.
"""

from typing import Any

import torch
from torch import Tensor

from megaprune.mcore.pipeline_model import PipelineModel


def hadamard(x: Tensor) -> Tensor:
    """Return x H for x [..., h]. H is symmetric and its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    y, step = x.reshape(-1, size), 1
    while step < size:
        pairs = y.reshape(-1, size // (2 * step), 2, step)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).reshape(-1, size)
        step *= 2
    return (y * size**-0.5).reshape(x.shape)


class LinearPatch:
    """Patch of the input of one layer.

    `strength` interpolates between the identity (0, the initial value) and the full map (1).

    Args:
        scale: d, [h] fp32.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale, self.strength = scale, 0.0

    def attach(self, model: PipelineModel, layer: int) -> None:
        """Attach the patch before a layer of the model, numbered from 0, if the layer is on this rank."""
        for number, module in model.layers():
            if number == layer:
                module.register_forward_pre_hook(self._before, with_kwargs=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the patched hidden states, in the shape and dtype of `hidden`: [s, b, h] or [s / tp, b, h]."""
        if self.strength == 0:
            return hidden
        scale = self.scale.to(hidden.device)
        mixed = hadamard(hidden.float()) * (1 + self.strength * (scale - 1))
        return hadamard(mixed).to(hidden.dtype)

    def _before(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        gate = getattr(layer, "gate", None)
        if gate is not None and gate.runs_all_layers:  # a pass of the self-teacher, which has all layers
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self(kwargs["hidden_states"])}
        return (self(args[0]), *args[1:]), kwargs


def strength_at(iteration: int, train_iters: int) -> float:
    """Return the strength at an iteration: linear from 1 at the first to 0 at half of `train_iters`, then 0."""
    return max(0.0, 1 - 2 * iteration / train_iters)
