"""Writer of safetensors files, tensor by tensor, and of HF folders. All writes of the project use it.

Values are given as tensors or as byte ranges of other files. Ranges are copied without torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.weights.byte_ranges import Advance, Range, as_bytes, copy_range, write_all
from megaprune.weights.dtypes import ITEM_BYTES, OF_TORCH, STORED_ORDER
from megaprune.weights.reader import INDEX, TensorFiles
from megaprune.weights.stored_layout import PLAIN, Place, StoredLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A tensor's shape, and the safetensors name of its dtype.
Described = tuple[Sequence[int], str]
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Described],
    contents: Iterable[Tensor | Sequence[Range]],
    advance: Advance = lambda count: None,
    threads: int = 1,
    stored: Mapping[str, Described] | None = None,
    spaced: bool = False,
) -> None:
    """Write a file tensor by tensor.

    Args:
        shapes: shape and dtype of each tensor, in order.
        contents: the tensors in this order, or the ranges of their bytes, made as they are asked for.
        advance: told how many bytes are written.
        threads: that copy ranges while tensors are made.
        stored: the same of the tensors that the file holds, where these are made of several of the others, one behind
            the other.
        spaced: put spaces into the header. Files that are joined of others have always had them.

    Raises:
        MegapruneError: a tensor is not what was announced.
    """
    spans = _spans(shapes)
    with FileIO(path, "w") as file, ThreadPoolExecutor(threads) as pool:
        write_all(file, memoryview(_header(shapes if stored is None else stored, spaced)))
        first = file.tell()
        copies: dict[Future[bool], str] = {}
        for content, (name, described) in zip(contents, shapes.items(), strict=True):
            begin, end = spans[name]
            if isinstance(content, Sequence):
                num_bytes = sum(found.num_bytes for found in content)
                if num_bytes != end - begin:
                    raise MegapruneError(f"{name} is {num_bytes:,} bytes long, not {end - begin:,}")
                copy = pool.submit(_copy_ranges, content, file, first + begin, advance)
                copies[copy] = f"{content[0].file.name} is truncated: it ends within {name}"
                continue
            _check_announced(name, content, described)
            file.seek(first + begin)
            write_all(file, as_bytes(content.contiguous()))
            advance(end - begin)
        for copy, truncated in copies.items():
            if not copy.result():
                raise MegapruneError(truncated)


def _header(held: Mapping[str, Described], spaced: bool) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, span in _spans(held).items():
        shape, dtype = held[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
    encoded = json.dumps(header, separators=(", ", ": ") if spaced else (",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data section is aligned
    return len(encoded).to_bytes(8, "little") + encoded


def _check_announced(name: str, tensor: Tensor, described: Described) -> None:
    shape, dtype = described
    came_as = OF_TORCH[str(tensor.dtype).removeprefix("torch.")]
    if tuple(tensor.shape) != tuple(shape) or came_as != dtype:
        raise MegapruneError(f"{name} came as {came_as} {list(tensor.shape)}, not {dtype} {list(shape)}")


def _copy_ranges(ranges: Sequence[Range], out: FileIO, at: int, advance: Advance) -> bool:
    for found in ranges:
        if not copy_range(found, out, at, advance):
            return False
        at += found.num_bytes
    return True


def _spans(shapes: Mapping[str, Described]) -> dict[str, list[int]]:
    """Return the first and the last + 1 byte of each tensor, in order without gaps."""
    spans, at = {}, 0
    for name, described in shapes.items():
        end = at + num_bytes(described)
        spans[name], at = [at, end], end
    return spans


def num_bytes(described: Described) -> int:
    """Return the number of bytes of a tensor."""
    shape, dtype = described
    return math.prod(shape) * ITEM_BYTES[dtype]


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Return ``5GB`` in bytes, with the decimal units of transformers.

    Raises:
        UsageError: the text is not a positive size.
    """
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{flag} {text!r} is not a size such as 500MB or 5GB")
    return size


@dataclass
class WrittenShard:
    """Closed safetensors file under its temporary name."""

    file: str
    names: list[str]
    num_bytes: int


@dataclass
class ShardWriter:
    """Writer that collects tensors into safetensors files of bounded size and closes each full file.

    Several writers (one per pipeline stage) may share a folder; ``finish_shards`` then gives the files their
    final names and writes the index.
    """

    folder: Path
    max_shard_bytes: int
    writer: int = 0
    written: list[WrittenShard] = field(default_factory=list)
    _pending: dict[str, tuple[Described, Tensor | Sequence[Range]]] = field(default_factory=dict)
    _pending_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor, which may be written later."""
        described = tuple(tensor.shape), OF_TORCH[str(tensor.dtype).removeprefix("torch.")]
        self._make_room(num_bytes(described))
        self._pending[name] = described, tensor.detach().cpu().contiguous()

    def add_ranges(self, name: str, shape: Sequence[int], dtype: str, ranges: Sequence[Range]) -> None:
        """Add a tensor whose bytes are in other files. The files must stay open, because they may be copied later."""
        described = tuple(shape), dtype
        self._make_room(num_bytes(described))
        self._pending[name] = described, ranges

    def close(self) -> list[WrittenShard]:
        """Write pending tensors, and return all files written so far."""
        if self._pending:
            file = f"part-{self.writer:05d}-{len(self.written):05d}.safetensors"
            # in the order of safetensors' own writer
            names = sorted(self._pending, key=lambda name: (-STORED_ORDER.index(self._pending[name][0][1]), name))
            shapes = {name: self._pending[name][0] for name in names}
            try:
                write_safetensors(self.folder / file, shapes, (self._pending[name][1] for name in names))
            except OSError as error:
                error.filename = None  # a part's, which the user has not named
                raise
            self.written.append(WrittenShard(file, sorted(names), self._pending_bytes))
            self._pending, self._pending_bytes = {}, 0
        return self.written

    def _make_room(self, num_bytes: int) -> None:
        if self._pending and self._pending_bytes + num_bytes > self.max_shard_bytes:
            self.close()
        self._pending_bytes += num_bytes


def file_numbers(sizes: Iterable[int], max_bytes: int) -> Iterator[int]:
    """Yield the number of the file of each tensor, from 0. A file ends where the next tensor would exceed the limit.

    Writers that share the work take the files in turn, so that the number of files does not depend on theirs.
    """
    number = filled = 0
    for size in sizes:
        if filled and filled + size > max_bytes:
            number, filled = number + 1, 0
        filled += size
        yield number


def finish_shards(
    folder: Path, shards: list[WrittenShard], layout: StoredLayout = PLAIN, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Give the files the names that transformers uses, and write the index if there are several.

    Args:
        layout: the stored layout; its stacks are assembled.
        max_shard_bytes: maximum size of the files with assembled stacks.

    Raises:
        MegapruneError: two files contain the same tensor.
    """
    if layout.stacks:
        shards = _stack_experts(folder, shards, layout, max_shard_bytes)
    if len(shards) == 1:
        os.replace(folder / shards[0].file, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / shard.file, folder / file)
        for name in shard.names:
            if name in weight_map:
                raise MegapruneError(f"{name} was exported twice, to {weight_map[name]} and {file}")
            weight_map[name] = file
    write_index(folder, weight_map, sum(shard.num_bytes for shard in shards))


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a folder's safetensors files.

    Args:
        weight_map: the file of each tensor.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def join_shards(folder: Path, shards: list[WrittenShard], file: str) -> None:
    """Join the files into one, for readers without support for an index, and remove them. Bytes are copied unchanged.

    Raises:
        MegapruneError: two files contain the same tensor.
    """
    parts: dict[str, Path] = {}
    for shard in shards:
        for name in shard.names:
            if name in parts:
                raise MegapruneError(f"{name} was exported twice")
            parts[name] = folder / shard.file
    _write_joined(folder / file, {name: [name] for name in parts}, parts, {})
    for shard in shards:
        (folder / shard.file).unlink()


def _stack_experts(
    folder: Path, shards: Sequence[WrittenShard], layout: StoredLayout, max_shard_bytes: int
) -> list[WrittenShard]:
    """Rewrite the files with the experts of each stack in one tensor, and remove them. Memory is limited to one block
    of bytes; meanwhile the disk contains the model twice.

    Raises:
        MegapruneError: two files contain the same tensor, or a stack is incomplete.
    """
    parts: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    files = TensorFiles()
    for shard in shards:
        for name in files.stored_order(folder / shard.file):
            if name in parts:
                raise MegapruneError(f"{name} was exported twice, to {parts[name].name} and {shard.file}")
            parts[name] = folder / shard.file
            sizes[name] = files.where(parts[name], Place(name)).num_bytes
    files.close()
    made: list[WrittenShard] = []
    for run in _runs(layout.groups(parts), sizes, max_shard_bytes):
        file = f"stacked-{len(made):05d}.safetensors"
        of_expert = {stored: layout.parts_of_expert(stored) for stored in run if layout.stack_of(run[stored][0])}
        _write_joined(folder / file, run, parts, of_expert)
        made.append(WrittenShard(file, sorted(run), sum(sizes[name] for names in run.values() for name in names)))
    for shard in shards:
        (folder / shard.file).unlink()
    return made


def _runs(groups: Mapping[str, list[str]], sizes: Mapping[str, int], max_bytes: int) -> Iterator[dict[str, list[str]]]:
    run: dict[str, list[str]] = {}
    total = 0
    for stored, names in groups.items():
        num_bytes = sum(sizes[name] for name in names)
        if run and total + num_bytes > max_bytes:
            yield run
            run, total = {}, 0
        run[stored] = names
        total += num_bytes
    if run:
        yield run


def _write_joined(
    path: Path, groups: Mapping[str, list[str]], parts: Mapping[str, Path], of_expert: Mapping[str, int]
) -> None:
    """Write a file of tensors that other files contain.

    Args:
        groups: the tensors of the file, each with the tensors that it is concatenated from, in order.
        parts: the file that contains each of these.
        of_expert: for each stack of experts in the file, the number of tensors of each expert.
    """
    files = TensorFiles()
    names = [name for members in groups.values() for name in members]
    shapes: dict[str, Described] = {}
    for name in names:
        dtype, shape = files.describe(parts[name], name)
        shapes[name] = shape, dtype
    held = {stored: shapes[members[0]] for stored, members in groups.items()}
    for stored, number in of_expert.items():
        held[stored] = stacked_shape(stored, [shapes[name] for name in groups[stored]], number)
    contents = ([files.where(parts[name], Place(name))] for name in names)
    write_safetensors(path, shapes, contents, stored=held, spaced=True)
    files.close()


def stacked_shape(name: str, parts: Sequence[Described], of_expert: int) -> Described:
    """Return shape [experts, rows, columns] and dtype of a stack of experts' matrices, or biases.

    Args:
        name: the name of the stack.
        parts: its matrices in order, gate before up of each expert.
        of_expert: number of matrices of each expert.

    Raises:
        MegapruneError: the matrices can't be stacked.
    """
    if len({(dtype, tuple(shape[1:])) for shape, dtype in parts}) > 1:
        raise MegapruneError(f"the experts of {name} have several dtypes or shapes: one tensor can't hold them")
    (first, dtype), rows = parts[0], sum(shape[0] for shape, _ in parts[:of_expert])
    shape = [len(parts) // of_expert, rows, *first[1:]]
    if math.prod(shape) != sum(math.prod(part) for part, _ in parts):
        raise MegapruneError(f"the experts of {name} are incomplete, or have several shapes")
    return shape, dtype
