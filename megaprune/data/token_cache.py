"""The token cache: documents are tokenized once into flat files, which every rank maps into memory.

`CACHE_DIR/<key>/` contains `tokens.bin` (all documents end to end; little-endian uint16, or uint32 for vocabularies of
65,536 and more), `loss_mask.bin` (uint8; only if some tokens carry no loss), `document_offsets.bin` (int64: the offset
of each document, and the end) and `meta.json`. The cache does not depend on the sequence length: windows are views.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaprune.data.chat import argument_columns
from megaprune.data.encoder import EncodedDocument, Encoder
from megaprune.data.sources import RowKeys, find_sources, read_documents, source_identity
from megaprune.data.tokenizer import end_of_text, token_dtype, tokenizer_identity
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_of, put_in_place_once

_FORMAT = 2  # increase it if the same sources would give other tokens or other files


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a dataset, memory-mapped.

    Args:
        tokens: uint16 or uint32 [t].
        loss_mask: uint8 [t]; None if every token carries loss.
        document_offsets: int64 [documents + 1].
        fingerprint: hex digest of the tokens and their mask; independent of the files and the machine.
        largest_token: the highest token id; 0 if unknown.
        opened_by: the function and the arguments that map it in another process, which gets no copy of the tokens.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    document_offsets: np.ndarray
    fingerprint: str
    largest_token: int = 0
    opened_by: tuple[Callable[..., TokenStream], tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        return self.opened_by or super().__reduce__()


def open_or_build(
    paths: Sequence[str], tokenizer: Any, keys: RowKeys, cache_dir: Path, flag: str, vocab_size: int | None = None
) -> TokenStream:
    """Return the token stream of `paths`. If the cache does not contain it, tokenize the data into the cache.

    An entry of the cache is written completely or not at all. Several processes may call this at the same time.

    Args:
        paths: files, folders and hub dataset ids.
        flag: named in error messages.
        vocab_size: the model's; if given, all tokens are checked against it.

    Raises:
        UsageError: a path can't be used.
        MegapruneError: a row can't be used or has a token outside the vocabulary, or the cache can't be written.
    """
    end_of_text(tokenizer, vocab_size, flag)
    keys = replace(keys, arguments=argument_columns(tokenizer))
    try:
        sources = find_sources(paths, flag)
        identity = source_identity(sources)
    except OSError as error:
        raise MegapruneError(f"{flag} {error.filename} cannot be read ({error.strerror})") from error
    dtype = token_dtype(tokenizer)
    described = [_FORMAT, identity, tokenizer_identity(tokenizer), dtype.str, keys.text, keys.messages]
    folder = cache_dir.absolute() / hashlib.sha256(json.dumps(described).encode()).hexdigest()
    stream = _open(folder)

    def encoded() -> Iterator[EncodedDocument]:
        documents = read_documents(sources, keys, flag, hub_cache=cache_dir / "hub")
        return Encoder(tokenizer, dtype, vocab_size).encode(documents, flag)

    if stream is not None and vocab_size is not None and stream.largest_token >= vocab_size:
        deque(encoded(), maxlen=0)  # cached for another model with this tokenizer: raises and names the document
    if stream is None:
        try:
            _build(encoded(), folder, dtype, name=f"{flag} {' '.join(paths)}")
        except OSError as error:
            raise MegapruneError(
                f"the token cache cannot be written under {cache_dir} ({error}): make room, or choose another folder "
                "with --data-cache-path"
            ) from error
        stream = _open(folder)
        if stream is None:
            raise MegapruneError(f"the token cache {folder} differs from what was written: check the disk")
    return stream


def _build(encoded: Iterable[EncodedDocument], folder: Path, dtype: np.dtype, name: str) -> None:
    aside = aside_of(folder, uuid.uuid4().hex)
    made = [parent for parent in aside.parents if not parent.exists()]
    try:
        aside.mkdir(parents=True)
        meta = _write_streams(encoded, aside, dtype)
        if not meta["tokens"]:
            raise MegapruneError(f"{name} holds no documents: every row is empty")
        if not meta["loss_tokens"]:
            raise MegapruneError(
                f"{name}: no token carries loss, because the chat template marks none as the assistant's; give chats "
                "with messages of the assistant"
            )
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:  # remove folders that a failed build created, unless they are in use
            with contextlib.suppress(OSError):
                parent.rmdir()


def _write_streams(encoded: Iterable[EncodedDocument], aside: Path, dtype: np.dtype) -> dict[str, Any]:
    offsets = [0]
    loss_tokens = largest = 0
    with (aside / "tokens.bin").open("wb") as token_file, (aside / "loss_mask.bin").open("wb") as mask_file:
        tokens_out, mask_out = _HashedFile(token_file), _HashedFile(mask_file)
        for tokens, loss_mask in encoded:
            loss_mask = np.ones(len(tokens), np.uint8) if loss_mask is None else loss_mask
            tokens_out.write(tokens.tobytes())
            mask_out.write(loss_mask.tobytes())
            largest = max(largest, int(tokens.max(initial=0)))
            offsets.append(offsets[-1] + len(tokens))
            loss_tokens += int(loss_mask.sum())
    if loss_tokens == offsets[-1]:
        (aside / "loss_mask.bin").unlink()
    np.asarray(offsets, "<i8").tofile(aside / "document_offsets.bin")
    digests = tokens_out.digest.hexdigest() + mask_out.digest.hexdigest()
    return {
        "tokens": offsets[-1],
        "loss_tokens": loss_tokens,
        "documents": len(offsets) - 1,
        "largest_token": largest,
        "dtype": dtype.str,
        "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
    }


class _HashedFile:
    """A file with the digest of the data written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append data to the file and to the digest."""
        self.file.write(data)
        self.digest.update(data)


def _publish(aside: Path, folder: Path) -> None:
    """Rename the entry into place. A damaged entry is replaced; a complete one of another process is kept."""
    if folder.exists():
        if _open(folder) is not None:
            return
        shutil.rmtree(folder)
    put_in_place_once(aside, folder)


def _open(folder: Path) -> TokenStream | None:
    """Return the stream in `folder`; None if it does not exist or its files do not match its meta.json."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        count, documents, dtype = meta["tokens"], meta["documents"], np.dtype(meta["dtype"])
        files = {
            "tokens.bin": (dtype, count),
            "loss_mask.bin": (np.dtype("u1"), count),
            "document_offsets.bin": (np.dtype("<i8"), documents + 1),
        }
        if meta["loss_tokens"] == count:
            del files["loss_mask.bin"]
        if any((folder / name).stat().st_size != kind.itemsize * n for name, (kind, n) in files.items()):
            return None
        fingerprint, largest = str(meta["fingerprint"]), int(meta["largest_token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    maps = {name: np.memmap(folder / name, dtype=kind, mode="r") for name, (kind, _) in files.items()}
    tokens, offsets = maps["tokens.bin"], maps["document_offsets.bin"]
    return TokenStream(tokens, maps.get("loss_mask.bin"), offsets, fingerprint, largest, (_open_there, (folder,)))


def _open_there(folder: Path) -> TokenStream:
    """Return the stream that another process opened or built in `folder`."""
    stream = _open(folder.absolute())
    if stream is None:
        raise MegapruneError(
            f"{folder} exists on the first node, but not on {socket.gethostname()}: give --data-cache-path a folder "
            "that all nodes share"
        )
    return stream
