"""Process groups: set-up, collectives and agreement between ranks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from megaprune import device
from megaprune.models.shards import TensorParallel
from megaprune.utils import failure, stopping
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.rank0 import on_each_node, on_rank0, on_rank0_for_all, together, wait_for_all
from megaprune.utils.ranks import forget_stale_variables, has_rendezvous, raise_together, rank, world_size

__all__ = [
    "on_each_node",
    "on_rank0",
    "on_rank0_for_all",
    "raise_together",
    "rank",
    "together",
    "wait_for_all",
    "world_size",
]

T = TypeVar("T")
TIMEOUT_MINUTES = 60
# Groups that stood before Megatron's were set up: someone else's, and left alone.
_others: list[Any] = []


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of Megatron's process groups. The data-parallel size follows from the number of processes."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False

    @property
    def model(self) -> int:
        """Number of ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


def initialize(sizes: ParallelSizes, timeout_minutes: int = TIMEOUT_MINUTES) -> None:
    """Join the process group and set up Megatron's groups. Collective."""
    join(timeout_minutes)
    set_up_groups(sizes, timeout_minutes=timeout_minutes)


def join(timeout_minutes: int = TIMEOUT_MINUTES) -> None:
    """Join the process group unless it exists already. Collective.

    Without a launcher, the group consists of this process.

    Args:
        timeout_minutes: limit of every collective operation in the group.

    Raises:
        UsageError: there are several processes, and the launcher did not say where they meet.
    """
    forget_stale_variables()
    if world_size() > 1 and not has_rendezvous():
        raise UsageError(
            f"WORLD_SIZE is {world_size()}, but MASTER_ADDR or MASTER_PORT is not set: start the processes with "
            "torchrun, or set both to the address of rank 0 and a free port there"
        )
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    own_device = device.bind_local_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # A single process needs no port, so that it cannot collide with other runs on this host.
        store = dist.HashStore() if world_size() == 1 else None
        dist.init_process_group(
            device.BACKEND,
            rank=rank() if store else -1,
            world_size=1 if store else -1,
            store=store,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=own_device,
        )
    failure.watch()


def set_up_groups(sizes: ParallelSizes, gloo: bool = True, timeout_minutes: int = TIMEOUT_MINUTES) -> None:
    """Set up Megatron's groups within the process group. Collective.

    Args:
        sizes: parallel sizes.
        gloo: create gloo groups on the CPU as well.
        timeout_minutes: limit of every collective operation in these groups.
    """
    if dist.group.WORLD not in _others:  # else a session was cut short, and its groups are still there
        _others[:] = distributed_c10d._world.pg_map
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        create_gloo_process_groups=gloo,
        distributed_timeout_minutes=timeout_minutes,
    )
    # The core requires seeded generators. Nothing draws from them: there is no dropout, and weights are loaded.
    model_parallel_cuda_manual_seed(1)


@contextmanager
def session(sizes: ParallelSizes, timeout_minutes: int = TIMEOUT_MINUTES) -> Iterator[None]:
    """A block with Megatron's groups; the process group stays for later ones. Collective.

    Args:
        timeout_minutes: limit of every collective operation.

    Raises:
        MegapruneError: Megatron's groups are in use.
    """
    if parallel_state.model_parallel_is_initialized():
        raise MegapruneError(
            "this process uses Megatron-Core's parallel groups already: call megatron.core.parallel_state."
            "destroy_model_parallel first, or start a process of its own"
        )
    initialize(sizes, timeout_minutes)
    try:
        yield
    except BaseException:
        # Not collective: other ranks may not have come this far. The groups' threads go with the next session.
        parallel_state.destroy_model_parallel()
        raise
    finish()


def finish() -> None:
    """Destroy Megatron's groups, if there are any, so that others can be set up. Collective."""
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    # The core drops its references to the groups, but leaves their threads and connections open.
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group not in _others:
            dist.destroy_process_group(group)
    _others.clear()


def leave() -> None:
    """Destroy Megatron's groups and the process group, if there are any."""
    failure.stop()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _others.clear()


def tensor_parallel() -> TensorParallel:
    """Return rank and size in the tensor-parallel group."""
    return TensorParallel(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    """Return the group of ranks that share each layer's dense weights."""
    return parallel_state.get_tensor_model_parallel_group()


def expert_tensor_parallel() -> TensorParallel:
    """Return rank and size in the expert-tensor-parallel group."""
    return TensorParallel(
        parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    )


def data_parallel_rank() -> int:
    """Return the data-parallel rank."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Return the data-parallel size."""
    return parallel_state.get_data_parallel_world_size()


def all_gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in order of rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """Return the numbers of all ranks, in order of rank. Collective; the host waits for the device once."""
    own = torch.tensor(numbers, dtype=torch.float64, device=device.torch_device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.stack(found).tolist()


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank. Collective."""
    flags = torch.tensor(int(flag), device=device.torch_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def stop_if_asked(stage: str, where: str) -> None:
    """Stop at a safe point inside a stage, if a rank was asked to. Collective.

    Args:
        stage: points with the same name follow each other at similar intervals.
        where: the point that the job has reached, such as "while it measures layers".

    Raises:
        RunStopped: a rank was asked to stop; raised on every rank.
    """
    if stopping.is_obeyed() and any_rank(stopping.is_due(stage)):
        raise stopping.stopped(where)


def barrier() -> None:
    """Wait for all ranks. Collective."""
    dist.barrier()


def broadcast_from_last_stage(value: T) -> T:
    """Return the last pipeline stage's value on every stage of its pipeline. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def is_last_stage() -> bool:
    """Return whether this rank is on the last pipeline stage, which computes the logits."""
    return parallel_state.is_pipeline_last_stage()


def sum_over_data_parallel(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor in place over the data-parallel group, including context-parallel ranks. Collective."""
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return value


def broadcast_from_rank0(value: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on every rank, on the CPU. Collective.

    Backends do not guarantee that an all-reduce gives bitwise identical sums on all ranks. Ranks that decide by a sum
    must use the same one.
    """
    box = value.to(device.torch_device())
    dist.broadcast(box, src=0)
    return box.cpu()


def sum_over_all(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, on the CPU, bitwise identical on every rank. Collective."""
    dist.all_reduce(value)
    return broadcast_from_rank0(value)


def reduce_mask_gradient(grad: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Return the mask's gradient, reduced over all ranks. Collective.

    A layer's entry is non-zero only on its pipeline stage: sum over PP. Under sequence parallelism, each
    tensor-parallel rank has the gradient of its tokens: sum over TP. Otherwise all of them have the same gradient: mean
    over TP. The loss is a mean over replicas: mean over DP. Context-parallel ranks scale their losses by the
    context-parallel size, as Megatron's DDP expects: mean over CP.

    Args:
        grad: gradient on this rank, [num_layers].
        sequence_parallel: whether sequence parallelism is on.

    Returns:
        [num_layers] fp32 on the CPU, bitwise identical on every rank.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    replicas = dist.get_world_size() // (tp * pp)
    total = grad.to(torch.float64)
    dist.all_reduce(total)
    total = total / (replicas * (1 if sequence_parallel else tp))
    # Sums may differ in the last bits between ranks, and the scores must stay identical.
    dist.broadcast(total, src=0)
    return total.float().cpu()
