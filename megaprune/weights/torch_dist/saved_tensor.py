"""Single tensor as `torch.save` writes it: an uncompressed zip of its description and its values.

It is written and read here without torch, whose import takes a second: the bytes around the values follow from shape
and dtype. Like `torch.save` under `skip_data`, this computes no checksum of the values, and readers expect none.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from io import FileIO
from typing import Any

from megaprune.weights.dtypes import ITEM_BYTES

STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_ROOT = "archive/"
_ALIGNMENT = 64
_LARGE = 0xFFFFFFFF  # from here on a size has its place in the extra field of zip64


def around(shape: Sequence[int], dtype: str) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` writes before and after the values of a contiguous tensor.

    Args:
        dtype: name of the dtype in safetensors.
    """
    before, directory, count = _begun(_description(shape, dtype))
    # last, so that no other entry is beyond 4 GB
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    directory += _listed("data/0", 0, num_bytes, len(before))
    before += _header("data/0", 0, num_bytes, align_behind=len(before))
    return before, directory + _end(len(before) + num_bytes, len(directory), count + 1)


def saved_plain(value: Any) -> bytes:
    """Return the bytes that `torch.save` writes for numbers, strings and dicts of them."""
    content, directory, count = _begun(pickle.dumps(value, 2))
    return content + directory + _end(len(content), len(directory), count)


def _begun(description: bytes) -> tuple[bytes, bytes, int]:
    """Return the first entries, their directory, and their number."""
    entries = {"data.pkl": description, "version": b"3\n", "byteorder": b"little"}
    entries[".storage_alignment"] = str(_ALIGNMENT).encode()
    content, directory = b"", b""
    for name, entry in entries.items():
        checksum = zlib.crc32(entry)
        directory += _listed(name, checksum, len(entry), len(content))
        content += _header(name, checksum, len(entry)) + entry
    return content, directory, len(entries)


def _end(start: int, length: int, count: int) -> bytes:
    """Return the end of a zip whose directory of `count` entries starts at `start`."""
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, length, min(start, _LARGE), 0)
    return end


def data_offset(file: FileIO, start: int, length: int, shape: tuple[int, ...], num_bytes: int) -> int:
    """Return the offset of a tensor's values from the first byte that `torch.save` wrote.

    Args:
        start: position in the file of the first of the `length` bytes that `torch.save` wrote.

    Raises:
        Exception: of any kind, if the bytes are something else.
    """
    window = _Window(file, start, length)
    with zipfile.ZipFile(window) as saved:
        entries = {info.filename.partition("/")[2]: info for info in saved.infolist()}
    described, data = entries["data.pkl"], entries["data/0"]
    # not through zipfile, which would look at checksums that may not have been taken
    window.seek(_entry_offset(window, described))
    found = _TensorUnpickler(io.BytesIO(window.read(described.file_size))).load()
    expected = 0, shape, _strides(shape)
    if data.file_size != num_bytes or data.compress_type != zipfile.ZIP_STORED or found != expected:
        raise ValueError("the file contains another tensor than its metadata says")
    return _entry_offset(window, data)


def _description(shape: Sequence[int], dtype: str) -> bytes:
    """Return the pickle of a call to torch's `_rebuild_tensor_v2`."""
    storage = f"(X\7\0\0\0storagectorch\n{STORAGES[dtype]}\nX\1\0\0\x000X\3\0\0\0cpu".encode()
    storage += _int(math.prod(shape)) + b"tQ"
    arguments = storage + _int(0) + _ints(shape) + _ints(_strides(shape)) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


def _int(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]  # without what begins and ends a pickle


def _ints(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(length, 1) for length in shape[axis + 1 :]) for axis in range(len(shape)))


def _header(name: str, checksum: int, size: int, align_behind: int | None = None) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
    path = (_ROOT + name).encode()
    if align_behind is not None:  # by a field that readers skip, "FB" as torch calls it
        padding = -(align_behind + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + bytes(padding)
    shown = min(size, _LARGE)
    fields = (b"PK\3\4", 45, 0, 0, 0, 0, checksum, shown, shown, len(path), len(extra))
    return struct.pack("<4sHHHHHIIIHH", *fields) + path + extra


def _listed(name: str, checksum: int, size: int, offset: int) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
    path, shown = (_ROOT + name).encode(), min(size, _LARGE)
    fields = (b"PK\1\2", 45, 45, 0, 0, 0, 0, checksum, shown, shown, len(path), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4sHHHHHHIIIHHHHHII", *fields) + path + extra


def _entry_offset(window: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's bytes, after its header, name and padding."""
    window.seek(entry.header_offset)
    header = window.read(30)
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of offset, shape and strides of the one tensor that `torch.save` wrote, without its values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, identifier: Any) -> Any:
        return identifier


class _Window(io.RawIOBase):
    """Part of a file as a file object."""

    def __init__(self, file: FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count
