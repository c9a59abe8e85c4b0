"""Transfer of tensors that belong to layers between the pipeline stages of two models with different layouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaprune import device
from megaprune.mcore.pipeline_model import PipelineModel


@dataclass(frozen=True)
class Route:
    """Path of a layer's tensor from the stage that has it to the stage that needs it."""

    layer: int
    sender: int
    receiver: int


def stage_of_layers(model: PipelineModel) -> dict[int, int]:
    """Return the pipeline stage of each layer of the whole model. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    numbers: list[list[int]] = [[] for _ in range(group.size())]
    dist.all_gather_object(numbers, [layer.number for layer in model.layers()], group=group)
    return {number: stage for stage, found in enumerate(numbers) for number in found}


def transfer(
    held: Mapping[int, Sequence[Tensor]], routes: Sequence[Route], number: int, shape: Sequence[int], dtype: torch.dtype
) -> dict[int, list[Tensor]]:
    """Return the tensors of the layers that this stage needs, by layer. Collective over the pipeline.

    Ranks exchange tensors with the ranks of other stages at the same position in tensor and data parallelism. Every
    rank goes through the routes in the same order, so that sends and receives match.

    Args:
        held: tensors of the layers of which this stage is the sender, one per micro-batch.
        routes: the same on every rank.
        number: number of tensors of each layer.
        shape: shape of each tensor.
        dtype: type of each tensor.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    here = parallel_state.get_pipeline_model_parallel_rank()
    found: dict[int, list[Tensor]] = {}
    exchanges = []
    for route in routes:
        if route.sender == here == route.receiver:
            found[route.layer] = list(held[route.layer])
        elif route.sender == here:
            peer = dist.get_global_rank(group, route.receiver)
            exchanges += [dist.P2POp(dist.isend, sent.contiguous(), peer, group) for sent in held[route.layer]]
        elif route.receiver == here:
            found[route.layer] = [torch.empty(*shape, dtype=dtype, device=device.torch_device()) for _ in range(number)]
            peer = dist.get_global_rank(group, route.sender)
            exchanges += [dist.P2POp(dist.irecv, received, peer, group) for received in found[route.layer]]
    for request in dist.batch_isend_irecv(exchanges) if exchanges else ():
        request.wait()
    return found
