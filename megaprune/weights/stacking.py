"""Experts' matrices, written one by one, put together into the stacks that the source had; by copying bytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megaprune.utils.errors import MegapruneError
from megaprune.weights.stored_layout import StoredLayout

if TYPE_CHECKING:
    from megaprune.weights.writer import WrittenShard

_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class _Written:
    """A tensor in a closed file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def stack_experts(
    folder: Path, shards: Sequence[WrittenShard], layout: StoredLayout, max_shard_bytes: int
) -> list[WrittenShard]:
    """Rewrites the files with each stack in one piece, and removes them. Memory stays that of a block of bytes; the
    disk holds the model twice meanwhile.

    Raises:
        MegapruneError: two files hold the same tensor, or a stack is not whole.
    """
    from megaprune.weights.writer import WrittenShard

    tensors: dict[str, _Written] = {}
    for shard in shards:
        for name, written in _tensors_of(folder / shard.file):
            if name in tensors:
                raise MegapruneError(f"{name} was exported twice, to {tensors[name].file.name} and {shard.file}")
            tensors[name] = written
    made: list[WrittenShard] = []
    for run in _runs(layout.groups(tensors), tensors, max_shard_bytes):
        file = f"stacked-{len(made):05d}.safetensors"
        _write(folder / file, {stored: [tensors[name] for name in parts] for stored, parts in run.items()})
        total = sum(tensors[name].num_bytes for parts in run.values() for name in parts)
        made.append(WrittenShard(file, sorted(run), total))
    for shard in shards:
        (folder / shard.file).unlink()
    return made


def _runs(groups: dict[str, list[str]], tensors: dict[str, _Written], max_bytes: int) -> Iterator[dict[str, list[str]]]:
    run: dict[str, list[str]] = {}
    total = 0
    for stored, parts in groups.items():
        num_bytes = sum(tensors[name].num_bytes for name in parts)
        if run and total + num_bytes > max_bytes:
            yield run
            run, total = {}, 0
        run[stored] = parts
        total += num_bytes
    if run:
        yield run


def _tensors_of(path: Path) -> Iterator[tuple[str, _Written]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        first = file.tell()
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, _Written(path, entry["dtype"], tuple(entry["shape"]), first + begin, end - begin)


def _write(path: Path, contents: dict[str, list[_Written]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, parts in contents.items():
        length = sum(part.num_bytes for part in parts)
        header[name] = {"dtype": parts[0].dtype, "shape": _shape(name, parts), "data_offsets": [at, at + length]}
        at += length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin aligned
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for parts in contents.values():
            for part in parts:
                with part.file.open("rb") as file:
                    _copy(file, part, out)
    # as any new file of the user's, which parts of the folder already are
    shutil.copymode(next(iter(contents.values()))[0].file, path)


def _shape(name: str, parts: Sequence[_Written]) -> list[int]:
    """Of one tensor its own; of a stack [experts, rows, columns]."""
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        raise MegapruneError(f"the experts of {name} have several dtypes or shapes: one tensor can't hold them")
    if not name.endswith(("gate_up_proj", "down_proj")):
        return list(parts[0].shape)
    of_expert = 2 if name.endswith("gate_up_proj") else 1
    rows = sum(part.shape[0] for part in parts[:of_expert])
    shape = [len(parts) // of_expert, rows, *parts[0].shape[1:]]
    if math.prod(shape) != sum(math.prod(part.shape) for part in parts):
        raise MegapruneError(f"the experts of {name} are not all there, or have several shapes")
    return shape


def _copy(file: BinaryIO, part: _Written, out: BinaryIO) -> None:
    file.seek(part.start)
    left = part.num_bytes
    while left:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise MegapruneError(f"{part.file} is truncated")
        out.write(block)
        left -= len(block)
