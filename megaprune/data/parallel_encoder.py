"""Encoding of rows for the token cache, by worker processes or in this one. The tokens do not depend on which."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
from tqdm import tqdm

from megaprune.data.encoder import EncodedDocument, Encoder
from megaprune.data.partial_cache import EncodedBatch
from megaprune.data.pool import available_cpus, in_order
from megaprune.data.preprocess import batches_of
from megaprune.data.sources import Row, RowKeys, document_of
from megaprune.data.tokenizer import tokenizer_identity, tokenizer_in
from megaprune.utils.errors import MegapruneError
from megaprune.utils.progress import bars_are_shown

# Less data is tokenized sooner than workers start: batches of about 1 MB.
_SMALL = 24
# More workers by default would wait for this process, which reads, checks and writes.
_MOST_WORKERS = 32
# Documents and tokens of a batch that this process tokenizes.
_BATCH_DOCUMENTS, _BATCH_TOKENS = 512, 1 << 18
_BAR_DELAY = 3.0  # seconds; shorter work shows no bar


@dataclass(frozen=True)
class Workers:
    """Processes that tokenize.

    Args:
        count: None starts one per available core, and none for little data.
        trust_remote_code: whether they run code that comes with the tokenizer.
    """

    count: int | None = None
    trust_remote_code: bool = False

    @property
    def alone(self) -> bool:
        """Whether this process tokenizes."""
        return self.count == 1


IN_PROCESS = Workers(1)


@dataclass(frozen=True)
class Position:
    """Documents that are encoded already, and the rows that they were read from, if these were counted."""

    documents: int
    rows: int | None


@dataclass(frozen=True)
class _Task:
    """Everything that determines the tokens of a row, for a worker."""

    tokenizer: str
    identity: list[Any]
    chat_template: Any
    trust_remote_code: bool
    keys: RowKeys
    dtype: str
    vocab_size: int | None


@dataclass(frozen=True)
class _Answer:
    """A worker's documents, the bytes that its rows were read from, and messages about ignored fields."""

    batch: EncodedBatch
    notes: dict[str, str] = field(default_factory=dict)


def gathered(documents: Iterable[EncodedDocument], dtype: np.dtype) -> Generator[EncodedBatch]:
    """Yield documents in batches."""
    batch: list[EncodedDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_TOKENS:
            yield _joined(batch, dtype)
            batch, size = [], 0
    if batch:
        yield _joined(batch, dtype)


def encode_in_pool(
    rows: Iterable[Row], position: Position, encoder: Encoder, keys: RowKeys, workers: Workers, flag: str
) -> Generator[EncodedBatch]:
    """Yield the documents of the rows behind a position in order.

    Raises:
        MegapruneError: a row is not a document, or can't be encoded (names the first such row), or a worker died.
    """
    batches = batches_of(_behind(rows, position, keys))
    count, first = workers.count or min(available_cpus(), _MOST_WORKERS), list(islice(batches, _SMALL))
    if workers.count is None and (len(first) < _SMALL or count == 1):
        count = 1
    encode = RowEncoder(encoder, keys)
    source = chain(first, batches)
    answers: Iterator[_Answer]
    if count == 1:
        answers = map(encode, source)
    else:
        answers = in_order(source, _begin, (_task_of(encoder, keys, workers),), count, "--tokenizer-workers")
    noted: set[str] = set()
    shown = dict(unit=" tokens", unit_scale=True, delay=_BAR_DELAY, disable=not bars_are_shown())
    try:
        with tqdm(desc=f"tokenizing {flag}", **shown) as bar:
            for answer in answers:
                yield answer.batch
                bar.update(len(answer.batch.tokens))
                for about in answer.notes.keys() - noted:
                    bar.write(answer.notes[about])
                noted |= answer.notes.keys()
    finally:
        if isinstance(answers, Generator):
            answers.close()


class RowEncoder:
    """Function that encodes the documents of rows, without empty ones."""

    def __init__(self, encoder: Encoder, keys: RowKeys) -> None:
        self._encoder, self._keys = encoder, keys

    def __call__(self, rows: Sequence[Row]) -> _Answer:
        documents = [document for row in rows if (document := document_of(row, self._keys)).content]
        groups = groupby(documents, lambda document: document.is_chat)
        encoded = [each for _, group in groups for each in self._encoder.encode_batch(list(group))]
        return _Answer(_joined(encoded, self._encoder.dtype, len(rows)), self._encoder.take_notes())


def _joined(documents: Sequence[EncodedDocument], dtype: np.dtype, rows: int | None = None) -> EncodedBatch:
    masks = [np.ones(len(tokens), np.uint8) if mask is None else mask for tokens, mask in documents]
    empty = np.array([], dtype), np.array([], np.uint8)
    return EncodedBatch(
        np.concatenate([empty[0], *(tokens for tokens, _ in documents)], dtype=dtype),
        np.concatenate([empty[1], *masks], dtype=np.uint8),
        [len(tokens) for tokens, _ in documents],
        rows,
    )


def _behind(rows: Iterable[Row], position: Position, keys: RowKeys) -> Iterator[Row]:
    """Return the rows behind a position. Where rows were not counted, documents are."""
    rest = iter(rows)
    if position.rows is not None:
        return islice(rest, position.rows, None)
    left = position.documents
    while left and (row := next(rest, None)) is not None:
        left -= bool(document_of(row, keys).content)
    return rest


def _task_of(encoder: Encoder, keys: RowKeys, workers: Workers) -> _Task:
    tokenizer = encoder.tokenizer
    return _Task(
        tokenizer.name_or_path,
        tokenizer_identity(tokenizer),
        tokenizer.chat_template,
        workers.trust_remote_code,
        keys,
        encoder.dtype.str,
        encoder.vocab_size,
    )


def _begin(task: _Task) -> Callable[[Sequence[Row]], _Answer]:
    """Load the tokenizer in a worker.

    Raises:
        MegapruneError: its folder holds another tokenizer than the caller's.
    """
    tokenizer = tokenizer_in(task.tokenizer, task.trust_remote_code)
    tokenizer.chat_template = task.chat_template
    if tokenizer_identity(tokenizer) != task.identity:
        raise MegapruneError(
            f"{task.tokenizer} holds another tokenizer than the one that is used: save it there, or give "
            "--tokenizer-workers 1"
        )
    return RowEncoder(Encoder(tokenizer, np.dtype(task.dtype), task.vocab_size), task.keys)
