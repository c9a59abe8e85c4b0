"""The files of a `torch_dist` checkpoint: torch's distributed-checkpoint format as Megatron-Core reads it.

Tensors lie in `.distcp` files, each as `torch.save` writes it, one behind the other; `.metadata` says which chunk of
which tensor lies where. Writing and reading here go tensor by tensor, so that memory does not grow with the model.
"""

import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megaprune.conversion.tensor_files import Range, as_bytes, copy_range, read_into, write_all
from megaprune.errors import MegapruneError

# What a `.metadata` may name: the classes of torch's format, which `_Plain` stands for, and these.
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_METADATA_NAMES = {("torch", "Size"), ("collections", "OrderedDict"), ("builtins", "set")}


@dataclass(frozen=True)
class Place:
    """Where a chunk lies: a file of the checkpoint, and the bytes of it that `torch.save` wrote."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def append_tensor(file: BinaryIO, tensor: torch.Tensor, name: str) -> Place:
    """Writes a tensor at the end of an unbuffered file, open for reading too."""
    place, at = _append_room(file, tensor.shape, tensor.dtype, name)
    file.seek(at)
    write_all(file, as_bytes(tensor.contiguous()))
    file.seek(place.offset + place.length)
    return place


def append_range(
    file: BinaryIO,
    shape: Sequence[int],
    dtype: torch.dtype,
    name: str,
    content: Range,
    advance: Callable[[int], Any],
) -> Place:
    """The same for a tensor whose bytes are in another file, which they are copied from without passing through here.

    Raises:
        MegapruneError: the other file ends before they do.
    """
    place, at = _append_room(file, shape, dtype, name)
    if not copy_range(content.file, content.start, file, at, content.num_bytes, advance):
        raise MegapruneError(f"{content.file.name} is truncated: fetch it again")
    file.seek(place.offset + place.length)
    return place


def _append_room(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, name: str) -> tuple[Place, int]:
    """What `torch.save` writes around a tensor's numbers, and where in the file these belong."""
    offset = file.tell()
    with torch.serialization.skip_data():
        torch.save(torch.empty(tuple(shape), dtype=dtype), file)
    place = Place(name, offset, file.seek(0, io.SEEK_END) - offset)
    return place, offset + _data_offset(file, place, math.prod(shape) * dtype.itemsize, tuple(shape))


def write_metadata(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes the files that make a folder of `.distcp` files a checkpoint for Megatron-Core."""
    # Here, because it takes a second to import; reading does without.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described, places = {}, {}
    for key, tensor in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks]
        properties = TensorProperties(dtype=tensor.dtype)
        described[key] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
        for number, chunk in enumerate(tensor.chunks):
            place = _StorageInfo(chunk.place.file, chunk.place.offset, chunk.place.length)
            places[MetadataIndex(key, torch.Size(chunk.offset), number)] = place
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(Metadata(described, storage_data=places), file)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    core = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    core |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(core))


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint.

    Raises:
        MegapruneError: the folder is no `torch_dist` checkpoint, is damaged, or would run code.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise MegapruneError(f"{folder} is no torch_dist checkpoint: it holds no .metadata")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        shapes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, described in metadata.state_dict_metadata.items()
            for chunk in getattr(described, "chunks", ())  # an object has none
        }
        chunks: dict[str, list[Chunk]] = {}
        for index, info in metadata.storage_data.items():
            if not hasattr(metadata.state_dict_metadata[index.fqn], "chunks"):
                continue
            offset, place = tuple(index.offset), Place(info.relative_path, info.offset, info.length)
            chunks.setdefault(index.fqn, []).append(Chunk(offset, shapes[index.fqn, offset], place))
        return {
            key: StoredTensor(tuple(described.size), described.properties.state[0], tuple(chunks[key]))
            for key, described in metadata.state_dict_metadata.items()
            if key in chunks
        }
    except Exception as error:  # pickle and what it restores raise of every kind
        raise MegapruneError(f"{path} is damaged, or no checkpoint's metadata ({error}): save it again") from error


class _Plain:
    """Stands for any of the format's classes: its fields, or what else it was pickled as."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _METADATA_MODULES:
            return _Plain
        if (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class ChunkReader:
    """Reads chunks of one checkpoint folder, each straight from its place in the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}

    def read(self, chunk: Chunk, dtype: torch.dtype, into: torch.Tensor, skip: int = 0) -> None:
        """Fills `into`, a contiguous tensor, with the chunk's numbers in their order, from behind the first `skip` on.

        Raises:
            MegapruneError: the file is missing, truncated, or holds something else there.
        """
        found = self.where(chunk, dtype, into.numel(), skip)
        if not read_into(found.file, found.start, into):
            raise self._damaged(chunk.place.file, "it is truncated")

    def where(self, chunk: Chunk, dtype: torch.dtype, count: int, skip: int = 0) -> Range:
        """Where so many of the chunk's numbers are, behind the first `skip`.

        Raises:
            MegapruneError: the file is missing or holds something else there.
        """
        file, place = self._file(chunk.place.file), chunk.place
        num_bytes = math.prod(chunk.shape) * dtype.itemsize
        try:
            offset = place.offset + _data_offset(file, place, num_bytes, chunk.shape)
        except Exception as error:  # what damaged bytes are taken for is beyond listing
            raise self._damaged(place.file, error) from error
        return Range(file, offset + skip * dtype.itemsize, count * dtype.itemsize)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            try:
                self._files[name] = (self._folder / name).open("rb", buffering=0)
            except OSError as error:
                raise MegapruneError(
                    f"{self._folder / name} can't be read ({error}): the checkpoint is incomplete"
                ) from error
        return self._files[name]

    def _damaged(self, name: str, reason: object) -> MegapruneError:
        return MegapruneError(f"{self._folder / name} is damaged or truncated ({reason}): save the checkpoint again")


def _data_offset(file: BinaryIO, place: Place, num_bytes: int, shape: tuple[int, ...]) -> int:
    """Where the numbers of a saved tensor begin, counted from its first byte."""
    window = _Window(file, place.offset, place.length)
    with zipfile.ZipFile(window) as saved:
        entries = {info.filename.partition("/")[2]: info for info in saved.infolist()}
    described, data = entries["data.pkl"], entries["data/0"]
    # not through zipfile, which would look at checksums that may not have been taken
    window.seek(_entry_offset(window, described))
    found = _TensorUnpickler(io.BytesIO(window.read(described.file_size))).load()
    expected = 0, shape, torch.empty(shape, device="meta").stride()
    if data.file_size != num_bytes or data.compress_type != zipfile.ZIP_STORED or found != expected:
        raise ValueError("another tensor lies there than the metadata says")
    return _entry_offset(window, data)


def _entry_offset(window: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, behind its header, its name and what pads them."""
    window.seek(entry.header_offset)
    header = window.read(30)
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _TensorUnpickler(pickle.Unpickler):
    """Gives offset, shape and strides of the one tensor that `torch.save` wrote, without its numbers."""

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
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
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


def stored_tensors(chunks: Iterable[tuple[str, tuple[int, ...], torch.dtype, Chunk]]) -> dict[str, StoredTensor]:
    """Chunks of many tensors, each with its key, whole size and dtype, gathered by tensor."""
    gathered: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]] = {}
    for key, size, dtype, chunk in chunks:
        gathered.setdefault(key, (size, dtype, []))[2].append(chunk)
    return {key: StoredTensor(size, dtype, tuple(found)) for key, (size, dtype, found) in gathered.items()}
