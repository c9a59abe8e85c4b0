"""Byte ranges of open files: reading into tensors, copying between files, comparison.

These use plain reads and writes at given positions, so that memory stays bounded (pages of mapped files would
accumulate) and threads can share a file.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Any

from megaprune.weights.dtypes import ITEM_BYTES, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

Advance = Callable[[int], Any]
_COPIED_AT_ONCE = 64 * 2**20
_COMPARED_AT_ONCE = 32 * 2**20
_BLOCK = 2**20  # fits in the processor's cache
_CANNOT_COPY_IN_THE_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Range:
    """Range of bytes of an open file."""

    file: FileIO
    start: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> Range:
        """Return the range of `num_bytes` bytes after the first `start`."""
        return Range(self.file, self.start + start, num_bytes)


class Buffer:
    """Memory for the tensors of one item at a time, reused for the next item. Allocating new memory costs as much as
    the copying.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        """Invalidate all tensors that were handed out, and reuse their memory."""
        self._used = 0

    def tensor(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return a tensor with a storage of its own size and undefined values.

        Args:
            dtype: name of the dtype in safetensors.
        """
        import torch

        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        torch_dtype = getattr(torch, TORCH_NAMES[dtype])
        start = -(-self._used // 64) * 64
        if not num_bytes:
            return torch.empty(tuple(shape), dtype=torch_dtype)
        if self._memory is None or start + num_bytes > len(self._memory):
            # tensors that were handed out keep the old memory alive
            self._memory, start = torch.empty(num_bytes, dtype=torch.uint8), 0
        self._used = start + num_bytes
        view = as_bytes(self._memory)[start : self._used]
        return torch.frombuffer(view, dtype=torch_dtype).view(tuple(shape))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without copying."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_into(found: Range, view: memoryview) -> bool:
    """Fill memory from the start of a range. Return False if the file ends before the range does."""
    done = 0
    while done < len(view):
        count = os.preadv(found.file.fileno(), [view[done:]], found.start + done)
        if not count:
            return False
        done += count
    return True


def write_all(file: FileIO, view: memoryview) -> None:
    """Write all bytes to an unbuffered file, whose single writes may be incomplete."""
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def first_difference(first: Range, second: Range) -> int | None:
    """Return the position of the first byte in which two ranges of equal length differ; None if they are equal."""
    done = 0
    for a, b in zip(_blocks(first), _blocks(second), strict=True):
        if a != b:
            return done + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        done += len(a)
    return None


def _blocks(found: Range) -> Iterator[bytes]:
    for at in range(0, found.num_bytes, _COMPARED_AT_ONCE):
        count = min(_COMPARED_AT_ONCE, found.num_bytes - at)
        yield os.pread(found.file.fileno(), count, found.start + at)


def copy_range(found: Range, out: FileIO, at: int, advance: Advance) -> bool:
    """Copy a range to a position in another file, as fast as possible. Return False if its file ends before the range
    does.

    Args:
        advance: called with the number of bytes that were copied.
    """
    copy = _copy_in_the_kernel if (found.start - at) % mmap.PAGESIZE == 0 else _copy_by_blocks
    done = 0
    while done < found.num_bytes:
        step = min(_COPIED_AT_ONCE, found.num_bytes - done)
        count = copy(found.file.fileno(), found.start + done, out.fileno(), at + done, step)
        if not count:
            return False
        done += count
        advance(count)
    return True


def _copy_in_the_kernel(source: int, start: int, out: int, at: int, num_bytes: int) -> int:
    """Copy page by page in the kernel. If pages of the two files are not aligned, this takes twice as long as blocks
    do.
    """
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
