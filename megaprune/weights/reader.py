"""Reader of safetensors files: headers, byte ranges, tensors and slices. All reads of the project use it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.utils.errors import MegapruneError
from megaprune.weights.byte_ranges import Buffer, Range, as_bytes, read_into
from megaprune.weights.dtypes import ITEM_BYTES
from megaprune.weights.stored_layout import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Header:
    entries: dict[str, Any]
    length: int  # of the file's part before the numbers


class TensorFiles:
    """Safetensors files, open for one worker. A file is opened on first use."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._headers: dict[Path, _Header] = {}

    def check(self, path: Path) -> None:
        """Check that a file is complete, according to its header and its length.

        Raises:
            MegapruneError: the file is damaged or can't be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise MegapruneError(f"{path} is damaged or truncated ({error}): download it again") from None

    def names(self, path: Path) -> list[str]:
        """Return the names of the tensors in a file, sorted."""
        return sorted(self._header(path).entries)

    def stored_order(self, path: Path) -> list[str]:
        """Return the names of the tensors in a file, in the order of the header."""
        return list(self._header(path).entries)

    def describe(self, path: Path, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype, by its safetensors name, and shape."""
        entry = self._header(path).entries[name]
        return entry["dtype"], tuple(entry["shape"])

    def where(self, path: Path, place: Place) -> Range:
        """Return the range of a tensor's bytes."""
        header = self._header(path)
        begin, end = header.entries[place.stored]["data_offsets"]
        return Range(self._file(path), header.length + begin, end - begin).part(*place.span(end - begin))

    def prefetch(self, path: Path, place: Place) -> None:
        """Ask the system to read a tensor ahead."""
        found = self.where(path, place)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(found.file.fileno(), found.start, found.num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, path: Path, place: Place, shape: Sequence[int], buffer: Buffer) -> Tensor:
        """Return a tensor of this shape, in its stored dtype.

        Raises:
            MegapruneError: the file ends before the tensor does.
        """
        tensor = buffer.tensor(shape, self.describe(path, place.stored)[0])
        _fill(self.where(path, place), tensor, place)
        return tensor

    def read_slice(
        self, path: Path, place: Place, shape: Sequence[int], dim: int, start: int, stop: int | None
    ) -> Tensor:
        """Return the slice ``[start:stop]`` along dimension 0 or 1 of a tensor of this shape. Only its bytes are read.

        Raises:
            MegapruneError: the file ends before the slice does.
        """
        dtype = self.describe(path, place.stored)[0]
        found, item = self.where(path, place), ITEM_BYTES[dtype]
        start, stop, _ = slice(start, stop).indices(shape[dim])
        count = max(0, stop - start)
        if dim == 0:
            row = math.prod(shape[1:]) * item
            tensor = Buffer().tensor((count, *shape[1:]), dtype)
            _fill(found.part(start * row, count * row), tensor, place)
            return tensor
        rows, columns, *rest = shape
        tensor = Buffer().tensor((rows, count, *rest), dtype)
        item *= math.prod(rest)
        view, width = as_bytes(tensor), count * item
        for number in range(rows if width else 0):
            part = found.part((number * columns + start) * item, width)
            if not read_into(part, view[number * width : (number + 1) * width]):
                raise _truncated(part, place)
        return tensor

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def __del__(self) -> None:
        self.close()

    def _header(self, path: Path) -> _Header:
        if path not in self._headers:
            file = self._file(path)
            length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
            entries = json.loads(os.pread(file.fileno(), length, 8))
            entries.pop("__metadata__", None)
            self._headers[path] = _Header(entries, 8 + length)
        return self._headers[path]

    def _file(self, path: Path) -> FileIO:
        if path not in self._files:
            self._files[path] = FileIO(path)
        return self._files[path]


def _fill(found: Range, tensor: Tensor, place: Place) -> None:
    if not read_into(found, as_bytes(tensor)):
        raise _truncated(found, place)


def _truncated(found: Range, place: Place) -> MegapruneError:
    return MegapruneError(f"{found.file.name} is truncated: it ends within {place.stored}; download it again")
