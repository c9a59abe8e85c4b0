"""The token cache: documents tokenised once into flat files that every rank maps.

`CACHE_DIR/<key>/` holds `tokens.bin` (all documents end to end; little-endian uint16, or uint32 for
vocabularies from 65,536), `loss_mask.bin` (uint8, only where some token carries no loss),
`document_offsets.bin` (int64: where each document begins, and the end) and `meta.json`. Sequence length is no
part of it: windows are views.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaprune.data.chat import argument_columns
from megaprune.data.encoder import EncodedDocument, Encoder
from megaprune.data.sources import RowKeys, find_sources, read_documents, source_identity
from megaprune.data.tokenizer import end_of_text, token_dtype, tokenizer_identity
from megaprune.utils.errors import MegapruneError

_FORMAT = 2  # raise it when the same sources would give other tokens or other files


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a data set, memory-mapped.

    tokens: [t] uint16 or uint32. loss_mask: [t] uint8, or None where every token carries loss.
    document_offsets: [documents + 1] int64. fingerprint: hex digest of the tokens and their mask, whatever
    files or machine they came from. largest_token: the highest id in it, 0 where it is not known.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    document_offsets: np.ndarray
    fingerprint: str
    largest_token: int = 0


def open_or_build(
    paths: Sequence[str], tokenizer: Any, keys: RowKeys, cache_dir: Path, flag: str, vocab_size: int | None = None
) -> TokenStream:
    """The token stream of `paths`, from the cache where it is there and whole, else tokenised into it.

    Appears whole or not at all; safe to call again, and from several processes where folders are not shared.
    Raises MegapruneError (or UsageError) for paths and rows that cannot be used, for an unwritable cache, and, where
    `vocab_size` is given, for the first document with a token that the model hasn't.
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
    folder = cache_dir / hashlib.sha256(json.dumps(described).encode()).hexdigest()
    stream = _open(folder)

    def encoded() -> Iterator[EncodedDocument]:
        documents = read_documents(sources, keys, flag, hub_cache=cache_dir / "hub")
        return Encoder(tokenizer, dtype, vocab_size).encode(documents, flag)

    if stream is not None and vocab_size is not None and stream.largest_token >= vocab_size:
        deque(encoded(), maxlen=0)  # the cache is another model's with this tokenizer: raises at the document
    if stream is None:
        try:
            _build(encoded(), folder, dtype, name=f"{flag} {' '.join(paths)}")
        except OSError as error:
            raise MegapruneError(
                f"the token cache cannot be written under {cache_dir} ({error}): make room there, or name another "
                "folder with --data-cache-path"
            ) from error
        stream = _open(folder)
        if stream is None:
            raise MegapruneError(f"the token cache {folder} does not read back as written: check that disk")
    return stream


def _build(encoded: Iterable[EncodedDocument], folder: Path, dtype: np.dtype, name: str) -> None:
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    made = [parent for parent in aside.parents if not parent.exists()]
    try:
        aside.mkdir(parents=True)
        meta = _write_streams(encoded, aside, dtype)
        if not meta["tokens"]:
            raise MegapruneError(f"{name} holds no documents: every row is empty")
        if not meta["loss_tokens"]:
            raise MegapruneError(
                f"{name}: no token carries loss, since the chat template marks none as the assistant's; "
                "give chats that the assistant answers"
            )
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:  # what was made for a build that failed goes too; full folders refuse to go
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
    """A file and the digest of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)


def _publish(aside: Path, folder: Path) -> None:
    """Rename into place; what lies there damaged goes, what another process finished meanwhile stays."""
    if folder.exists():
        if _open(folder) is not None:
            return
        shutil.rmtree(folder)
    try:
        os.rename(aside, folder)
    except OSError:
        if _open(folder) is None:
            raise


def _open(folder: Path) -> TokenStream | None:
    """The stream in `folder`, or None where it is absent or its files are not what its meta.json says."""
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
    tokens, loss_mask, offsets = (maps.get(name) for name in ("tokens.bin", "loss_mask.bin", "document_offsets.bin"))
    return TokenStream(tokens, loss_mask, offsets, fingerprint, largest)
