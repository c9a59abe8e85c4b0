"""HF folders, written tensor by tensor, and visible only once they are whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.utils.disk import disk_error
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.weights.source import INDEX
from megaprune.weights.stacking import stack_experts
from megaprune.weights.stored_layout import PLAIN, StoredLayout

if TYPE_CHECKING:
    import torch

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """``5GB`` to bytes, with the decimal units of transformers.

    Raises:
        UsageError: the text is no positive size.
    """
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{flag} {text!r} is not a size such as 500MB or 5GB")
    return size


def aside_folder(final: Path) -> Path:
    """Where the parts of ``final`` are gathered until it is whole."""
    return final.with_name(final.name + ".tmp")


@dataclass
class WrittenShard:
    """One closed safetensors file under its temporary name."""

    file: str
    names: list[str]
    num_bytes: int


@dataclass
class ShardWriter:
    """Collects tensors into safetensors files of bounded size, closing each as it fills.

    Several writers (one for each pipeline stage) may share a folder; ``finish_shards`` then gives the files their
    final names and writes the index.
    """

    folder: Path
    max_shard_bytes: int
    writer: int = 0
    written: list[WrittenShard] = field(default_factory=list)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor; it may be written later."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self.max_shard_bytes:
            self.close()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += num_bytes

    def close(self) -> list[WrittenShard]:
        """Writes what is pending, and returns every file so far."""
        if self._pending:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            file = f"part-{self.writer:05d}-{len(self.written):05d}.safetensors"
            try:
                save_file(self._pending, self.folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise disk_error(error) or error from error
            _apply_umask(self.folder / file)
            self.written.append(WrittenShard(file, sorted(self._pending), self._pending_bytes))
            self._pending, self._pending_bytes = {}, 0
        return self.written


def _apply_umask(path: Path) -> None:
    """safetensors makes files that only their owner may read, whatever the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def finish_shards(
    folder: Path, shards: list[WrittenShard], layout: StoredLayout = PLAIN, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Names the files as transformers does, and writes the index where there are several.

    Args:
        layout: its stacks are put together.
        max_shard_bytes: of the files that this takes.

    Raises:
        MegapruneError: two files hold the same tensor.
    """
    if layout.stacks:
        shards = stack_experts(folder, shards, layout, max_shard_bytes)
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
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def join_shards(folder: Path, shards: list[WrittenShard], file: str) -> None:
    """Joins the files into one, for readers that know no index, and removes them. Their bytes are copied as they are.

    Raises:
        MegapruneError: two files hold the same tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, length = [], 0
    for shard in shards:
        with (folder / shard.file).open("rb") as part:
            entries = json.loads(part.read(int.from_bytes(part.read(8), "little")))
            starts.append(part.tell())
        for name in shard.names:
            if name in header:
                raise MegapruneError(f"{name} was exported twice")
            begin, end = entries[name]["data_offsets"]
            header[name] = entries[name] | {"data_offsets": [length + begin, length + end]}
        length += shard.num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin aligned
    with (folder / file).open("wb") as whole:
        whole.write(len(encoded).to_bytes(8, "little") + encoded)
        for shard, start in zip(shards, starts, strict=True):
            with (folder / shard.file).open("rb") as part:
                part.seek(start)
                shutil.copyfileobj(part, whole)
            (folder / shard.file).unlink()
