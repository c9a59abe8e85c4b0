"""Gated transformer layers with E3-Pruner's mask: ``x + m * (layer(x) - x)``.

The mask is sampled once per step outside the layers and passed to them as a leaf tensor. Its gradient therefore
accumulates over micro-batches, works under activation recompute, and is reduced over the ranks once. It holds for all
windows of the step, or each window has a mask of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megaprune.mcore.pipeline_model import PipelineModel


class LayerGate:
    """Mask shared by all gated layers of a model. At first there is no mask, and all layers run normally.

    Args:
        skip_masked_backward: skip the backward pass of layers whose mask is 0. The gradients are exact in both cases;
            False serves for comparison.
    """

    def __init__(self, skip_masked_backward: bool = True) -> None:
        self.skip_masked_backward = skip_masked_backward
        self.mask: Tensor | None = None
        # layer -> its mask in each window of the micro-batch that runs; one number if all windows have the same mask
        self._values: list[tuple[float, ...]] = []
        # with masks of windows: windows in a micro-batch, the number of the one that runs, and layers that run anyway
        self._windows: int | None = None
        self._number = 0
        self._together: Sequence[frozenset[int]] = ()
        self._bypassed: frozenset[int] = frozenset()
        self._rows: list[list[float]] = []
        # layer -> the mask up to and including the layer, and the layer's output under this mask
        self._outputs: dict[int, tuple[tuple[tuple[float, ...], ...], Tensor]] | None = None

    def set(self, mask: Tensor | None, device: torch.device | None = None) -> None:
        """Set the mask of the following passes.

        Args:
            mask: [num_layers]; None removes the mask.
            device: device of the model; None keeps the mask's device.
        """
        self._windows = None
        if mask is None:
            self.mask = None
            return
        self._values = [(value,) for value in mask.tolist()]  # one transfer per step, so that no layer waits
        self.mask = mask.detach().to(device=device, dtype=torch.float32).clone().requires_grad_()

    def set_windows(
        self, masks: Tensor, windows: int, together: Sequence[frozenset[int]], device: torch.device | None = None
    ) -> None:
        """Set masks of single windows for the following passes, each of which `run_micro_batch` announces.

        A layer that no window of a micro-batch uses does not run at all; its mask gets no gradient there.

        Args:
            masks: [micro-batches * windows, num_layers], in the order of this rank's windows.
            windows: number of windows in a micro-batch.
            together: for each micro-batch, the layers that run although none of its windows uses them, because the
                layers of other ranks wait for them.
            device: device of the model; None keeps the device of the masks.
        """
        self.set(None)
        self._windows, self._together, self._rows = windows, together, masks.t().tolist()
        self.mask = masks.detach().to(device=device, dtype=torch.float32).clone().requires_grad_()
        self.run_micro_batch(0)

    def run_micro_batch(self, number: int) -> None:
        """Use the masks of the windows of a micro-batch. Call it before its forward pass and before its backward pass,
        in which activations may be recomputed.
        """
        if self._windows is None or self.mask is None:
            return
        self._number, first = number, number * self._windows
        self._values = [tuple(row[first : first + self._windows]) for row in self._rows]

    def bypass(self, layers: Iterable[int]) -> None:
        """Skip these layers (from 0) in all later passes, as if they were pruned; their mask gets no gradient."""
        self._bypassed = frozenset(layers)

    @contextmanager
    def all_layers(self) -> Iterator[None]:
        """Run all layers normally within the block, regardless of the mask and bypassed layers."""
        mask, bypassed = self.mask, self._bypassed
        self.mask, self._bypassed = None, frozenset()
        try:
            yield
        finally:
            self.mask, self._bypassed = mask, bypassed

    @contextmanager
    def sharing_prefixes(self) -> Iterator[None]:
        """Reuse layer outputs in passes without gradients within the block.

        If the mask of a pass equals that of the last pass up to a layer, the layer's last output is reused. One output
        per layer is kept in memory. The results are exact if `forget` is called before each new micro-batch.
        """
        self._outputs = {}
        try:
            yield
        finally:
            self._outputs = None

    def forget(self) -> None:
        """Drop all outputs kept by `sharing_prefixes`; call it before a new micro-batch."""
        if self._outputs is not None:
            self._outputs = {}

    def recalled(self, layer: int) -> Tensor | None:
        """Return the kept output of `layer` if it was computed with the current mask up to this layer, else None."""
        if self._outputs is None or layer not in self._outputs or torch.is_grad_enabled():
            return None
        prefix, output = self._outputs[layer]
        return output if prefix == self._prefix(layer) else None

    def remember(self, layer: int, output: Tensor) -> None:
        """Keep the output of `layer` within `sharing_prefixes` in passes without gradients."""
        if self._outputs is not None and not torch.is_grad_enabled():
            self._outputs[layer] = (self._prefix(layer), output)

    def _prefix(self, layer: int) -> tuple[tuple[float, ...], ...]:
        """Return the mask up to and including `layer`."""
        return tuple(self._values[: layer + 1]) if self.mask is not None else ((1.0,),) * (layer + 1)

    def bypasses(self, layer: int) -> bool:
        """Return whether `layer` is bypassed."""
        return layer in self._bypassed

    @property
    def runs_all_layers(self) -> bool:
        """True if no layer is bypassed."""
        return not self._bypassed

    def value(self, layer: int) -> float | None:
        """Return the mask of one layer as a number; None if the windows of the micro-batch differ."""
        values = self._values[layer]
        return values[0] if len(set(values)) == 1 else None

    def mask_of(self, layer: int) -> Tensor:
        """Return the mask of one layer as part of the leaf: a scalar, or [windows of the micro-batch]."""
        assert self.mask is not None
        if self._windows is None:
            return self.mask[layer]
        return self.mask[self._number * self._windows :, layer][: self._windows]

    def skips(self, layer: int) -> bool:
        """Return whether no window of the micro-batch needs the layer's output or its mask's gradient."""
        return self._windows is not None and self.value(layer) == 0.0 and layer not in self._together[self._number]

    def runs_without_graph(self, layer: int) -> bool:
        """Return whether a layer whose mask is 0 runs forward only, for the mask's gradient."""
        return self.skip_masked_backward and self._windows is None and self.value(layer) == 0.0

    def take_gradient(self) -> Tensor:
        """Return the mask's gradient that has accumulated on this rank, in the shape of the mask."""
        assert self.mask is not None
        return torch.zeros_like(self.mask) if self.mask.grad is None else self.mask.grad


class _Gate(torch.autograd.Function):
    """Autograd function for ``x + m * (y - x)``; the mask's gradient is ``<dL/dout, y - x>``, in each window if it has
    a mask for each.

    For m = 1 the output is y itself, and for m = 0 it is x, so that a masked model is bitwise equal to the pruned one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor, value: float | None) -> Tensor:
        ctx.save_for_backward(x, y, mask)
        ctx.value = value
        if value == 1.0:
            return y.view_as(y)
        if value == 0.0:
            return x.view_as(x)
        if value is not None:
            return torch.lerp(x, y, value)
        return torch.lerp(x, y, _per_window(mask, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, y, mask = ctx.saved_tensors
        need_x, need_y, need_mask, _ = ctx.needs_input_grad
        grad_mask = None
        if need_mask:
            change = grad.float() * (y.float() - x.float())
            grad_mask = change.sum() if mask.dim() == 0 else change.sum((0, 2))
        weight = _per_window(mask, grad) if ctx.value is None else ctx.value
        grad_x = _scaled(grad, 1.0 - weight) if need_x else None
        grad_y = _scaled(grad, weight) if need_y else None
        return grad_x, grad_y, grad_mask, None


def _per_window(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return the mask [b] as a factor of hidden states [s, b, h]."""
    return mask.detach().to(hidden.dtype).view(1, -1, 1)


def _scaled(grad: Tensor, factor: float | Tensor) -> Tensor | None:
    """Return the scaled gradient; None, which autograd reads as zero, for a factor of 0."""
    if isinstance(factor, float):
        if factor == 0.0:
            return None
        if factor == 1.0:
            return grad
    return grad * factor


class GatedTransformerLayer(TransformerLayer):
    """Transformer layer with a gate. `gate` is set after the model is built; with None the layer runs normally."""

    gate: LayerGate | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the gated output of the layer.

        Args:
            hidden_states: [s, b, h], or [s / tp, b, h] under sequence parallelism.
            args: other positional arguments of the core's layer.
            kwargs: keyword arguments of the core's layer.

        Returns:
            The output in the shape of `hidden_states`, and the core's cross-attention context.
        """
        gate, layer = self.gate, self.layer_number - 1
        if gate is not None and gate.bypasses(layer):
            return _viewless(hidden_states.view_as(hidden_states)), kwargs.get("context")
        if gate is not None and (known := gate.recalled(layer)) is not None:
            return _viewless(known.view_as(known)), kwargs.get("context")
        if gate is None or gate.mask is None:
            output, context = super().forward(hidden_states, *args, **kwargs)
            if gate is not None:
                gate.remember(layer, output)
            return output, context
        value = gate.value(layer)
        if value == 0.0 and not torch.is_grad_enabled():
            return _viewless(hidden_states.view_as(hidden_states)), kwargs.get("context")
        if gate.skips(layer):
            return _viewless(_connected(hidden_states, gate.mask)), kwargs.get("context")
        if gate.runs_without_graph(layer):
            # The derivative by x is the identity, and the mask's gradient needs only y, so the layer needs no graph.
            with torch.no_grad():
                y, context = super().forward(hidden_states.detach(), *args, **kwargs)
            y = y.detach()
        else:
            y, context = super().forward(hidden_states, *args, **kwargs)
        output = _viewless(_Gate.apply(hidden_states, y, gate.mask_of(layer), value))
        gate.remember(layer, output)
        return output, context


def _connected(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden states with a graph: a pipeline stage needs one, even if its weights are frozen and none of
    its layers runs.
    """
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states.view_as(hidden_states)
    return hidden_states + 0.0 * mask.sum().to(hidden_states.dtype)


@contextmanager
def frozen(model: PipelineModel) -> Iterator[None]:
    """Compute no gradients of weights within the block; the mask still gets its gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _viewless(out: Tensor) -> Tensor:
    """Return the output as a tensor that is not a view.

    The pipeline schedule frees the outputs that it has sent and rejects views. An input that activation recompute
    returns unchanged is a view, too.
    """
    return make_viewless_tensor(out, requires_grad=out.requires_grad, keep_graph=True)
