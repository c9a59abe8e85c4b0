"""Folding of a linear map into a layer's MLP, and what such a map is fitted to."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaprune import device
from megaprune.mcore.pipeline_model import PipelineModel

# The MLP's last projection: of a dense layer, of routed and shared experts, and of Transformer Engine's grouped
# experts. The rows of each are the hidden size, whole on every rank. The core adds the biases of routed experts to the
# MLP's output, and the bias of a dense layer behind it.
_LAST_PROJECTION = re.compile(
    r"^decoder\.layers\.(\d+)\.mlp\.((.+\.)?linear_fc2\.weight|experts\.(.+\.)?linear_fc2\.bias)\d*$"
)


@torch.no_grad()
def fold(model: PipelineModel, maps: Mapping[int, Tensor]) -> None:
    """Apply linear maps to the MLP outputs of layers by changing the weights on this rank.

    The MLP's output is linear in its last projection, that of a layer with experts in the projections of all of them:
    x W' = (x W) T for W' = W T. A layer's expert weights are multiplied on each rank that holds them, and so are their
    biases.

    Args:
        maps: T - 1 by the layer's number in the model, [h, h] each, for row vectors: y -> y + y (T - 1).
    """
    for weight, change in _folded_into(model, maps):
        # torch stores [out, in], so that the map is applied from the left
        whole = weight.float()
        weight.copy_(whole + change.to(whole).t() @ whole)


@contextmanager
def folded(model: PipelineModel, maps: Mapping[int, Tensor]) -> Iterator[None]:
    """Fold maps, as `fold` does, for the time of a block. The weights have their own bits afterwards."""
    before = [(weight, weight.detach().clone()) for weight, _ in _folded_into(model, maps)]
    fold(model, maps)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in before:
                weight.copy_(own)


def _folded_into(model: PipelineModel, maps: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each weight on this rank that a map is folded into, and the map."""
    for name, weight in model.named_parameters():
        match = _LAST_PROJECTION.match(name)
        if match and (change := maps.get(int(match[1]))) is not None:
            yield weight, change


@contextmanager
def watched_mlp(model: PipelineModel, layer: int) -> Iterator[list[Tensor]]:
    """Yield a list that receives the MLP's output of each pass through a layer within the block, [s, b, h], or
    [s / tp, b, h] under sequence parallelism. The list stays empty if the layer is not on this rank.
    """
    seen: list[Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        seen.append(output[0].detach().clone())  # the core adds the residual in place

    hooks = [module.mlp.register_forward_hook(hook) for number, module in model.layers() if number == layer]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def holds(model: PipelineModel, layer: int) -> bool:
    """Return whether a layer is on this rank's pipeline stage."""
    return any(number == layer for number, _ in model.layers())


def sent_to_all_stages(
    values: list[Tensor], mine: bool, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> list[Tensor]:
    """Return on every pipeline stage the tensors of the only stage that has them. Collective.

    Args:
        values: the tensors, if they are this stage's.
        mine: whether they are.
        shapes: their shapes, which every stage knows.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return values
    owner = torch.tensor(group.rank() if mine else -1, device=device.torch_device())
    dist.all_reduce(owner, op=dist.ReduceOp.MAX, group=group)
    source = dist.get_global_rank(group, int(owner))
    boxes = [value.contiguous() for value in values] if mine else []
    boxes = boxes or [torch.empty(shape, dtype=dtype, device=device.torch_device()) for shape in shapes]
    for box in boxes:
        dist.broadcast(box, src=source, group=group)
    return boxes
