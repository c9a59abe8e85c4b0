"""Division of an export among the ranks: each one gathers and writes files of its own.

The ranks that hold a pipeline stage's dense weights, or a share of its experts, fill files in order of the weights.
They take the files in turn, first one per data-parallel replica, then by tensor-parallel rank. A replica gathers only
the weights of its own files, and all of its ranks write at the same time, so that no rank waits for longer than the
writing of a file takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaprune.models import WeightRule
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import file_numbers, num_bytes


class Gathered(NamedTuple):
    """A weight that this rank writes: the rule, and the shards of all ranks that share the parameter."""

    rule: WeightRule
    parts: list[torch.Tensor]


@dataclass(frozen=True)
class _Holders:
    """The ranks that hold the same weights, or shards of them: the replicas, and the ranks of each."""

    group: dist.ProcessGroup
    replica: int
    num_replicas: int

    @property
    def members(self) -> int:
        return self.group.size()


def shares(
    weights: Sequence[tuple[WeightRule, torch.Tensor]], source: TensorSource, max_file_bytes: int
) -> Iterator[Gathered | None]:
    """Yield the weights that this rank writes, or None where it is to write what is pending. Collective.

    Args:
        weights: rule and parameter of each weight that this rank holds a part of, in the same order on all holders.
        source: gives the sizes of the stored tensors.
        max_file_bytes: size limit of a file.
    """
    yield from _of_holders([weight for weight in weights if not weight[0].expert], _dense(), source, max_file_bytes)
    yield from _of_holders([weight for weight in weights if weight[0].expert], _experts(), source, max_file_bytes)


def _dense() -> _Holders:
    return _Holders(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )


def _experts() -> _Holders:
    return _Holders(
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_rank(),
        parallel_state.get_expert_data_parallel_world_size(),
    )


def _of_holders(
    weights: Sequence[tuple[WeightRule, torch.Tensor]], holders: _Holders, source: TensorSource, max_file_bytes: int
) -> Iterator[Gathered | None]:
    own = holders.group.rank()
    wave = 0
    sizes = (_stored_bytes(rule, source) for rule, _ in weights)
    for (rule, parameter), number in zip(weights, file_numbers(sizes, max_file_bytes), strict=True):
        turn, replica = divmod(number, holders.num_replicas)
        if replica != holders.replica:
            continue
        if turn // holders.members != wave:
            wave = turn // holders.members
            yield None  # every rank of this replica has a full file
        parts = _gathered(parameter, rule, turn % holders.members, holders.group)
        if turn % holders.members == own:
            yield Gathered(rule, parts)


def _stored_bytes(rule: WeightRule, source: TensorSource) -> int:
    """Return the bytes of a weight's tensors on export; 0 for those that are not exported."""
    return sum(num_bytes((source.shape(name), source.dtype_name(name))) for name in rule.hf if rule.export)


def _gathered(shard: torch.Tensor, rule: WeightRule, member: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return the shards of the ranks of a group, in order of rank, on one of its members; [] on the others."""
    if rule.shard.dim is None or group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == member else []
    dist.gather(shard.contiguous(), parts or None, dst=dist.get_global_rank(group, member), group=group)
    return parts
