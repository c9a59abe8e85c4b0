"""HF tensors of a Megatron-Core checkpoint, under the names of an HF folder."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megaprune.models import family_of
from megaprune.models.shapes import hf_shapes
from megaprune.models.shards import COPY
from megaprune.utils.errors import MegapruneError
from megaprune.weights.byte_ranges import Buffer, Range
from megaprune.weights.dtypes import ITEM_BYTES
from megaprune.weights.hub import check_links
from megaprune.weights.source import read_hf_config
from megaprune.weights.stored_layout import StoredLayout
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.torch_dist.chunks import Chunk, ChunkReader
from megaprune.weights.torch_dist.import_hf import HF_FOLDER, LAYOUT_FILE
from megaprune.weights.torch_dist.layout import UNREAD, Piece, mtp_rules, pieces
from megaprune.weights.torch_dist.metadata import read_metadata

if TYPE_CHECKING:
    from torch import Tensor

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.", "mtp.", UNREAD)
OUTPUT_KEY = "output_layer.weight"
_PADDED_KEYS = ("embedding.word_embeddings.weight", OUTPUT_KEY)
_MOST_PADDING = 128 * 1024  # vocabulary padding: Megatron pads to a multiple of 128 times the tensor-parallel size


class CheckpointSource(TensorSource):
    """Checkpoint with the interface of an HF folder: the names, shapes, dtypes and values that its export would have.

    The checkpoint may have been saved at any layout: chunks are assembled while they are read.

    Raises:
        MegapruneError: the folder is not a checkpoint with an HF model's config, or lacks a tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        checkpoint = Path(folder)
        if not checkpoint.is_dir():
            raise MegapruneError(f"{checkpoint} does not exist or is not a folder: give a Megatron-Core checkpoint")
        self._stored = read_metadata(checkpoint)
        self._chunks = {(key, chunk.offset): chunk for key, tensor in self._stored.items() for chunk in tensor.chunks}
        if not (checkpoint / HF_FOLDER / "config.json").is_file():
            raise MegapruneError(
                f"{checkpoint} holds no {HF_FOLDER}/config.json: only checkpoints that carry the HF model's config and "
                "tokenizer there can be read, as convert.py import writes them"
            )
        check_links(checkpoint / HF_FOLDER)
        config = read_hf_config(checkpoint / HF_FOLDER)
        self._begin(checkpoint / HF_FOLDER, config, family_of(config))
        if OUTPUT_KEY in self._stored:
            self._untie()
        if (self.folder / LAYOUT_FILE).is_file():
            self.layout = StoredLayout.from_record(json.loads((self.folder / LAYOUT_FILE).read_text()))
        self._arch = self.family.architecture(self.config)
        self._reader = ChunkReader(checkpoint)
        self._shapes = self._hf_shapes()
        found = pieces(self.family, self.config, self._shapes)
        lacking = [piece.key for piece in found if not self._holds(piece)]
        if lacking:
            raise MegapruneError(f"{checkpoint} lacks {lacking[0]}: it does not belong to its config")
        used = {piece.key for piece in found}
        unused = [
            key
            for key in self._stored
            if key.startswith(_MODEL_KEYS) and key not in used and not key.endswith("_extra_state")
        ]
        if unused:
            raise MegapruneError(
                f"{checkpoint} holds {unused[0]}, which its config does not define: it would be lost on export"
            )
        self._pieces = {name: (piece, number) for piece in found for number, name in enumerate(piece.hf)}
        self._folder = checkpoint
        self._fused: tuple[str, list[Tensor]] = "", []

    def lies_in_one_chunk(self, name: str) -> bool:
        """Return whether a tensor's bytes can be copied from one chunk."""
        piece = self._pieces[name][0]
        return not piece.kind.scatters and self._found_in(piece) is not None

    def ranges_of(self, reader: ChunkReader, name: str) -> list[Range] | None:
        """Return the tensor's byte ranges as `ranges` does, in files that the given reader has open."""
        piece, number = self._pieces[name]
        found, dtype = self._found_in(piece), self._stored[piece.key].dtype
        if found is None or piece.kind.scatters:
            return None
        whole = reader.where(found[0], dtype, math.prod(piece.shape), found[1])
        return [whole.part(*run) for run in piece.runs(number, self._arch, ITEM_BYTES[dtype])]

    def read_from(self, reader: ChunkReader, name: str, buffer: Buffer) -> Tensor:
        """Return a whole tensor, read by the given reader into the given memory."""
        piece, number = self._pieces[name]
        chunk = self._read_piece(piece, reader, buffer)
        return piece.split(chunk, self._arch)[number].reshape(self._shapes[name])

    @property
    def all_names(self) -> Collection[str]:
        """Return the names of all tensors, in the checkpoint's order."""
        return self._pieces.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in an HF folder."""
        self.file(name)
        return self._shapes[name]

    def stored_dtype_name(self, name: str) -> str:
        """Return the stored dtype by its safetensors name."""
        self.file(name)
        return self._stored[self._pieces[name][0].key].dtype

    def file(self, name: str) -> Path:
        """Return the checkpoint, which contains every tensor."""
        if name not in self._pieces:
            raise MegapruneError(f"{self.folder} lacks the tensor {self.shown(name)}: the checkpoint is incomplete")
        return self._folder

    def ranges(self, name: str) -> list[Range] | None:
        """Return the byte ranges that make up a tensor, in order; None if they are scattered over several chunks."""
        return self.ranges_of(self._reader, name)

    def _read_stored(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.shape(name)[0] if self.shape(name) else 0
        if dim == 0 and (start, stop) != (0, None):
            return self._rows(name, *slice(start, stop).indices(rows)[:2])
        whole = self._whole(name)
        return whole if (start, stop) == (0, None) else whole[:, start:stop]

    def _whole(self, name: str) -> Tensor:
        piece, number = self._pieces[name]
        if len(piece.hf) > 1:  # query, key and value are requested one after the other
            if self._fused[0] != piece.key:
                self._fused = piece.key, piece.split(self._read_piece(piece, self._reader, Buffer()), self._arch)
            return self._fused[1][number]
        return piece.split(self._read_piece(piece, self._reader, Buffer()), self._arch)[0].reshape(self._shapes[name])

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor. If it has its own chunk, only these rows are read."""
        piece, _ = self._pieces[name]
        if piece.kind is not COPY:
            return self._whole(name)[start:stop]
        row = len(piece.shape) - len(self._shapes[name])  # after the dimension of the experts
        offset, shape = list(piece.offset), list(piece.shape)
        offset[row], shape[row] = offset[row] + start, stop - start
        rows = replace(piece, offset=tuple(offset), shape=tuple(shape))
        return self._read_piece(rows, self._reader, Buffer()).reshape(stop - start, *self._shapes[name][1:])

    def _hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all HF tensors in the checkpoint."""
        names = [name for rule in self.family.rules(self.config) for name in rule.hf]
        shapes = hf_shapes(names, self._arch)
        num_mtp = sum(key.startswith("mtp.") and key.endswith(".eh_proj.weight") for key in self._stored)
        for key, rule in mtp_rules(self.family, self._arch, num_mtp):
            if key in self._stored:
                own = rule.megatron == key
                shapes |= {rule.hf[0]: self._stored[key].size} if own else hf_shapes(rule.hf, self._arch)
        raw = {key.removeprefix(UNREAD): tensor.size for key, tensor in self._stored.items() if key.startswith(UNREAD)}
        return shapes | raw

    def _holds(self, piece: Piece) -> bool:
        """Return whether the checkpoint contains the piece's tensor, whose vocabulary may be padded."""
        stored = self._stored.get(piece.key)
        if stored is None or stored.size == piece.size:
            return stored is not None
        padded = piece.key in _PADDED_KEYS and stored.size[1:] == piece.size[1:]
        return padded and 0 < stored.size[0] - piece.size[0] < _MOST_PADDING

    def _found_in(self, piece: Piece) -> tuple[Chunk, int] | None:
        """Return the chunk that contains the piece's values contiguously, and their offset in it."""
        # usually the piece is a chunk itself; comparing all pairs of hundreds of experts would be quadratic
        same = self._chunks.get((piece.key, piece.offset))
        for chunk in (same,) if same else self._stored[piece.key].chunks:
            start = _start_in(chunk, piece)
            if start is not None:
                return chunk, start
        return None

    def _read_piece(self, piece: Piece, reader: ChunkReader, buffer: Buffer) -> Tensor:
        stored = self._stored[piece.key]
        whole = buffer.tensor(piece.shape, stored.dtype)
        found = self._found_in(piece)
        if found is not None:
            reader.read(found[0], stored.dtype, whole, found[1])
            return whole
        missing = whole.numel()
        for chunk in stored.chunks:
            overlap = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(piece.offset, piece.shape, chunk.offset, chunk.shape, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            part = buffer.tensor(chunk.shape, stored.dtype)
            reader.read(chunk, stored.dtype, part)
            into = whole[tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, piece.offset, strict=True))]
            into.copy_(part[tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offset, strict=True))])
            missing -= into.numel()
        if missing:
            raise MegapruneError(f"{self._folder}: chunks of {piece.key} are missing or overlap")
        return whole


def _start_in(chunk: Chunk, piece: Piece) -> int | None:
    """Return the offset of the piece's values in the chunk; None unless the chunk contains all of them contiguously."""
    start, stride, cut = 0, 1, False
    for axis in reversed(range(len(piece.shape))):
        length, skipped = piece.shape[axis], piece.offset[axis] - chunk.offset[axis]
        if skipped < 0 or skipped + length > chunk.shape[axis] or (cut and length > 1):
            return None
        start += skipped * stride
        cut = cut or length < chunk.shape[axis]
        stride *= chunk.shape[axis]
    return start
