"""Rows to documents of tokens, as Megatron-LM's tool encodes them; in this process or in several."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import connection, get_context, parent_process
from typing import Any

import numpy as np

from megaprune.data.sources import Document, Row, RowKeys, document_of
from megaprune.data.token_cache import Encoder
from megaprune.data.tokenizer import tokenizer_in
from megaprune.utils.errors import MegapruneError

_BATCH_ROWS = 512
_BATCH_BYTES = 1 << 20
# Batches under way or waiting for their turn, for each worker: memory stays bounded when one takes long.
_BATCHES_AHEAD = 4
# A closing token this near to the end of a chat, and white space behind it, closes it.
_CLOSING_TOKENS = 8


@dataclass(frozen=True)
class Encoding:
    """What decides the tokens of a row.

    dtype: of the tokens, numpy's name for it. vocab_size: the model's, where it is known.
    """

    tokenizer: str
    chat_template: str | None
    trust_remote_code: bool
    keys: RowKeys
    dtype: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch: their tokens end to end, and each one's number. bytes_read: as a row's.

    masked: whether the chat template says which tokens are the assistant's; the tokens don't. notes: what else there is
    to say, by what it is about.
    """

    tokens: np.ndarray
    lengths: list[int]
    bytes_read: int
    masked: bool
    notes: dict[str, str]


def load_tokenizer(folder: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id; `chat_template` takes its own one's place.

    Raises:
        MegapruneError: there is none that can be loaded, or it has no end-of-text token.
    """
    tokenizer = tokenizer_in(folder, trust_remote_code, "--tokenizer")
    if tokenizer.eos_token_id is None:
        raise MegapruneError(
            f"--tokenizer {folder} has no end-of-text token to part documents: set eos_token in its "
            "tokenizer_config.json"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


class DocumentEncoder:
    """Rows to tokens. A text is tokenised with the tokenizer's own special tokens and gets its end-of-text token, a
    chat is what the template makes of it and gets that token unless it ends so. A text without tokens stays without.
    """

    def __init__(self, encoding: Encoding, tokenizer: Any) -> None:
        self.encoding, self.tokenizer = encoding, tokenizer
        self.encoder = Encoder(tokenizer, np.dtype(encoding.dtype), encoding.vocab_size)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Raises MegapruneError at the first row that is no document."""
        documents = [document_of(row, self.encoding.keys) for row in rows]
        encoded: list[np.ndarray] = []
        masked = False
        for (is_chat, is_empty), group in groupby(documents, lambda d: (d.is_chat, not d.content)):
            batch = list(group)
            if is_chat and is_empty:
                encoded += [self._array([])] * len(batch)
            else:
                found = self.encoder.encode_batch(batch)
                encoded += [self._closed(d, tokens) for d, (tokens, _) in zip(batch, found, strict=True)]
                masked |= any(mask is not None for _, mask in found)
        tokens = np.concatenate(encoded) if encoded else self._array([])
        lengths = [len(document) for document in encoded]
        return Encoded(tokens, lengths, rows[-1].bytes_read, masked, self.encoder.take_notes())

    def _closed(self, document: Document, tokens: np.ndarray) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        if not document.is_chat:
            return self._array([]) if tokens.tolist() == [eos] else tokens
        end = tokens[-_CLOSING_TOKENS:].tolist()
        if eos in end:
            behind = end[len(end) - end[::-1].index(eos) :]
            if not self.tokenizer.decode(behind).strip():
                return tokens
        return np.append(tokens, self._array([eos]))

    def _array(self, tokens: list[int]) -> np.ndarray:
        return np.array(tokens, self.encoding.dtype)


def encode_rows(rows: Iterable[Row], encoding: Encoding, tokenizer: Any, workers: int) -> Iterator[Encoded]:
    """The rows' documents in the rows' order, the same for every number of workers.

    Raises:
        MegapruneError: a row is no document (the first such in order), or a worker died.
    """
    batches = _batches(rows)
    if workers == 1:
        yield from map(DocumentEncoder(encoding, tokenizer).encode, batches)
        return
    # Not forked from this process, whose tokenizer and Arrow have threads that a fork would leave half way.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (encoding,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) >= _BATCHES_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise MegapruneError(
            "a worker process died, perhaps for want of memory: run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        # Of parsed rows the size is not known; they come in small batches.
        size += len(row.content) if isinstance(row.content, bytes) else _BATCH_BYTES // 128
        if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker: DocumentEncoder


def _begin_worker(encoding: Encoding) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.chat_template, encoding.trust_remote_code)
    _worker = DocumentEncoder(encoding, tokenizer)


def _end_with_parent() -> None:
    """A killed parent closes nothing: its workers would wait for work for ever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode(rows: list[Row]) -> Encoded:
    return _worker.encode(rows)
