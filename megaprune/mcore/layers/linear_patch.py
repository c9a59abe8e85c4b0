"""LinearPatch (Chen et al., 2025): a linear map across a contiguous cut, which eases the jump in the hidden states.

The map is x -> x H diag(d) H^T with H an orthonormal Hadamard matrix and d the ratio of mean magnitudes, channel by
channel of x H, behind and before the removed layers. No stock model has room for it, and it can't be folded into the
layers before the cut, whose outputs reach the layers between along the residual stream. So ours fades: d runs to 1
while the model heals, and what is exported never had it.

Where the hidden size is no power of two, H is block-diagonal, of the largest power of two that divides it (ours).
"""

from typing import Any

import torch
from torch import Tensor

from megaprune.mcore.layers.gated import transformer_layers


def hadamard(x: Tensor) -> Tensor:
    """x H over the last dimension, [..., h]; H is symmetric, and its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    y, step = x.reshape(-1, size), 1
    while step < size:
        pairs = y.reshape(-1, size // (2 * step), 2, step)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).reshape(-1, size)
        step *= 2
    return (y * size**-0.5).reshape(x.shape)


class LinearPatch:
    """The patch on what enters one layer.

    Args:
        scale: d, [h] fp32.
        strength: 1 is the whole patch, 0 none; between, the map is mixed with the identity.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale, self.strength = scale, 0.0

    def attach(self, model: torch.nn.Module, layer: int) -> None:
        """Before the model's layer of this number, counted from 0, if it is on this rank."""
        for module in transformer_layers(model):
            if module.layer_number - 1 == layer:
                module.register_forward_pre_hook(self._before, with_kwargs=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[s, b, h], or a sequence shard of it, to the same shape and dtype."""
        if self.strength == 0:
            return hidden
        scale = self.scale.to(hidden.device)
        mixed = hadamard(hidden.float()) * (1 + self.strength * (scale - 1))
        return hadamard(mixed).to(hidden.dtype)

    def _before(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        gate = getattr(layer, "gate", None)
        if gate is not None and gate.runs_all_layers:  # the teacher that the student also is: it has no cut
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self(kwargs["hidden_states"])}
        return (self(args[0]), *args[1:]), kwargs


def strength_at(iteration: int, train_iters: int) -> float:
    """Falls linearly from 1 at the first iteration to 0 at half of them, and stays there."""
    return max(0.0, 1 - 2 * iteration / train_iters)
