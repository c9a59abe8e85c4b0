"""Process groups: setting them up, and agreeing across them."""

import os
from collections.abc import Callable
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
from megaprune.utils import failure
from megaprune.utils.errors import MegapruneError
from megaprune.utils.ranks import forget_stale_variables, raise_together, rank, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes of Megatron's process groups; data parallelism takes what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False

    @property
    def model(self) -> int:
        return self.tensor * self.pipeline * self.context


def initialize(sizes: ParallelSizes, timeout_minutes: int = 60) -> None:
    """Joins the process group and sets up Megatron's groups."""
    join(timeout_minutes)
    set_up_groups(sizes)


def join(timeout_minutes: int = 60) -> None:
    """Joins the process group, unless this process is in it; alone where there is no launcher."""
    forget_stale_variables()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    device.bind_local_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # A lone process needs no port, and so can't collide with another run on this host.
        store = dist.HashStore() if world_size() == 1 else None
        dist.init_process_group(
            device.BACKEND,
            rank=rank() if store else -1,
            world_size=1 if store else -1,
            store=store,
            timeout=timedelta(minutes=timeout_minutes),
        )
    failure.watch()


def set_up_groups(sizes: ParallelSizes, gloo: bool = True) -> None:
    """Sets up Megatron's groups among the processes of the process group.

    Args:
        gloo: also groups on the CPU, beside those of the backend.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        create_gloo_process_groups=gloo,
    )
    # Nothing in a run draws from the global generators (no dropout; weights are loaded); the core wants them seeded.
    model_parallel_cuda_manual_seed(1)


def finish() -> None:
    """Gives up Megatron's groups, if there are any; others may be set up in their place. Collective."""
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    # The core only forgets its groups: their threads and connections would live on.
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def leave() -> None:
    """Leaves the process group and Megatron's groups, if this process is in any."""
    failure.stop()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def tensor_parallel() -> TensorParallel:
    """This rank's place among its tensor-parallel ranks."""
    return TensorParallel(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    """Return the group of ranks that share each layer's dense weights."""
    return parallel_state.get_tensor_model_parallel_group()


def expert_tensor_parallel() -> TensorParallel:
    """This rank's place among those that share the weights of its experts."""
    return TensorParallel(
        parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    )


def data_parallel_rank() -> int:
    """This rank's place among the replicas of the model."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """How many replicas of the model there are."""
    return parallel_state.get_data_parallel_world_size()


def on_first_rank(action: Callable[[], T]) -> T | None:
    """What the action gives on rank 0, which alone runs it; None elsewhere. Where it is refused, every rank is."""
    error, result = None, None
    if rank() == 0:
        try:
            result = action()
        except MegapruneError as met:
            error = met
    raise_together(error)
    return result


def from_all_ranks(value: T) -> list[T]:
    """Every rank's value, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    flags = torch.tensor(int(flag), device=device.torch_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def barrier() -> None:
    """Waits for every rank."""
    dist.barrier()


def from_last_stage(value: T) -> T:
    """A value known on the last pipeline stage, on every stage of this pipeline."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def is_last_stage() -> bool:
    """Whether this rank computes the logits."""
    return parallel_state.is_pipeline_last_stage()


def sum_over_data_parallel(value: torch.Tensor) -> torch.Tensor:
    """All-reduces a tensor in place over the replicas of the model (and their context-parallel parts)."""
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return value


def of_first_rank(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, on the CPU: backends promise equal sums, not equal bits, and ranks must decide alike."""
    box = value.to(device.torch_device())
    dist.broadcast(box, src=0)
    return box.cpu()


def sum_over_all(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of the run, on the CPU, the same bits on each."""
    dist.all_reduce(value)
    return of_first_rank(value)


def reduce_mask_gradient(grad: torch.Tensor, sequence_parallel: bool, over_replicas: bool = True) -> torch.Tensor:
    """The gradient of the mask over the whole run, bit for bit the same on every rank.

    A layer's entry is non-zero only on its pipeline stage (sum over PP). Under sequence parallelism each
    tensor-parallel rank holds the part of its tokens (sum over TP); otherwise all hold the same (mean). The loss is
    a mean over replicas (mean over DP); context-parallel ranks scale theirs by their number, as Megatron's DDP
    expects.

    Args:
        grad: [num_layers] on this rank.
        over_replicas: False where each replica has a mask of its own, and gets the gradient of that one.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    group = dist.group.WORLD if over_replicas else parallel_state.get_model_parallel_group()
    replicas = dist.get_world_size(group) // (tp * pp)
    total = grad.to(torch.float64)
    dist.all_reduce(total, group=group)
    total = total / (replicas * (1 if sequence_parallel else tp))
    # Backends promise equal sums, not equal bits, on all ranks; the scores must never drift apart.
    dist.broadcast(total, src=dist.get_global_rank(group, 0), group=group)
    return total.float().cpu()


def mean_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor that all ranks of a replica have alike, on the CPU, the same bits on every rank."""
    total = sum_over_all(value.to(device.torch_device(), torch.float64))
    return (total / dist.get_world_size()).to(value.dtype)
