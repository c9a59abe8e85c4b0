"""The token cache: documents are tokenized once into flat files, which every rank maps into memory.

`CACHE_DIR/<key>/` contains `tokens.bin` (all documents end to end; little-endian uint16, or uint32 for vocabularies of
65,536 and more), `loss_mask.bin` (uint8; only if some tokens carry no loss), `document_offsets.bin` (int64: the offset
of each document, and the end) and `meta.json`. The cache does not depend on the sequence length: windows are views.
`CACHE_DIR/<key>.partial/` is an entry that a stopped or killed process has begun (see `partial_cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megaprune.data.chat import argument_columns
from megaprune.data.encoder import Encoder
from megaprune.data.parallel_encoder import IN_PROCESS, Position, Workers, encode_in_pool, gathered
from megaprune.data.partial_cache import EncodedBatch, PartialCache, exclusive
from megaprune.data.sources import Document, RowKeys, find_sources, read_documents, read_rows, source_identity
from megaprune.data.tokenizer import end_of_text, token_dtype, tokenizer_identity
from megaprune.utils import stopping
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_of, put_in_place_once
from megaprune.utils.progress import say

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
    paths: Sequence[str],
    tokenizer: Any,
    keys: RowKeys,
    cache_dir: Path,
    flag: str,
    vocab_size: int | None = None,
    workers: Workers = IN_PROCESS,
) -> TokenStream:
    """Return the token stream of `paths`. If the cache does not contain it, tokenize the data into the cache.

    An entry of the cache appears when it is complete. If the process is stopped or killed, the next call goes on from
    the tokens that it has written. Several processes may call this at the same time.

    Args:
        paths: files, folders and hub dataset ids.
        flag: named in error messages.
        vocab_size: the model's; if given, all tokens are checked against it.
        workers: the processes that tokenize; the entry does not depend on them.

    Raises:
        UsageError: a path can't be used.
        MegapruneError: a row can't be used or has a token outside the vocabulary, or the cache can't be written.
        RunStopped: the run was asked to stop.
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
    encoder = Encoder(tokenizer, dtype, vocab_size)

    def documents(skip: int) -> Iterator[Document]:
        return islice(read_documents(sources, keys, flag, hub_cache=cache_dir / "hub"), skip, None)

    def encoded(position: Position) -> Generator[EncodedBatch]:
        if workers.alone:
            return gathered(encoder.encode(documents(position.documents), flag), dtype)
        rows = read_rows(sources, keys, flag, hub_cache=cache_dir / "hub")
        return encode_in_pool(rows, position, encoder, keys, workers, flag)

    if stream is None:
        try:
            _build(encoded, folder, dtype, name=f"{flag} {' '.join(paths)}")
        except OSError as error:
            raise MegapruneError(
                f"the token cache cannot be written under {cache_dir} ({error}): make room, or choose another folder "
                "with --data-cache-path"
            ) from error
        stream = _open(folder)
        if stream is None:
            raise MegapruneError(f"the token cache {folder} differs from what was written: check the disk")
    if vocab_size is not None and stream.largest_token >= vocab_size:
        # cached for another model with this tokenizer: raises and names the document
        deque(encoder.encode(documents(0), flag), maxlen=0)
    return stream


def _build(encoded: Callable[[Position], Generator[EncodedBatch]], folder: Path, dtype: np.dtype, name: str) -> None:
    """Write an entry. If another process writes the same one, each writes its own, and the first one stays."""
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder.with_name(f".{folder.name}.lock")) as mine:
            partial = folder.with_name(f"{folder.name}.partial") if mine else aside_of(folder, uuid.uuid4().hex)
            try:
                partial.mkdir(exist_ok=True)
                _write(encoded, partial, dtype, name)
                _publish(partial, folder)
            except (MegapruneError, OSError) as error:
                if not getattr(error, "keeps_progress", False):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        for parent in made:  # remove folders that a failed build created, unless they are in use
            with contextlib.suppress(OSError):
                parent.rmdir()


def _write(encoded: Callable[[Position], Generator[EncodedBatch]], partial: Path, dtype: np.dtype, name: str) -> None:
    cache = PartialCache(partial, dtype)
    try:
        if cache.documents:
            say(f"{name}: {cache.documents:,} documents are tokenized already")
        with contextlib.closing(encoded(Position(cache.documents, cache.rows))) as batches:
            for batch in batches:
                cache.add(batch)
                stopping.saved()
                stopping.stop_alone("tokenizing", f"after {cache.documents:,} documents of {name} were tokenized")
        meta = cache.finish()
    finally:
        cache.close()
    if not meta["tokens"]:
        raise MegapruneError(f"{name} holds no documents: every row is empty")
    if not meta["loss_tokens"]:
        raise MegapruneError(
            f"{name}: no token carries loss, because the chat template marks none as the assistant's; give chats "
            "with messages of the assistant"
        )
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


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
