"""Conversion of a Megatron-Core checkpoint to an HF folder, tensor by tensor, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.utils.disk import check_room
from megaprune.weights.byte_ranges import Advance, Buffer, Range
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import copy_beside, write_config
from megaprune.weights.torch_dist.chunks import ChunkReader
from megaprune.weights.torch_dist.engine import Part, WorkOptions, convert, cut, one_torch_thread
from megaprune.weights.torch_dist.source import CheckpointSource
from megaprune.weights.writer import Described, num_bytes, stacked_shape, write_index, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor


def export_checkpoint(source: CheckpointSource, folder: Path, max_shard_bytes: int, options: WorkOptions) -> None:
    """Write the HF folder. Collective if a launcher started several processes.

    Raises:
        MegapruneError: the checkpoint is damaged or does not match its config, or the disk is full.
        UsageError: the folder exists.
    """
    source.check_tensors()
    work = _Export(source, max_shard_bytes, options)
    if not options.resume:
        check_room(folder, sum(part.num_bytes for part in work.parts))
    moved = all(source.lies_in_one_chunk(name) for name in source.names)
    with nullcontext() if moved else one_torch_thread():
        convert(folder, "--hf-path", work.parts, work.write, work.finish, work.plan(), options)


class _Export:
    def __init__(self, source: CheckpointSource, max_shard_bytes: int, options: WorkOptions) -> None:
        self._source, self._threads = source, options.threads
        self._shapes: dict[str, Described] = {
            name: (source.shape(name), source.dtype_name(name)) for name in source.names
        }
        self._groups = source.layout.groups(source.names)
        self._stored = {stored: self._stored_as(stored) for stored in self._groups}
        sizes = {stored: num_bytes(described) for stored, described in self._stored.items()}
        runs = cut(sizes.items(), max_shard_bytes)
        files = [f"model-{number:05d}-of-{len(runs):05d}.safetensors" for number in range(1, len(runs) + 1)]
        if len(runs) == 1:
            files = ["model.safetensors"]
        self.parts = [Part(file, *run) for file, run in zip(files, runs, strict=True)]

    def _stored_as(self, stored: str) -> Described:
        """Return shape and dtype of a tensor of the output."""
        parts = [self._shapes[name] for name in self._groups[stored]]
        if self._source.layout.stack_of(self._groups[stored][0]) is None:
            return parts[0]
        return stacked_shape(stored, parts, self._source.layout.parts_of_expert(stored))

    def plan(self) -> dict[str, Any]:
        """Return the input that the parts depend on."""
        metadata = (self._source.folder.parent / ".metadata").stat()
        return {
            "checkpoint": [str(self._source.folder.parent.resolve()), metadata.st_size, metadata.st_mtime_ns],
            "parts": [[part.file, part.num_bytes] for part in self.parts],
        }

    def write(self, part: Part[str], path: Path, advance: Advance) -> None:
        """Write one file."""
        reader, buffer = ChunkReader(self._source.folder.parent), Buffer()
        names = [name for stored in part.items for name in self._groups[stored]]

        def contents() -> Iterator[Tensor | list[Range]]:
            for name in names:
                buffer.clear()
                yield self._source.ranges_of(reader, name) or self._source.read_from(reader, name, buffer)

        shapes = {name: self._shapes[name] for name in names}
        stored = {stored: self._stored[stored] for stored in part.items}
        write_safetensors(path, shapes, contents(), advance, self._threads, stored)
        reader.close()

    def finish(self, folder: Path, records: dict[str, Any]) -> None:
        """Write the index and the HF model's own files, and check the folder by reading it."""
        if len(self.parts) > 1:
            weight_map = {name: part.file for part in self.parts for name in part.items}
            total = sum(part.num_bytes for part in self.parts)
            write_index(folder, weight_map, total)
        write_config(self._source.stored_config, folder)
        copy_beside(self._source.folder, folder)
        HFSource(folder).check_tensors()
