"""From HF tensors to one rank's shard of a Megatron parameter, and back.

Reads the rules of a family. Importing touches only the bytes that the shard needs; merging takes the shards of all
tensor-parallel ranks, in order. Both are exact: they move numbers and compute nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaprune.models import Architecture, Shard, WeightRule
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks that share one layer's weights."""

    rank: int = 0
    size: int = 1


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int = 128) -> int:
    """Megatron's padding: the next multiple of ``divisible_by`` times the tensor-parallel size."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def read_shard(rule: WeightRule, source: HFSource, arch: Architecture, tp: TensorParallel) -> torch.Tensor:
    """Reads this rank's shard of one Megatron parameter, in the stored dtype.

    Raises:
        MegapruneError: a tensor is missing, or its shape can't be cut as the rule says.
    """
    if rule.shard is Shard.COPY:
        return source.read(rule.hf[0])
    if rule.shard is Shard.COLUMN:
        return _read_cut(source, rule.hf[0], 0, tp)
    if rule.shard is Shard.ROW:
        return _read_cut(source, rule.hf[0], 1, tp)
    if rule.shard is Shard.VOCAB:
        return _read_vocab(source, rule.hf[0], arch, tp)
    if rule.shard is Shard.QKV and arch.query_groups % tp.size:
        raise MegapruneError(
            f"{source.shown(rule.hf[1])} has {arch.query_groups} heads, which {tp.size} tensor-parallel ranks can't "
            "share: choose a --tensor-model-parallel-size that divides them"
        )
    parts = [_read_cut(source, name, 0, tp) for name in rule.hf]
    if rule.shard is Shard.GATED:
        return torch.cat(parts)
    return interleave_qkv(parts, arch.query_groups // tp.size)


def merge_shards(rule: WeightRule, shards: Sequence[torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """The HF tensors of one Megatron parameter, from the shards of all tensor-parallel ranks in order."""
    if rule.shard is Shard.COPY:
        return {rule.hf[0]: shards[0]}
    if rule.shard is Shard.COLUMN:
        return {rule.hf[0]: torch.cat(list(shards))}
    if rule.shard is Shard.ROW:
        return {rule.hf[0]: torch.cat(list(shards), dim=1)}
    if rule.shard is Shard.VOCAB:
        return {rule.hf[0]: torch.cat(list(shards))[: arch.vocab_size]}
    if rule.shard is Shard.GATED:
        halves = [shard.chunk(2) for shard in shards]
        parts = [torch.cat([half[i] for half in halves]) for i in range(2)]
    else:
        parts = split_qkv(torch.cat(list(shards)), arch)
    return dict(zip(rule.hf, parts, strict=True))


def _read_cut(source: HFSource, name: str, dim: int, tp: TensorParallel) -> torch.Tensor:
    length = source.shape(name)[dim]
    if length % tp.size:
        raise MegapruneError(
            f"{source.shown(name)} has {length} {'rows' if dim == 0 else 'columns'}, which {tp.size} tensor-parallel "
            "ranks can't share: choose a --tensor-model-parallel-size that divides it"
        )
    part = length // tp.size
    return source.read(name, dim, tp.rank * part, (tp.rank + 1) * part)


def _read_vocab(source: HFSource, name: str, arch: Architecture, tp: TensorParallel) -> torch.Tensor:
    rows, hidden = source.shape(name)
    if rows != arch.vocab_size:
        raise MegapruneError(
            f"{source.shown(name)} has {rows} rows where config.json says vocab_size {arch.vocab_size}"
        )
    part = padded_vocab_size(rows, tp.size) // tp.size
    start, stop = tp.rank * part, min((tp.rank + 1) * part, rows)
    shard = torch.zeros(part, hidden, dtype=source.dtype(name))
    if start < stop:
        shard[: stop - start] = source.read(name, 0, start, stop)
    return shard


def interleave_qkv(parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Query, key and value rows to Megatron's order: for each query group its queries, its key, its value."""
    tail = parts[0].shape[1:]
    return torch.cat([part.view(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)


def split_qkv(fused: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
    tail = fused.shape[1:]
    by_group = fused.view(arch.query_groups, -1, *tail)
    per_group = by_group.shape[1] - 2 * arch.head_dim
    parts = by_group.split([per_group, arch.head_dim, arch.head_dim], dim=1)
    return [part.reshape(-1, *tail) for part in parts]
