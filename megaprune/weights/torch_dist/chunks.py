"""Tensor files of a `torch_dist` checkpoint: torch's distributed-checkpoint format as Megatron-Core reads it.

`.distcp` files contain tensors one after the other, each as `torch.save` writes it. `.metadata` records the location
of each chunk of each tensor. Writing and reading go tensor by tensor, so memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from megaprune.utils.errors import MegapruneError
from megaprune.weights.byte_ranges import Advance, Range, as_bytes, copy_range, read_into, write_all
from megaprune.weights.dtypes import ITEM_BYTES, OF_TORCH
from megaprune.weights.torch_dist.saved_tensor import around, data_offset

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Location of a chunk: a file of the checkpoint, and the byte range that `torch.save` wrote."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """Rectangular part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class StoredTensor:
    """Whole tensor of a checkpoint; its dtype has its safetensors name, or torch's name if there is none."""

    size: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def append_tensor(file: FileIO, tensor: torch.Tensor, name: str) -> Place:
    """Append a tensor to an unbuffered file."""
    offset = file.tell()
    before, behind = around(tensor.shape, OF_TORCH[str(tensor.dtype).removeprefix("torch.")])
    for content in (memoryview(before), as_bytes(tensor.contiguous()), memoryview(behind)):
        write_all(file, content)
    return Place(name, offset, file.tell() - offset)


def append_ranges(
    file: FileIO,
    shape: Sequence[int],
    dtype: str,
    name: str,
    content: Iterable[tuple[Range, int]],
    advance: Advance,
) -> Place:
    """Append a tensor to an unbuffered file, copying its bytes from other files.

    Args:
        content: the ranges, each with its position among the tensor's bytes.

    Raises:
        MegapruneError: a source file ends before its range does.
    """
    offset = file.tell()
    before, behind = around(shape, dtype)
    write_all(file, memoryview(before))
    first = file.tell()
    for found, at in content:
        if not copy_range(found, file, first + at, advance):
            raise MegapruneError(f"{found.file.name} is truncated: download it again")
    file.seek(first + math.prod(shape) * ITEM_BYTES[dtype])
    write_all(file, memoryview(behind))
    return Place(name, offset, file.tell() - offset)


class ChunkReader:
    """Reader of the chunks of one checkpoint folder, each straight from its place in the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileIO] = {}

    def read(self, chunk: Chunk, dtype: str, into: torch.Tensor, skip: int = 0) -> None:
        """Fill `into`, a contiguous tensor, with the chunk's values in order, after the first `skip` ones.

        Raises:
            MegapruneError: the file is missing, truncated, or contains something else at this location.
        """
        found = self.where(chunk, dtype, into.numel(), skip)
        if not read_into(found, as_bytes(into)):
            raise self._damaged(chunk.place.file, "it is truncated")

    def where(self, chunk: Chunk, dtype: str, count: int, skip: int = 0) -> Range:
        """Return the range of `count` values of a chunk, after the first `skip` ones.

        Raises:
            MegapruneError: the file is missing or contains something else at this location.
        """
        file, place = self._file(chunk.place.file), chunk.place
        num_bytes = math.prod(chunk.shape) * ITEM_BYTES[dtype]
        try:
            offset = place.offset + data_offset(file, place.offset, place.length, chunk.shape, num_bytes)
        except Exception as error:  # damaged bytes may raise anything
            raise self._damaged(place.file, error) from error
        return Range(file, offset + skip * ITEM_BYTES[dtype], count * ITEM_BYTES[dtype])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _file(self, name: str) -> FileIO:
        if name not in self._files:
            try:
                self._files[name] = FileIO(self._folder / name)
            except OSError as error:
                raise MegapruneError(
                    f"{self._folder / name} can't be read ({error}): the checkpoint is incomplete"
                ) from error
        return self._files[name]

    def _damaged(self, name: str, reason: object) -> MegapruneError:
        return MegapruneError(f"{self._folder / name} is damaged or truncated ({reason}): save the checkpoint again")


def stored_tensors(chunks: Iterable[tuple[str, tuple[int, ...], str, Chunk]]) -> dict[str, StoredTensor]:
    """Group the chunks of many tensors by tensor, given each chunk with its key, whole size and dtype."""
    gathered: dict[str, tuple[tuple[int, ...], str, list[Chunk]]] = {}
    for key, size, dtype, chunk in chunks:
        gathered.setdefault(key, (size, dtype, []))[2].append(chunk)
    return {key: StoredTensor(size, dtype, tuple(found)) for key, (size, dtype, found) in gathered.items()}
