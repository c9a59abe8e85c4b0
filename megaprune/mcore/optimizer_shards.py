"""Checkpoints of the distributed optimizer's states in which every rank writes and reads only its own part.

The distributed optimizer divides each buffer of parameters among the data-parallel ranks at any element. The core's
format "fully_reshardable" has the shapes of the parameters, so that it can be loaded at any layout and into a pruned
model; but to write it, 0.16.1 to 0.19 gather the whole buffer, and to read it they allocate the whole buffer. This
module replaces both steps. A rank's part of a parameter is a range of its elements. A range is a few contiguous
boxes, such as the rest of a row, whole rows, and the beginning of a row, and each box is a shard of its own. The stored
tensors have the same names and shapes as in the core's format, so each can read what the other has written.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megaprune.utils.errors import MegapruneError

# The core's prefix of the names of all optimizer states, and its name for the step, which is saved separately.
_PREFIX, _STEP = "optimizer.state", "step"


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a range of a contiguous tensor's elements into contiguous boxes, in order: at most 2 x dimensions - 1.

    Args:
        shape: of the tensor.
        start: first element, counted through the whole tensor.
        stop: last element + 1.

    Yields:
        The offset of a box in each dimension, and its size.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within a row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: Sequence[int], number: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    before = number * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, stop - before):
        yield (number, *offset), (1, *size)


def own_shards(self: DistributedOptimizer, model_state: dict[str, Any], *_: Any) -> dict[int, dict[str, Any]]:
    """Return the shards of this rank's states, by parameter, state and number. Nothing is copied or communicated.

    Args:
        model_state: sharded state dict of the model, which gives each parameter's name and place.
    """
    entries = {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    }
    found: dict[int, dict[str, Any]] = {}
    for number, (parameter, start, stop) in enumerate(_parts(self)):
        states = self._get_main_param_and_optimizer_states(parameter)
        shards = list(_shards_of(entries[parameter], start, stop, self.distributed_optimizer_instance_id))
        found[number] = {
            name: dict(enumerate(_filled(shard, place, state, name) for shard, place in shards))
            for name, state in states.items()
            if name != _STEP
        }
    return found


@torch.no_grad()
def load_own_shards(self: DistributedOptimizer, state: dict[int, dict[str, Any]]) -> None:
    """Take over the loaded shards of `own_shards`."""
    for number, (parameter, _, _) in enumerate(_parts(self)):
        loaded = {
            name: torch.cat([parts[place].flatten() for place in range(len(parts))])
            for name, parts in state[number].items()
        }
        self._set_main_param_and_optimizer_states(parameter, loaded)


def _parts(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield the parameters of which this rank holds a part, with the range of elements that it holds."""
    for of_buffer in optimizer.gbuf_ranges:
        for buckets in of_buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _shards_of(
    entry: ShardedTensor | ShardedTensorFactory, start: int, stop: int, instance: int
) -> Iterator[tuple[ShardedTensor, slice]]:
    """Yield the shards that make up a range of a parameter, without data, and the place of each in the range.

    Args:
        entry: of the parameter. A factory divides it: gate and up projections are stored one behind the other, and
            tensor parallelism divides them separately.
        instance: number of the optimizer instance; 0 writes.
    """
    whole = [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))
    at = 0
    for piece in whole:
        begin = piece.data.storage_offset() - entry.data.storage_offset()
        if begin != at or not piece.data.is_contiguous():
            raise MegapruneError(
                f"--use-distributed-optimizer: {piece.key} is stored in parts that do not follow each other in memory, "
                "which is not supported"
            )
        at += piece.data.numel()
        # the instance takes the place of the data-parallel rank: no other rank of this one holds the part
        replica = (*piece.replica_id[:2], instance)
        prepended, place = piece.prepend_axis_num, max(start, begin) - start
        for offset, size in boxes(piece.local_shape, max(start, begin) - begin, min(stop, at) - begin):
            elements = math.prod(size)
            shard = ShardedTensor(
                piece.key,
                None,
                torch.float32,
                (1,) * prepended + size,
                piece.global_shape,
                tuple(map(sum, zip(piece.global_offset, (0,) * prepended + offset, strict=True))),
                None,  # the boxes form no regular grid
                replica,
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )
            yield shard, slice(place, place + elements)
            place += elements


def _filled(shard: ShardedTensor, place: slice, state: Tensor, name: str) -> ShardedTensor:
    """Return a shard with its part of a state, a view."""
    data = state.detach()[place].view(shard.local_shape)
    return ShardedTensor(
        f"{_PREFIX}.{name}.{shard.key}",
        data,
        data.dtype,
        shard.local_shape,
        shard.global_shape,
        shard.global_offset,
        shard.axis_fragmentations,
        shard.replica_id,
        allow_shape_mismatch=shard.allow_shape_mismatch,
    )
