"""Conversion of HF safetensors to a Megatron-Core `torch_dist` checkpoint, tensor by tensor, without a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.models import Architecture
from megaprune.utils.disk import check_room
from megaprune.utils.errors import MegapruneError
from megaprune.weights.byte_ranges import Advance, Buffer, Range
from megaprune.weights.dtypes import ITEM_BYTES, TORCH_NAMES, is_float
from megaprune.weights.quantized import without_quantization
from megaprune.weights.reader import TensorFiles
from megaprune.weights.source import HFSource
from megaprune.weights.stored_layout import PLAIN
from megaprune.weights.surgery import copy_beside, write_config
from megaprune.weights.torch_dist.chunks import Chunk, Place, append_ranges, append_tensor, stored_tensors
from megaprune.weights.torch_dist.engine import Part, WorkOptions, convert, cut, one_torch_thread
from megaprune.weights.torch_dist.layout import Piece, pieces
from megaprune.weights.torch_dist.metadata import read_metadata, write_metadata

if TYPE_CHECKING:
    from torch import Tensor

# The folder in a checkpoint that contains config, tokenizer and code of the HF model.
HF_FOLDER = "hf"
# The file beside them with the HF model's stored layout, if it differs from the families' tables.
LAYOUT_FILE = "stored_layout.json"
PART_BYTES = 2 * 10**9


def import_checkpoint(source: HFSource, folder: Path, dtype: str | None, options: WorkOptions) -> None:
    """Write the checkpoint `folder`. Collective if a launcher started several processes.

    Args:
        dtype: dtype of the weights, by its safetensors name; None keeps the stored dtypes, where quantized weights
            become bf16. Router biases stay in fp32.

    Raises:
        MegapruneError: a tensor is missing, unknown, damaged or has another shape, or the disk is full.
        UsageError: the folder exists.
    """
    source.check_tensors()
    work = _Import(source, dtype)
    room = sum(part.num_bytes for part in work.parts)
    if not options.resume:
        check_room(folder, room)
    with one_torch_thread() if work.computes() else nullcontext():
        convert(folder, "--megatron-path", work.parts, work.write, work.finish, work.plan(), options)


class _Import:
    def __init__(self, source: HFSource, dtype: str | None) -> None:
        self._source, self._dtype = source, dtype
        self._arch: Architecture = source.family.architecture(source.config)
        self._pieces = pieces(source.family, source.config, {name: source.shape(name) for name in source.names})
        _check_covered(self._pieces, source.names)
        self._check_tensors()
        places = TensorFiles()
        ordered = sorted(self._pieces, key=lambda piece: self._stored_at(places, piece))
        places.close()
        runs = cut(((piece, self._num_bytes(piece)) for piece in ordered), PART_BYTES)
        # torch's own file names: rank, number
        self.parts = [Part(f"__{number}_0.distcp", *run) for number, run in enumerate(runs)]

    def _check_tensors(self) -> None:
        """Check that each Megatron tensor is complete and has one dtype.

        Raises:
            MegapruneError: HF tensors of one Megatron tensor do not fit each other, or one of them is missing.
        """
        by_key: dict[str, list[Piece]] = {}
        for piece in self._pieces:
            by_key.setdefault(piece.key, []).append(piece)
        for key, found in by_key.items():
            names = [name for piece in found for name in piece.hf]
            together = f"{self._source.folder}: {self._source.shown(names[0])} and others make"
            dtypes = {self._final_dtype_of(name, key) for name in names}
            if len(dtypes) > 1:
                shown = " and ".join(sorted(TORCH_NAMES[dtype] for dtype in dtypes))
                raise MegapruneError(f"{together} one {key}, but are {shown}: give --dtype")
            filled = sum(math.prod(piece.shape) for piece in found)
            if len({piece.size for piece in found}) > 1 or filled != math.prod(found[0].size):
                raise MegapruneError(
                    f"{together} {key}, but have shapes that don't fit each "
                    "other, or one is missing: the checkpoint is damaged"
                )

    def computes(self) -> bool:
        """Return whether any value must be computed, instead of only copied."""
        return not all(self._is_moved(piece) for piece in self._pieces)

    def _is_moved(self, piece: Piece) -> bool:
        final = self._final_dtype(piece)
        return not piece.kind.scatters and all(self._source.stored_dtype_name(name) == final for name in piece.hf)

    def plan(self) -> dict[str, Any]:
        """Return the input that the parts depend on."""
        config = json.dumps(self._source.config, sort_keys=True).encode()
        files = sorted({self._source.file(name) for name in self._source.names})
        stats = [path.stat() for path in files]
        return {
            "files": [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(files, stats, strict=True)],
            "config": hashlib.sha256(config).hexdigest(),
            "dtype": str(self._dtype),
            "parts": [[part.file, part.num_bytes] for part in self.parts],
        }

    def write(self, part: Part[Piece], path: Path, advance: Advance) -> list[Any]:
        """Write one file. Return offset and length of each of its pieces."""
        files, buffer, record = TensorFiles(), Buffer(), []
        with FileIO(path, "w+") as out:
            for piece, following in zip(part.items, (*part.items[1:], None), strict=True):
                for name in following.hf if following else ():
                    files.prefetch(self._source.file(name), self._source.place(name))
                place = self._write_piece(piece, out, part.file, files, buffer, advance)
                record.append([place.offset, place.length])
        files.close()
        return record

    def _write_piece(
        self, piece: Piece, out: FileIO, file: str, files: TensorFiles, buffer: Buffer, advance: Advance
    ) -> Place:
        dtype = self._final_dtype(piece)
        if self._is_moved(piece):
            return append_ranges(out, piece.shape, dtype, file, self._ranges(piece, files, dtype), advance)
        import torch

        buffer.clear()
        chunk = piece.join([self._read(name, files, buffer) for name in piece.hf], self._arch)
        place = append_tensor(out, chunk.to(getattr(torch, TORCH_NAMES[dtype])), file)
        advance(self._num_bytes(piece))
        return place

    def _ranges(self, piece: Piece, files: TensorFiles, dtype: str) -> Iterator[tuple[Range, int]]:
        """Return the bytes of a piece as ranges, each with its position in the piece."""
        for number, name in enumerate(piece.hf):
            whole, done = files.where(self._source.file(name), self._source.place(name)), 0
            for at, num_bytes in piece.runs(number, self._arch, ITEM_BYTES[dtype]):
                yield whole.part(done, num_bytes), at
                done += num_bytes

    def finish(self, folder: Path, records: dict[str, Any]) -> None:
        """Write the metadata and the HF model's own files."""
        placed = [
            (piece.key, piece.size, self._final_dtype(piece), Chunk(piece.offset, piece.shape, Place(part.file, *at)))
            for part in self.parts
            for piece, at in zip(part.items, records[part.file], strict=True)
        ]
        write_metadata(folder, stored_tensors(placed))
        beside = folder / HF_FOLDER
        beside.mkdir(exist_ok=True)
        config = without_quantization(self._source.stored_config)
        if self._dtype is not None:
            name = TORCH_NAMES[self._dtype]
            config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
        write_config(config, beside)
        if self._source.layout != PLAIN:
            (beside / LAYOUT_FILE).write_text(json.dumps(self._source.layout.record()))
        copy_beside(self._source.folder, beside)
        _check_written(folder, self._pieces)

    def _read(self, name: str, files: TensorFiles, buffer: Buffer) -> Tensor:
        source = self._source
        if not source.is_quantized(name):
            return files.read(source.file(name), source.place(name), source.shape(name), buffer)

        def read(suffix: str, dim: int, start: int, stop: int | None) -> Tensor:
            part = name + ("" if suffix == source.format.main else suffix)
            shape = source.own_shape(part)
            if (start, stop) == (0, None):
                return files.read(source.file(part), source.place(part), shape, buffer)
            return files.read_slice(source.file(part), source.place(part), shape, dim, start, stop)

        return source.format.read(read, source.shape(name), 0, 0, None, buffer.tensor(source.shape(name), "BF16"))

    def _final_dtype(self, piece: Piece) -> str:
        return self._final_dtype_of(piece.hf[0], piece.key)

    def _final_dtype_of(self, name: str, key: str) -> str:
        stored = self._source.dtype_name(name)
        if self._dtype is None or not is_float(stored) or key.endswith("router.expert_bias"):
            return stored
        return self._dtype

    def _num_bytes(self, piece: Piece) -> int:
        return math.prod(piece.shape) * ITEM_BYTES[self._final_dtype(piece)]

    def _stored_at(self, places: TensorFiles, piece: Piece) -> tuple[str, int]:
        path = self._source.file(piece.hf[0])
        return path.name, places.where(path, self._source.place(piece.hf[0])).start


def _check_covered(found: Sequence[Piece], names: Sequence[str]) -> None:
    used = sorted(name for piece in found for name in piece.hf)
    if used != sorted(names):
        odd = sorted(set(names).symmetric_difference(used)) or [name for name in used if used.count(name) > 1]
        raise MegapruneError(f"{odd[0]} would not be converted exactly once")


def _check_written(folder: Path, expected: Sequence[Piece]) -> None:
    """Read back every chunk, within its file, as a loader would.

    Raises:
        MegapruneError: a chunk is missing.
    """
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    stored = read_metadata(folder)
    places = {(key, chunk.offset): chunk for key, tensor in stored.items() for chunk in tensor.chunks}
    for piece in expected:
        chunk = places.pop((piece.key, piece.offset), None)
        if chunk is None or stored[piece.key].size != piece.size or chunk.shape != piece.shape:
            raise MegapruneError(f"{folder}: {piece.key} was not written completely")
        if chunk.place.offset + chunk.place.length > sizes.get(chunk.place.file, 0):
            raise MegapruneError(f"{folder / chunk.place.file} is shorter than what was written to it")
    if places:
        raise MegapruneError(f"{folder}: {next(iter(places))[0]} was written, but is not part of the model")
    json.loads((folder / HF_FOLDER / "config.json").read_text())
