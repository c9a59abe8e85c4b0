"""The gate on a transformer layer: ``x + m * (layer(x) - x)``, E3-Pruner's mask.

The mask is sampled once per step outside the layers and handed to them as a leaf, so that its gradient adds up over
micro-batches, works under activation recompute, and is reduced over the ranks once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


class LayerGate:
    """The mask that all gated layers of one model share. Closed (no mask) at first: layers run as they are.

    Args:
        skip_masked_backward: leave out the backward pass of layers whose mask is 0. Exact; False computes it plainly,
            for comparison.
    """

    def __init__(self, skip_masked_backward: bool = True) -> None:
        self.skip_masked_backward = skip_masked_backward
        self.mask: Tensor | None = None
        self._values: list[float] = []
        self._bypassed: frozenset[int] = frozenset()
        # of each layer: the masks of the layers up to it, and its output under them
        self._outputs: dict[int, tuple[tuple[float, ...], Tensor]] | None = None

    def set(self, mask: Tensor | None, device: torch.device | None = None) -> None:
        """Takes the mask [num_layers] of the next passes; None removes it."""
        if mask is None:
            self.mask = None
            return
        self._values = mask.tolist()  # read once per step, so that no layer waits for the device
        self.mask = mask.detach().to(device=device, dtype=torch.float32).clone().requires_grad_()

    def bypass(self, layers: Iterable[int]) -> None:
        """Leaves these layers (from 0) out of all later passes, with no mask to learn: as if they were pruned."""
        self._bypassed = frozenset(layers)

    @contextmanager
    def all_layers(self) -> Iterator[None]:
        """Passes within the block run every layer as it is, whatever the mask and the bypass."""
        mask, bypassed = self.mask, self._bypassed
        self.mask, self._bypassed = None, frozenset()
        try:
            yield
        finally:
            self.mask, self._bypassed = mask, bypassed

    @contextmanager
    def sharing_prefixes(self) -> Iterator[None]:
        """Passes without gradients within the block take the output of layers up to which the mask is the last pass's
        from there. Exact, as long as `forget` is called between micro-batches; holds one output a layer.
        """
        self._outputs = {}
        try:
            yield
        finally:
            self._outputs = None

    def forget(self) -> None:
        """Another micro-batch comes: nothing of the last one's passes can be shared."""
        if self._outputs is not None:
            self._outputs = {}

    def recalled(self, layer: int) -> Tensor | None:
        """What the layer's output was under the mask as it is up to there, where that is known."""
        if self._outputs is None or layer not in self._outputs or torch.is_grad_enabled():
            return None
        prefix, output = self._outputs[layer]
        return output if prefix == self._prefix(layer) else None

    def remember(self, layer: int, output: Tensor) -> None:
        """Keeps the layer's output for passes that share the mask up to there, where such passes are made."""
        if self._outputs is not None and not torch.is_grad_enabled():
            self._outputs[layer] = (self._prefix(layer), output)

    def _prefix(self, layer: int) -> tuple[float, ...]:
        return tuple(self._values[: layer + 1]) if self.mask is not None else (1.0,) * (layer + 1)

    def bypasses(self, layer: int) -> bool:
        """Whether a layer is left out."""
        return layer in self._bypassed

    @property
    def runs_all_layers(self) -> bool:
        """Whether no layer is left out."""
        return not self._bypassed

    def value(self, layer: int) -> float:
        """The mask of one layer as a number."""
        return self._values[layer]

    def take_gradient(self) -> Tensor:
        """The gradient of the mask gathered on this rank, [num_layers]."""
        assert self.mask is not None
        return torch.zeros_like(self.mask) if self.mask.grad is None else self.mask.grad


class _Gate(torch.autograd.Function):
    """``x + m * (y - x)`` with the mask's gradient ``<dL/dout, y - x>``.

    For m = 1 the output is y itself and for m = 0 it is x, so that a masked model equals the pruned one bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.value = value
        if value == 1.0:
            return y.view_as(y)
        if value == 0.0:
            return x.view_as(x)
        return torch.lerp(x, y, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        need_x, need_y, need_mask, _ = ctx.needs_input_grad
        grad_mask = torch.sum(grad.float() * (y.float() - x.float())) if need_mask else None
        grad_x = _scaled(grad, 1.0 - ctx.value) if need_x else None
        grad_y = _scaled(grad, ctx.value) if need_y else None
        return grad_x, grad_y, grad_mask, None


def _scaled(grad: Tensor, factor: float) -> Tensor | None:
    if factor == 0.0:
        return None
    return grad if factor == 1.0 else grad * factor


class GatedTransformerLayer(TransformerLayer):
    """A transformer layer behind its gate. ``gate`` is set after the model is built; None leaves the layer as it is."""

    gate: LayerGate | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states [s, b, h] (its sequence shard under sequence parallelism) to the same shape."""
        gate, layer = self.gate, self.layer_number - 1
        if gate is not None and gate.bypasses(layer):
            return _handed_on(hidden_states.view_as(hidden_states)), kwargs.get("context")
        if gate is not None and (known := gate.recalled(layer)) is not None:
            return _handed_on(known.view_as(known)), kwargs.get("context")
        if gate is None or gate.mask is None:
            output, context = super().forward(hidden_states, *args, **kwargs)
            if gate is not None:
                gate.remember(layer, output)
            return output, context
        value = gate.value(layer)
        if value == 0.0 and not torch.is_grad_enabled():
            return _handed_on(hidden_states.view_as(hidden_states)), kwargs.get("context")
        if value == 0.0 and gate.skip_masked_backward:
            # d out/dx is the identity and the mask's gradient needs only y: no graph, no kept activations.
            with torch.no_grad():
                y, context = super().forward(hidden_states.detach(), *args, **kwargs)
            y = y.detach()
        else:
            y, context = super().forward(hidden_states, *args, **kwargs)
        output = _handed_on(_Gate.apply(hidden_states, y, gate.mask[layer], value))
        gate.remember(layer, output)
        return output, context


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights get no gradients within the block; a mask does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def transformer_layers(model: torch.nn.Module) -> list[TransformerLayer]:
    """The transformer layers of the model on this rank, in order."""
    return [module for module in model.modules() if isinstance(module, TransformerLayer)]


def _handed_on(out: Tensor) -> Tensor:
    """A view as a tensor of its own: the pipeline frees the outputs that it has sent, and refuses views, which an
    input that comes out of an activation recomputation as it went in is too."""
    return make_viewless_tensor(out, requires_grad=out.requires_grad, keep_graph=True)
