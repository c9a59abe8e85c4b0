"""The files of Megatron's indexed datasets, checked and mapped: a .bin of tokens and a .idx that says where each
document begins. Without Megatron, whose reader asserts little of what can be wrong with them."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaprune.utils.errors import MegapruneError
from megaprune.weights.hub import check_link

# Header, version, code of the dtype, number of sequences, number of documents and one; then, end to end, the
# sequences' lengths (int32), where each begins in the .bin (int64, bytes), and the documents' first sequences (int64).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Of larger files, a sample of as many bytes is looked through; windows are looked at again as they are read.
_SCANNED_BYTES = 4 << 30
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class IndexedFile:
    """A checked pair of files; nothing of them is held in memory.

    starts: int64 [sequences], the bytes in the .bin before each.
    """

    prefix: str
    dtype: np.dtype
    num_tokens: int
    starts: np.ndarray

    @property
    def paths(self) -> list[Path]:
        return [Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")]

    def tokens(self) -> np.ndarray:
        """All tokens, mapped, [num_tokens]."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, mode="r")

    def num_windows(self, seq_length: int) -> int:
        """Windows of `seq_length` predicted tokens."""
        return (self.num_tokens - 1) // seq_length


def open_indexed(prefix: str, flag: str) -> IndexedFile:
    """The dataset at `prefix`, both of whose files are whole.

    Raises:
        MegapruneError: a file is missing, cut off, no index, or not of the other's size; names it.
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
        raise refuse(f"{idx_path} is cut off within its header")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(head)
    if version != _VERSION or code not in _DTYPES:
        raise refuse(f"{idx_path} has version {version} and dtype {code}, which hold no tokens")
    size, expected = idx_path.stat().st_size, _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size != expected:
        raise refuse(f"{idx_path} has {size} bytes where its header needs {expected}: it is cut off or damaged")
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
        raise refuse(f"{bin_path} has {bin_path.stat().st_size} bytes where its index needs {end}: it is cut off")
    if not num_tokens:
        raise refuse(f"{bin_path} holds no tokens")
    return IndexedFile(prefix, dtype, num_tokens, starts)


def check_vocabulary(indexed: IndexedFile, vocab_size: int, flag: str, whole: bool = False) -> None:
    """Looks through the tokens, or from 4 GiB on, unless `whole`, through a sample of them.

    Raises:
        MegapruneError: one is none of the model's.
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
    """The token that is farthest outside the vocabulary, if there is one."""
    outside = [token for token in (int(tokens.max()), int(tokens.min())) if not 0 <= token < vocab_size]
    return outside[0] if outside else None


def check_tokens(tokens: np.ndarray, vocab_size: int, name: str, place: str = "") -> None:
    """Raises MegapruneError for tokens that are not in [0, vocab_size); `place` ends the message."""
    token = _beyond(tokens, vocab_size)
    if token is not None:
        raise MegapruneError(
            f"{name} holds token {token}, and the model's vocabulary has {vocab_size}: preprocess the data with the "
            f"model's own tokenizer, or give the model embeddings for the tokens that were added{place}"
        )
