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
import re
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from megaprune.data.chat import TOOLS, IgnoredFields, argument_columns
from megaprune.data.sources import (
    Document,
    RowKeys,
    find_sources,
    read_documents,
    source_identity,
)
from megaprune.utils.errors import MegapruneError
from megaprune.utils.progress import bars_are_shown
from megaprune.utils.text import first_line

_FORMAT = 2  # raise it when the same sources would give other tokens or other files
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000
_BAR_DELAY = 3.0  # seconds; shorter work shows no bar
# What transformers itself looks for before it can give a mask of the assistant's tokens.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_Encoded = tuple[np.ndarray, np.ndarray | None]  # one document: tokens [n], loss mask [n] or None for all ones


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
    dtype = _token_dtype(tokenizer)
    described = [_FORMAT, identity, _tokenizer_identity(tokenizer), dtype.str, keys.text, keys.messages]
    folder = cache_dir / hashlib.sha256(json.dumps(described).encode()).hexdigest()
    stream = _open(folder)

    def encoded() -> Iterator[_Encoded]:
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


def end_of_text(tokenizer: Any, vocab_size: int | None, flag: str) -> int:
    """The token between documents, which also pads windows.

    Raises:
        MegapruneError: the tokenizer has none, or one that the model hasn't.
    """
    token = tokenizer.eos_token_id
    if token is None:
        name = tokenizer.name_or_path or "the model"
        raise MegapruneError(
            f"the tokenizer of {name} has no end-of-text token to part the documents of {flag}: set eos_token in its "
            "tokenizer_config.json"
        )
    if vocab_size is not None and token >= vocab_size:
        raise MegapruneError(_beyond("the tokenizer's end-of-text token", tokenizer, token, vocab_size))
    return token


def _beyond(where: str, tokenizer: Any, token: int, vocab_size: int) -> str:
    name = tokenizer.convert_ids_to_tokens(int(token))
    return (
        f"{where}: the token {name!r} has id {token}, and the model's vocabulary has {vocab_size} (vocab_size in its "
        "config.json): give the model's own tokenizer, leave that token out of the data, or give the model an "
        "embedding for it (transformers' resize_token_embeddings)"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest of what decides a text's tokens; the chat template's share shows in the data's fingerprint."""
    digest, _, eos_token_id = _tokenizer_identity(tokenizer)
    return hashlib.sha256(f"{digest} {eos_token_id}".encode()).hexdigest()


def _token_dtype(tokenizer: Any) -> np.dtype:
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)  # ids may have gaps
    return np.dtype("<u2" if vocab_size < 65536 else "<u4")


def _tokenizer_identity(tokenizer: Any) -> list[Any]:
    """What decides the tokens of a text: the same in every process, whatever was tokenised before."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set anew by every call: left in, the key would change with the first use.
        state.pop("truncation", None), state.pop("padding", None)
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return [digest, tokenizer.chat_template, tokenizer.eos_token_id]


class Encoder:
    """Documents to tokens, in order, a batch at a time."""

    def __init__(self, tokenizer: Any, dtype: np.dtype, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.vocab_size = vocab_size
        self._ignored = IgnoredFields(tokenizer)

    def encode(self, documents: Iterable[Document], flag: str) -> Iterator[_Encoded]:
        """Raises MegapruneError where the tokenizer or its chat template refuses a document."""
        with tqdm(
            desc=f"tokenising {flag}", unit=" tokens", unit_scale=True, delay=_BAR_DELAY, disable=not bars_are_shown()
        ) as bar:
            for batch in _batches(documents):
                for tokens, loss_mask in self.encode_batch(batch):
                    yield tokens, loss_mask
                    bar.update(len(tokens))
                for note in self.take_notes().values():
                    bar.write(note)

    def take_notes(self) -> dict[str, str]:
        """What there is to say of the batches since the last call: by its field, a line."""
        notes, self._ignored.notes = self._ignored.notes, {}
        return notes

    def encode_batch(self, batch: list[Document]) -> list[_Encoded]:
        """The tokens of neighbours of one kind. Raises MegapruneError, naming the document, where one is refused."""
        encode = self._encode_chats if batch[0].is_chat else self._encode_texts
        try:
            encoded = encode(batch)
        except MegapruneError:
            raise
        except Exception as error:  # templates and custom tokenizers raise what they like
            if len(batch) == 1:
                what = "chat template" if batch[0].is_chat else "tokenizer"
                raise MegapruneError(f"{batch[0].where}: the {what} refuses it ({first_line(error)})") from error
        else:
            for document, (tokens, _) in zip(batch, encoded, strict=True):
                if self.vocab_size is not None and len(tokens) and tokens.max() >= self.vocab_size:
                    raise MegapruneError(_beyond(document.where, self.tokenizer, tokens.max(), self.vocab_size))
                if document.is_chat:
                    self._ignored.look(document.where, document.content, document.arguments, document.unread)
            return encoded
        # One at a time, to name the document at fault.
        return [encoded for document in batch for encoded in self.encode_batch([document])]

    def _encode_texts(self, batch: list[Document]) -> list[_Encoded]:
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(
            [document.content for document in batch],
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document longer than the model's context is nothing to warn of: it gets cut
        )
        return [
            (np.asarray(ids if ids and ids[-1] == eos else [*ids, eos], dtype=self.dtype), None)
            for ids in encoded["input_ids"]
        ]

    def _encode_chats(self, batch: list[Document]) -> list[_Encoded]:
        if not self.tokenizer.chat_template:
            raise MegapruneError(
                f"{batch[0].where} is chat, but the tokenizer has no chat template: take a model "
                "whose tokenizer has one, or give the conversations as text"
            )
        # A call has one set of arguments.
        groups = groupby(batch, lambda document: document.arguments)
        return [encoded for arguments, group in groups for encoded in self._encode_alike(list(group), arguments)]

    def _encode_alike(self, batch: list[Document], arguments: dict[str, Any]) -> list[_Encoded]:
        template = self.tokenizer.get_chat_template(None, arguments.get(TOOLS))
        marks_assistant = bool(_GENERATION_BLOCK.search(template))
        encoded = self.tokenizer.apply_chat_template(
            [document.content for document in batch],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marks_assistant,
            tokenizer_kwargs={
                "return_attention_mask": False,
                "return_token_type_ids": False,
                "verbose": False,
            },
            **arguments,
        )
        tokens = [np.asarray(ids, dtype=self.dtype) for ids in encoded["input_ids"]]
        if not marks_assistant:
            return [(ids, None) for ids in tokens]
        return [(i, np.asarray(m, np.uint8)) for i, m in zip(tokens, encoded["assistant_masks"], strict=True)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Neighbours of one kind: enough to keep a fast tokenizer's threads busy, few enough for memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        full = len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS
        if batch and (full or document.is_chat != batch[0].is_chat):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += sum(len(str(m)) for m in document.content) if document.is_chat else len(document.content)
    if batch:
        yield batch


def _build(encoded: Iterable[_Encoded], folder: Path, dtype: np.dtype, name: str) -> None:
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


def _write_streams(encoded: Iterable[_Encoded], aside: Path, dtype: np.dtype) -> dict[str, Any]:
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
