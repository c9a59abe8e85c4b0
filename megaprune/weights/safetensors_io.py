"""Whole tensors to and from safetensors files by plain reads and writes, whose memory does not add up as that of mapped
files does."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megaprune.utils.errors import MegapruneError
from megaprune.weights.dtypes import ITEM_BYTES, OF_TORCH, TORCH_NAMES
from megaprune.weights.stored_layout import Place

if TYPE_CHECKING:
    from torch import Tensor

_COPIED_AT_ONCE = 64 * 2**20
_BLOCK = 2**20  # fits the cache
_CANNOT_COPY_IN_THE_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Range:
    """Bytes of an open file."""

    file: BinaryIO
    start: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> Range:
        """So many of its bytes, behind the first `start`."""
        return Range(self.file, self.start + start, num_bytes)


class Buffer:
    """Memory for the tensors of one item at a time, kept for the next: fresh memory costs as much as the copying."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        """Takes back all that was given out."""
        self._used = 0

    def tensor(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor with a storage of its own size, its numbers undefined.

        Args:
            dtype: as safetensors names it.
        """
        import torch

        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        torch_dtype = getattr(torch, TORCH_NAMES[dtype])
        start = -(-self._used // 64) * 64
        if not num_bytes:
            return torch.empty(shape, dtype=torch_dtype)
        if self._memory is None or start + num_bytes > len(self._memory):
            # what was given out keeps the old memory alive
            self._memory, start = torch.empty(num_bytes, dtype=torch.uint8), 0
        self._used = start + num_bytes
        view = memoryview(self._memory.numpy())[start : self._used]
        return torch.frombuffer(view, dtype=torch_dtype).view(tuple(shape))


class TensorFiles:
    """The safetensors files of a folder, open for one worker."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}

    def place(self, path: Path, name: str) -> tuple[int, int]:
        """The first byte of a tensor in its file, and the one behind its last."""
        header, start = self._header(path)
        begin, end = header[name]["data_offsets"]
        return start + begin, start + end

    def describe(self, path: Path, name: str) -> tuple[str, list[int]]:
        """A tensor's dtype, as safetensors names it, and shape."""
        entry = self._header(path)[0][name]
        return entry["dtype"], entry["shape"]

    def bytes_at(self, path: Path, start: int, length: int) -> bytes:
        """Bytes of an open file; fewer at its end."""
        self._files[path].seek(start)
        return self._files[path].read(length)

    def where(self, path: Path, place: Place) -> Range:
        """Where a tensor's bytes are."""
        begin, end = self.place(path, place.stored)
        return Range(self._files[path], begin, end - begin).part(*place.span(end - begin))

    def prefetch(self, path: Path, place: Place) -> None:
        """Has the system read a tensor ahead."""
        found = self.where(path, place)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(found.file.fileno(), found.start, found.num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, path: Path, place: Place, shape: Sequence[int], buffer: Buffer) -> Tensor:
        """A tensor of this shape, in the dtype in which it is stored.

        Raises:
            MegapruneError: the file ends before the tensor does.
        """
        found = self.where(path, place)
        tensor = buffer.tensor(shape, self.describe(path, place.stored)[0])
        if not read_into(found.file, found.start, tensor):
            raise MegapruneError(f"{path} is truncated: it ends within {place.stored}; fetch it again")
        return tensor

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _header(self, path: Path) -> tuple[dict[str, Any], int]:
        if path not in self._headers:
            file = self._files[path] = path.open("rb", buffering=0)
            length = int.from_bytes(file.read(8), "little")
            self._headers[path] = json.loads(file.read(length)), 8 + length
        return self._headers[path]


def read_into(file: BinaryIO, offset: int, tensor: Tensor) -> bool:
    """Fills a contiguous tensor from a place in an unbuffered file. False where the file ends before."""
    view, done = as_bytes(tensor), 0
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            return False
        done += count
    return True


def copy_range(
    source: BinaryIO, start: int, out: BinaryIO, at: int, num_bytes: int, advance: Callable[[int], Any]
) -> bool:
    """Copies bytes from a place in one file to a place in another, as fast as it can. False where the source ends
    before."""
    copy = _copy_in_the_kernel if (start - at) % mmap.PAGESIZE == 0 else _copy_by_blocks
    done = 0
    while done < num_bytes:
        step = min(_COPIED_AT_ONCE, num_bytes - done)
        count = copy(source.fileno(), start + done, out.fileno(), at + done, step)
        if not count:
            return False
        done += count
        advance(count)
    return True


def _copy_ranges(ranges: Sequence[Range], out: BinaryIO, at: int, advance: Callable[[int], Any]) -> bool:
    for found in ranges:
        if not copy_range(found.file, found.start, out, at, found.num_bytes, advance):
            return False
        at += found.num_bytes
    return True


def _copy_in_the_kernel(source: int, start: int, out: int, at: int, num_bytes: int) -> int:
    """Page by page. Where pages of one file straddle those of the other, that takes twice as long as blocks do."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, out, num_bytes, start, at)
        except OSError as error:
            if error.errno not in _CANNOT_COPY_IN_THE_KERNEL:
                raise
    return _copy_by_blocks(source, start, out, at, num_bytes)


def _copy_by_blocks(source: int, start: int, out: int, at: int, num_bytes: int) -> int:
    block, done = memoryview(bytearray(min(num_bytes, _BLOCK))), 0
    while done < num_bytes:
        count = os.preadv(source, [block[: num_bytes - done]], start + done)
        if not count:
            break
        written = 0
        while written < count:
            written += os.pwrite(out, block[written:count], at + done + written)
        done += count
    return done


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[Sequence[int], str]],
    contents: Iterable[Tensor | Sequence[Range]],
    advance: Callable[[int], Any] = lambda count: None,
    threads: int = 1,
    stored: Mapping[str, tuple[Sequence[int], str]] | None = None,
) -> None:
    """Writes a file tensor by tensor.

    Args:
        shapes: shape of each and dtype, as safetensors names it, in order.
        contents: the tensors in this order, or where their bytes are, made as they are asked for.
        advance: told how many bytes are written.
        threads: that copy ranges while tensors are made.
        stored: the same of the tensors that the file holds, where these are made of several of the others, one behind
            the other.

    Raises:
        MegapruneError: a tensor is not what was announced.
    """
    spans = _spans(shapes)
    held = shapes if stored is None else stored
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, span in _spans(held).items():
        shape, dtype = held[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin aligned
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        first = file.tell()
        copies: dict[Future, str] = {}
        for content, (name, (shape, dtype)) in zip(contents, shapes.items(), strict=True):
            begin, end = spans[name]
            if isinstance(content, Sequence):
                num_bytes = sum(found.num_bytes for found in content)
                if num_bytes != end - begin:
                    raise MegapruneError(f"{name} is {num_bytes:,} bytes long, not {end - begin:,}")
                copy = pool.submit(_copy_ranges, content, file, first + begin, advance)
                copies[copy] = f"{content[0].file.name} is truncated: it ends within {name}"
                continue
            came_as = OF_TORCH[str(content.dtype).removeprefix("torch.")]
            if tuple(content.shape) != tuple(shape) or came_as != dtype:
                raise MegapruneError(f"{name} came as {came_as} {list(content.shape)}, not {dtype} {list(shape)}")
            file.seek(first + begin)
            write_all(file, as_bytes(content.contiguous()))
            advance(end - begin)
        for copy, truncated in copies.items():
            if not copy.result():
                raise MegapruneError(truncated)


def _spans(shapes: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, list[int]]:
    """The first byte of each tensor and the one behind its last, one behind the other."""
    spans, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        spans[name], at = [at, end], end
    return spans


def write_all(file: BinaryIO, view: memoryview) -> None:
    """Writes to an unbuffered file, which may take less at a time."""
    done = 0
    while done < len(view):
        done += file.write(view[done:])
