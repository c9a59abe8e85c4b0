"""Files of Megatron's indexed datasets, checked and memory-mapped: a .bin of tokens and a .idx with document offsets.

Read without Megatron, whose reader checks little.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaprune.utils.errors import MegapruneError
from megaprune.weights.hub import check_link

# Magic, version, dtype code, number of sequences, number of documents plus one. Three arrays follow: the lengths of the
# sequences (int32), their offsets in the .bin (int64, bytes), and the first sequence of each document (int64).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Larger files are checked in part, up to this many bytes. Training windows are checked again when they are read.
_SCANNED_BYTES = 4 << 30
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class IndexedFile:
    """A checked pair of files. Their contents are not in memory.

    Args:
        starts: int64 [sequences], the byte offset of each sequence in the .bin, memory-mapped.
        flag: named in error messages.
    """

    prefix: str
    dtype: np.dtype
    num_tokens: int
    starts: np.ndarray
    flag: str = "--train-data"

    def __reduce__(self) -> Any:
        return open_indexed, (self.prefix, self.flag)  # another process maps the files itself

    @property
    def paths(self) -> list[Path]:
        """The paths of the tokens and of the index."""
        return [Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")]

    def tokens(self) -> np.ndarray:
        """Return all tokens, memory-mapped, [num_tokens]."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, mode="r")

    def num_windows(self, seq_length: int) -> int:
        """Return the number of complete windows of `seq_length` predicted tokens."""
        return (self.num_tokens - 1) // seq_length


def open_indexed(prefix: str, flag: str) -> IndexedFile:
    """Open the dataset at `prefix` and check that both files are complete and consistent.

    Raises:
        MegapruneError: a file is missing, truncated or not an index, or the files do not match; names the file.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        check_link(path, f"{flag} {prefix}: {path}")
    for path, other in ((bin_path, idx_path), (idx_path, bin_path)):
        if not path.is_file():
            raise MegapruneError(f"{flag} {prefix}: {path} is missing beside {other.name}; write both again")
    try:
        return _open_pair(prefix, bin_path, idx_path, flag)
    except OSError as error:
        raise MegapruneError(f"{flag} {prefix} cannot be read ({error.strerror})") from error


def _open_pair(prefix: str, bin_path: Path, idx_path: Path, flag: str) -> IndexedFile:
    def refuse(problem: str) -> MegapruneError:
        return MegapruneError(f"{flag} {problem}; write it again with megaprune preprocess-data")

    with idx_path.open("rb") as file:
        head = file.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        raise refuse(f"{idx_path} is not an index of Megatron's")
    if len(head) < _HEADER.size:
        raise refuse(f"{idx_path} is truncated within its header")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(head)
    if version != _VERSION or code not in _DTYPES:
        raise refuse(f"{idx_path} has version {version} and dtype {code}, which hold no tokens")
    size, expected = idx_path.stat().st_size, _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size != expected:
        raise refuse(f"{idx_path} has {size} bytes, but its header needs {expected}: it is truncated or damaged")
    if not num_sequences:
        raise refuse(f"{idx_path} holds no documents")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.memmap(idx_path, "<i4", "r", _HEADER.size, num_sequences)
    starts = np.memmap(idx_path, "<i8", "r", _HEADER.size + lengths.nbytes, num_sequences)
    documents = np.memmap(idx_path, "<i8", "r", _HEADER.size + lengths.nbytes + starts.nbytes, num_documents)
    num_tokens = int(lengths.sum(dtype=np.int64))
    end = int(starts[-1]) + int(lengths[-1]) * dtype.itemsize
    if end != num_tokens * dtype.itemsize or lengths.min() < 0 or not num_documents or documents[-1] != num_sequences:
        raise refuse(f"{idx_path} is damaged: its lengths and offsets don't fit each other")
    if bin_path.stat().st_size != end:
        raise refuse(f"{bin_path} has {bin_path.stat().st_size} bytes, but its index needs {end}: it is truncated")
    if not num_tokens:
        raise refuse(f"{bin_path} holds no tokens")
    return IndexedFile(prefix, dtype, num_tokens, starts, flag)


def check_vocabulary(indexed: IndexedFile, vocab_size: int, flag: str, whole: bool = False) -> None:
    """Check the tokens against the model's vocabulary; files above 4 GiB in part, unless `whole`.

    Raises:
        MegapruneError: a token is outside the vocabulary.
    """
    tokens = indexed.tokens()
    chunks = -(-len(tokens) // _CHUNK_TOKENS)
    step = 1 if whole else max(1, -(-tokens.nbytes // _SCANNED_BYTES))
    for chunk in range(0, chunks, step):
        start = chunk * _CHUNK_TOKENS
        part = tokens[start : start + _CHUNK_TOKENS]
        token = _beyond(part, vocab_size)
        if token is not None:
            place = (start + int(np.argmax(part == token))) * indexed.dtype.itemsize
            document = int(np.searchsorted(indexed.starts, place, side="right"))
            check_tokens(part, vocab_size, f"{flag} {indexed.prefix}", f"; see document {document:,}")


def _beyond(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Return the largest or smallest token if it is outside the vocabulary."""
    outside = [token for token in (int(tokens.max()), int(tokens.min())) if not 0 <= token < vocab_size]
    return outside[0] if outside else None


def check_tokens(tokens: np.ndarray, vocab_size: int, name: str, place: str = "") -> None:
    """Check that all tokens are in [0, vocab_size).

    Args:
        name: the data, as the message begins.
        place: the end of the message.

    Raises:
        MegapruneError: a token is not.
    """
    token = _beyond(tokens, vocab_size)
    if token is not None:
        raise MegapruneError(
            f"{name} holds token {token}, and the model's vocabulary has {vocab_size}: preprocess the data with the "
            f"model's own tokenizer, or add embeddings for the new tokens to the model{place}"
        )
