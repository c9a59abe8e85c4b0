"""Simulation of a cluster: build any rank's part of a model without weights, accelerators or other processes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaprune import device
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.layers.lora import LoRAOptions, add_adapters
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models import Architecture


@dataclass(frozen=True)
class Share:
    """Sizes of one rank's part of a model.

    Args:
        parameters: number of the model's parameters, without adapters and including vocabulary padding.
        model_bytes: bytes of the model's parameters and buffers.
        adapter_bytes: bytes of the adapters.
        trained: number of trainable parameters outside routed experts.
        trained_experts: number of trainable parameters of routed experts, which have their own data-parallel groups.
        largest_trained: number of elements of the largest trainable tensor.
    """

    parameters: int
    model_bytes: int
    adapter_bytes: int
    trained: int
    trained_experts: int
    largest_trained: int


@contextmanager
def simulated_rank(rank: int, world_size: int, sizes: ParallelSizes) -> Iterator[None]:
    """Make this process a rank of a simulated cluster: groups are set up, and collectives do nothing.

    The process must not be in a process group.

    Args:
        rank: global rank to simulate.
        world_size: number of simulated processes.
        sizes: parallel sizes.
    """
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel.set_up_groups(sizes, gloo=False)
        yield
    finally:
        parallel.finish()
        parallel.leave()


class SimulatedCluster:
    """Sizes of all ranks' parts of a model or of its pruned versions.

    Args:
        options: parallel sizes, precision and kernels.
        world_size: number of processes.
        lora: options of the adapters; None trains all weights.
    """

    def __init__(self, options: EngineOptions, world_size: int, lora: LoRAOptions | None = None) -> None:
        self._options, self._world_size, self._lora = options, world_size, lora
        self._built: dict[tuple[Any, ...], Share] = {}

    def shares(self, arch: Architecture, stages: Sequence[int]) -> list[Share]:
        """Return the share of a rank of each pipeline stage; all ranks of a stage have the same sizes.

        Stages with equal numbers of dense and MoE layers, with or without embedding and output layer, are built once.

        Args:
            arch: architecture of the model. Calls may differ only in the layers, MTP layers included.
            stages: number of layers on each pipeline stage.
        """
        shares, first_layer = [], 0
        for stage, count in enumerate(stages):
            kinds = sorted(arch.is_moe(layer) for layer in range(first_layer, first_layer + count))
            last = stage == len(stages) - 1
            key = (tuple(kinds), stage == 0, last, arch.num_mtp if last else 0)
            if key not in self._built:
                self._built[key] = self._build(arch, stages, stage)
            shares.append(self._built[key])
            first_layer += count
        return shares

    def _build(self, arch: Architecture, stages: Sequence[int], stage: int) -> Share:
        """Build the part of the first rank of a stage on the meta device, and return its sizes."""
        first_rank = stage * (self._world_size // len(stages))
        with simulated_rank(first_rank, self._world_size, self._options.sizes), device.on_meta():
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            model = build_model(arch, stages, self._options)
            parameters, model_bytes = _count(model.parameters()), _bytes(model)
            if self._lora is not None:
                add_adapters(model, self._lora)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            experts = [parameter for parameter in trained if not getattr(parameter, "allreduce", True)]
            return Share(
                parameters=parameters,
                model_bytes=model_bytes,
                adapter_bytes=_bytes(model) - model_bytes,
                trained=_count(trained) - _count(experts),
                trained_experts=_count(experts),
                largest_trained=max((parameter.numel() for parameter in trained), default=0),
            )


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(model: PipelineModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
