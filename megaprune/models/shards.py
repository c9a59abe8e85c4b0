"""Shard kinds: how a Megatron parameter is made of HF tensors and cut over tensor-parallel ranks.

A weight rule names its kind. A kind reads a rank's shard, merges the shards of all ranks, and enumerates the byte runs
of each HF tensor within the whole parameter. All of it is exact: numbers are moved, none is computed. A new kind is a
new class here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megaprune.utils.errors import MegapruneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megaprune.models.tables import Architecture


@dataclass(frozen=True)
class TensorParallel:
    """Rank of this process among the ranks that share one layer's weights, and their number."""

    rank: int = 0
    size: int = 1


class SliceReader(Protocol):
    """Reader of HF tensors by name, for the slices that shards need."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def shown(self, name: str) -> str: ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor: ...


class ShardKind:
    """One HF tensor, the same on every rank; other kinds differ from it.

    Attributes:
        dim: the dimension along which ranks hold parts of the parameter; None if each holds all of it.
        interleaves: the HF tensors alternate within the parameter, so that a checkpoint holds them in one chunk.
        scatters: neighbors in an HF tensor are none in the parameter, so that it can't be copied in runs of bytes.
    """

    dim: int | None = None
    interleaves: bool = False
    scatters: bool = False

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        """Read a rank's shard, in the stored dtype.

        Raises:
            MegapruneError: a tensor is missing, or its shape can't be cut.
        """
        return source.read(names[0])

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        """Merge the shards of all ranks, in order, into the HF tensors, in the order of the rule."""
        return [shards[0]]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        """Make the whole parameter of its HF tensors."""
        return tensors[0]

    def fused_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, given those of its HF tensors."""
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        """Enumerate the runs of bytes that one HF tensor takes within the whole parameter, in the tensor's order. A
        kind that scatters has none.

        Args:
            number: of the HF tensor, in the order of the rule.
            shape: the whole parameter's.

        Returns:
            The first byte and the length of each run.
        """
        return [(0, math.prod(shape) * item_bytes)]


class _Cut(ShardKind):
    """One HF tensor, cut along a dimension."""

    def __init__(self, dim: int) -> None:
        self.dim: int = dim

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        return _read_cut(source, names[0], self.dim, tp)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        return [torch.cat(list(shards), dim=self.dim)]


class _Vocab(ShardKind):
    """An embedding or output layer, cut along dimension 0 after padding the vocabulary with zeros."""

    dim = 0

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        import torch

        (name,) = names
        rows, hidden = source.shape(name)
        if rows != arch.vocab_size:
            raise MegapruneError(
                f"{source.shown(name)} has {rows} rows, but config.json says vocab_size {arch.vocab_size}"
            )
        part = padded_vocab_size(rows, tp.size) // tp.size
        start, stop = tp.rank * part, min((tp.rank + 1) * part, rows)
        shard = torch.zeros(part, hidden, dtype=source.dtype(name))
        if start < stop:
            shard[: stop - start] = source.read(name, 0, start, stop)
        return shard

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        return [torch.cat(list(shards))[: arch.vocab_size]]


class _Gated(ShardKind):
    """Gate and up, each cut along dimension 0; a rank holds its part of the gate above its part of up."""

    dim = 0

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        return self.fuse([_read_cut(source, name, 0, tp) for name in names], arch)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[number] for half in halves]) for number in range(2)]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        import torch

        return torch.cat(list(tensors))

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        half = math.prod(shape) * item_bytes // 2
        return [(number * half, half)]


class _QKV(ShardKind):
    """Query, key and value: for each query group its queries, its key, its value; cut between groups."""

    dim = 0
    interleaves = True

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        if arch.query_groups % tp.size:
            raise MegapruneError(
                f"{source.shown(names[1])} has {arch.query_groups} heads, which {tp.size} tensor-parallel ranks can't "
                "share: choose a --tensor-model-parallel-size that divides them"
            )
        return _interleave([_read_cut(source, name, 0, tp) for name in names], arch.query_groups // tp.size)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        fused = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
        tail = fused.shape[1:]
        by_group = fused.view(arch.query_groups, -1, *tail)
        parts = by_group.split(list(self._widths(by_group.shape[1], arch)), dim=1)
        return [part.reshape(-1, *tail) for part in parts]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        return _interleave(tensors, arch.query_groups)

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        row, group = math.prod(shape[1:]) * item_bytes, shape[0] // arch.query_groups
        widths = self._widths(group, arch)
        first = sum(widths[:number])
        return [((of * group + first) * row, widths[number] * row) for of in range(arch.query_groups)]

    @staticmethod
    def _widths(rows_of_group: int, arch: Architecture) -> tuple[int, int, int]:
        return rows_of_group - 2 * arch.head_dim, arch.head_dim, arch.head_dim


class _FusedQKV(_QKV):
    """One HF tensor with all queries, then all keys, then all values; in Megatron-Core's order as above."""

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        (name,), widths = names, self._lengths(arch)
        if arch.query_groups % tp.size:
            raise MegapruneError(
                f"{source.shown(name)} has {arch.query_groups} key-value heads, which {tp.size} tensor-parallel ranks "
                "can't share: choose a --tensor-model-parallel-size that divides them"
            )
        _check_rows(source, name, sum(widths))
        parts, first = [], 0
        for width in widths:
            part = width // tp.size
            parts.append(source.read(name, 0, first + tp.rank * part, first + (tp.rank + 1) * part))
            first += width
        return _interleave(parts, arch.query_groups // tp.size)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        return [torch.cat(super().merge(shards, arch))]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        return _interleave(tensors[0].split(self._lengths(arch)), arch.query_groups)

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        return [run for part in range(3) for run in super(_FusedQKV, self).runs(part, shape, arch, item_bytes)]

    @staticmethod
    def _lengths(arch: Architecture) -> list[int]:
        keys = arch.query_groups * arch.head_dim
        return [arch.transformer["num_attention_heads"] * arch.head_dim, keys, keys]


class _FusedGated(_Gated):
    """One HF tensor with the gate above up; a rank holds its part of each."""

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        import torch

        (name,) = names
        half = source.shape(name)[0] // 2
        if half % tp.size:
            raise MegapruneError(
                f"{source.shown(name)} has {half} rows each of gate and up, which {tp.size} tensor-parallel ranks "
                "can't share: choose a --tensor-model-parallel-size that divides it"
            )
        part = half // tp.size
        starts = (tp.rank * part, half + tp.rank * part)
        return torch.cat([source.read(name, 0, start, start + part) for start in starts])

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        return [torch.cat(super().merge(shards, arch))]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        return tensors[0]

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        return [(0, math.prod(shape) * item_bytes)]


class _Scattered(ShardKind):
    """One HF tensor whose numbers are in another order than the parameter's."""

    interleaves = scatters = True

    def fused_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(reversed(shapes[0]))

    def runs(self, number: int, shape: Sequence[int], arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        raise AssertionError("its numbers are not in runs")


class _TransposedRow(_Scattered):
    """One HF matrix [in, out], cut along the input dimension."""

    dim = 1

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        return _read_cut(source, names[0], 0, tp).t()

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        return [torch.cat(list(shards), dim=1).t().contiguous()]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        return tensors[0].t()


class _Alternating(_Scattered):
    """One HF tensor in which columns of gate and up alternate: a matrix [in, out], or a bias; cut as `_Gated` is."""

    dim = 0

    def read(self, source: SliceReader, names: Sequence[str], arch: Architecture, tp: TensorParallel) -> Tensor:
        return self.fuse([_read_cut(source, names[0], len(source.shape(names[0])) - 1, tp)], arch)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> list[Tensor]:
        import torch

        gate_and_up = torch.stack(GATED.merge(shards, arch), dim=1).flatten(0, 1)
        return [gate_and_up.t().contiguous() if gate_and_up.ndim == 2 else gate_and_up]

    def fuse(self, tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
        import torch

        rows = tensors[0].t() if tensors[0].ndim == 2 else tensors[0]
        return torch.cat([rows[0::2], rows[1::2]])


COPY = ShardKind()
COLUMN = _Cut(0)  # along the output dimension
ROW = _Cut(1)  # along the input dimension
VOCAB = _Vocab()
QKV = _QKV()
GATED = _Gated()
FUSED_QKV = _FusedQKV()
FUSED_GATED = _FusedGated()
TRANSPOSED_ROW = _TransposedRow()
ALTERNATING = _Alternating()


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int = 128) -> int:
    """Megatron's padded vocabulary size: the next multiple of ``divisible_by`` times the tensor-parallel size."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def _check_rows(source: SliceReader, name: str, rows: int) -> None:
    if source.shape(name)[0] != rows:
        raise MegapruneError(f"{source.shown(name)} has {source.shape(name)[0]} rows, but config.json implies {rows}")


def _read_cut(source: SliceReader, name: str, dim: int, tp: TensorParallel) -> Tensor:
    length = source.shape(name)[dim]
    if length % tp.size:
        raise MegapruneError(
            f"{source.shown(name)} has {length} {'rows' if dim == 0 else 'columns'}, which {tp.size} tensor-parallel "
            "ranks can't share: choose a --tensor-model-parallel-size that divides it"
        )
    part = length // tp.size
    return source.read(name, dim, tp.rank * part, (tp.rank + 1) * part)


def _interleave(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Query, key and value rows in Megatron's order."""
    import torch

    tail = parts[0].shape[1:]
    return torch.cat([part.view(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)
