"""A cluster on paper: any rank's share of a model, built by the run's own builder without weights, accelerators or
other processes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaprune import device
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.layers.lora import LoRAOptions, add_adapters
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models import Architecture


@dataclass(frozen=True)
class Share:
    """What one rank holds of a model.

    Args:
        parameters: of the model itself, without adapters; padding of the vocabulary counts.
        model_bytes: of its parameters and buffers.
        adapter_bytes: of its adapters.
        trained: parameters that train, without those of routed experts.
        trained_experts: parameters of routed experts that train; they have data-parallel groups of their own.
        largest_trained: parameters of the largest tensor that trains.
    """

    parameters: int
    model_bytes: int
    adapter_bytes: int
    trained: int
    trained_experts: int
    largest_trained: int


@contextmanager
def simulated_rank(rank: int, world_size: int, sizes: ParallelSizes) -> Iterator[None]:
    """Makes this process one rank of a cluster that does not exist: its groups are set up, its collectives do nothing.

    The process must not be in a process group.
    """
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel.set_up_groups(sizes, gloo=False)
        yield
    finally:
        parallel.finish()
        parallel.leave()


class SimulatedCluster:
    """Builds the shares of a model's ranks, and of the pruned model's.

    Args:
        world_size: number of processes.
        lora: the adapters, if they are what trains.
    """

    def __init__(self, options: EngineOptions, world_size: int, lora: LoRAOptions | None = None) -> None:
        self._options, self._world_size, self._lora = options, world_size, lora
        self._built: dict[tuple, Share] = {}

    def shares(self, arch: Architecture, stages: Sequence[int]) -> list[Share]:
        """The share of each rank, by pipeline stage: the ranks of one hold the same sizes, whatever else they cut.

        Stages with the same kinds of layers, and embedding or output layer alike, are built once.

        Args:
            arch: the model, or the pruned one; the same in all calls but for its layers.
            stages: number of layers on each pipeline stage.
        """
        shares, first_layer = [], 0
        for stage, count in enumerate(stages):
            kinds = sorted(arch.is_moe(layer) for layer in range(first_layer, first_layer + count))
            key = (tuple(kinds), stage == 0, stage == len(stages) - 1)
            if key not in self._built:
                self._built[key] = self._build(arch, stages, stage)
            shares.append(self._built[key])
            first_layer += count
        return shares

    def _build(self, arch: Architecture, stages: Sequence[int], stage: int) -> Share:
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


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
