"""A token cache that is being written. What is written is kept if the job stops, and the next one goes on from there.

Beside the files of the cache, the folder has `document_lengths.bin` (int64) and `journal.jsonl`: a line for each batch,
written after its tokens, with the position that it reaches and a checksum. A batch without a whole line, or with other
bytes than its checksum tells, is tokenized again.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaprune.utils.locks import try_flock

JOURNAL = "journal.jsonl"
_LENGTHS = "document_lengths.bin"
_FILES = ("tokens.bin", "loss_mask.bin", _LENGTHS)


@dataclass(frozen=True)
class EncodedBatch:
    """Consecutive documents.

    Args:
        tokens: of all documents, end to end; loss_mask: uint8, of the same length.
        lengths: number of tokens of each document.
        rows: number of rows that they were read from; None if it was not counted.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    lengths: Sequence[int]
    rows: int | None = None

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Bytes that a batch appends to each of the files."""
        return self.tokens.tobytes(), self.loss_mask.tobytes(), np.asarray(self.lengths, "<i8").tobytes()


class PartialCache:
    """Writer of a token cache, which begins where an interrupted one has ended.

    Args:
        folder: exists; no other process writes to it.
        dtype: type of the tokens.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._digests = hashlib.sha256(), hashlib.sha256()
        self._loss_tokens = self._largest = self._tokens = 0
        self.documents = 0
        self.rows: int | None = 0
        self._files: list[BinaryIO] = [(folder / name).open("ab+") for name in (*_FILES, JOURNAL)]
        self._resume()

    def add(self, batch: EncodedBatch) -> None:
        """Append documents; on return, they survive the end of the process."""
        parts = batch.parts
        for file, part in zip(self._files, parts, strict=False):
            file.write(part)
            file.flush()
        self._count(batch, parts)
        line = {"documents": self.documents, "rows": self.rows, "tokens": self._tokens, "checksum": _checksum(parts)}
        self._files[-1].write(json.dumps(line).encode() + b"\n")
        self._files[-1].flush()

    def finish(self) -> dict[str, Any]:
        """Complete the files of the cache, and return its description for meta.json."""
        self.close()
        lengths = np.fromfile(self._folder / _LENGTHS, "<i8")
        np.concatenate([np.zeros(1, "<i8"), np.cumsum(lengths, dtype="<i8")]).tofile(
            self._folder / "document_offsets.bin"
        )
        for name in (_LENGTHS, JOURNAL, *(["loss_mask.bin"] if self._loss_tokens == self._tokens else [])):
            (self._folder / name).unlink()
        digests = "".join(digest.hexdigest() for digest in self._digests)
        return {
            "tokens": self._tokens,
            "loss_tokens": self._loss_tokens,
            "documents": self.documents,
            "largest_token": self._largest,
            "dtype": self._dtype.str,
            "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
        }

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _count(self, batch: EncodedBatch, parts: Sequence[bytes]) -> None:
        for digest, part in zip(self._digests, parts, strict=False):
            digest.update(part)
        self._tokens += len(batch.tokens)
        self._loss_tokens += int(batch.loss_mask.sum())
        self._largest = max(self._largest, int(batch.tokens.max(initial=0)))
        self.documents += len(batch.lengths)
        self.rows = None if self.rows is None or batch.rows is None else self.rows + batch.rows

    def _resume(self) -> None:
        """Count what is there, up to the first batch that is incomplete, and cut off the rest."""
        tokens, masks, lengths, journal = self._files
        for file in self._files:
            file.seek(0)
        whole = 0
        for line in journal:
            batch = self._stored(line, tokens, masks, lengths)
            if batch is None:
                break
            self._count(batch, batch.parts)
            whole += len(line)
        journal.truncate(whole)
        for file, size in ((tokens, self._dtype.itemsize * self._tokens), (masks, self._tokens)):
            file.truncate(size)
        lengths.truncate(8 * self.documents)

    def _stored(self, line: bytes, tokens: BinaryIO, masks: BinaryIO, lengths: BinaryIO) -> EncodedBatch | None:
        """Return the batch of a line of the journal; None if it is not whole."""
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
            if not record:
                return None
            num_tokens, num_documents = record["tokens"] - self._tokens, record["documents"] - self.documents
            rows = None if record["rows"] is None or self.rows is None else record["rows"] - self.rows
            batch = EncodedBatch(
                np.frombuffer(tokens.read(self._dtype.itemsize * num_tokens), self._dtype),
                np.frombuffer(masks.read(num_tokens), np.uint8),
                np.frombuffer(lengths.read(8 * num_documents), "<i8").tolist(),
                rows,
            )
            return batch if _checksum(batch.parts) == record["checksum"] else None
        except (ValueError, KeyError, TypeError):
            return None


def _checksum(parts: Sequence[bytes]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Try to lock a file during a block; yield whether it is locked. A killed process loses its lock at once."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    mine = False
    try:
        # Another process may have removed the file since it was opened: then a lock on it means nothing.
        mine = try_flock(file) is True and _is_named(file, path)
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)
        os.close(file)


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
