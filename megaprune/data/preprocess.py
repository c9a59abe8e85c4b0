"""Preprocessing: text or chats to Megatron's indexed datasets, with the same bytes as Megatron-LM's own tool."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megaprune.data.chat import argument_columns
from megaprune.data.encoder import Encoder
from megaprune.data.pool import in_order
from megaprune.data.sources import Document, FileSource, Row, RowKeys, Source, document_of, find_sources, read_rows
from megaprune.data.tokenizer import end_of_text, model_vocabulary, tokenizer_in, vocabulary_size
from megaprune.utils.disk import disk_error, explain
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import whole_file
from megaprune.utils.locks import lock_beside, locked

_BAR_DELAY = 3.0  # seconds; shorter work shows no bar
BATCH_ROWS = 512
BATCH_BYTES = 1 << 20
# An end-of-text token among this many last tokens ends a chat if only white space follows it.
_CLOSING_TOKENS = 8


@dataclass(frozen=True)
class PreprocessOptions:
    """Settings of `preprocess`.

    Args:
        inputs: files, folders and hub dataset ids.
        tokenizer: a folder or a hub id.
        output_prefix: path of the dataset without `.bin` and `.idx`.
        workers: processes that tokenize; the output does not depend on it.
        chat_template: a Jinja file that replaces the tokenizer's chat template.
    """

    inputs: Sequence[str]
    tokenizer: str
    output_prefix: str
    workers: int
    text_key: str = "text"
    messages_key: str = "messages"
    chat_template: str | None = None
    trust_remote_code: bool = False

    @property
    def outputs(self) -> tuple[Path, Path]:
        """The paths of the tokens and of the index."""
        return Path(f"{self.output_prefix}.bin"), Path(f"{self.output_prefix}.idx")


@dataclass(frozen=True)
class Preprocessed:
    """The result of `preprocess`.

    Args:
        dtype: numpy's name of the type of the tokens.
        masked: whether the chat template marks the assistant's tokens; an indexed dataset cannot hold these marks.
    """

    documents: int
    tokens: int
    dtype: str
    masked: bool
    seconds: float


def check_outputs(options: PreprocessOptions) -> None:
    """Check that the dataset does not exist.

    Raises:
        MegapruneError: one of its files exists.
    """
    for path in options.outputs:
        if path.exists():
            raise MegapruneError(f"--output-prefix {options.output_prefix}: {path} already exists; remove it first")


def preprocess(options: PreprocessOptions) -> Preprocessed:
    """Tokenize the inputs and write the dataset, completely or not at all.

    Raises:
        MegapruneError: an input or the tokenizer can't be used, or the dataset can't be written.
        UsageError: an input does not exist.
    """
    # Imported here: worker processes load this module and need no Megatron.
    from megaprune.mcore.datasets import token_dtype

    sources, num_bytes = _sources(options.inputs)
    template = Path(options.chat_template).read_text() if options.chat_template else None
    tokenizer = load_tokenizer(options.tokenizer, template, options.trust_remote_code)
    keys = RowKeys(options.text_key, options.messages_key, argument_columns(tokenizer))
    dtype = token_dtype(vocabulary_size(tokenizer))
    # Only files beside the tokenizer tell about the model here; training checks the tokens again.
    folder = tokenizer.name_or_path  # for a hub id, its download, which all workers read
    encoding = Encoding(
        folder, template, options.trust_remote_code, keys, dtype.name, vocab_size=model_vocabulary(folder)
    )
    end_of_text(tokenizer, encoding.vocab_size, "--input")
    rows = read_rows(sources, keys, "--input", hub_cache=None)
    begin = time.perf_counter()
    with closing(encode_rows(rows, encoding, tokenizer, options.workers)) as batches:
        documents, tokens, masked = _write(options, batches, dtype, num_bytes)
    return Preprocessed(documents, tokens, dtype.name, masked, time.perf_counter() - begin)


def _sources(inputs: Sequence[str]) -> tuple[list[Source], int | None]:
    """Return the sources and the bytes of all files; None if one is a hub dataset, whose size is unknown."""
    try:
        sources = find_sources(inputs, "--input")
        sizes = [source.path.stat().st_size for source in sources if isinstance(source, FileSource)]
    except OSError as error:
        raise MegapruneError(f"--input {error.filename} cannot be read ({error.strerror})") from error
    return sources, sum(sizes) if len(sizes) == len(sources) else None


def _write(
    options: PreprocessOptions, batches: Iterable["Encoded"], dtype: np.dtype, num_bytes: int | None
) -> tuple[int, int, bool]:
    """Write both files under temporary names and rename them, the index last: no dataset exists without an index.

    Returns:
        The numbers of documents and tokens, and whether a chat template marked the assistant's tokens.
    """
    bin_path, idx_path = options.outputs
    prefix = Path(options.output_prefix)
    try:
        with (
            locked(lock_beside(prefix), f"--output-prefix {prefix}"),
            whole_file(idx_path) as idx_aside,
            whole_file(bin_path) as bin_aside,
        ):
            check_outputs(options)  # again, now that the lock keeps other processes out
            return _write_batches(options, batches, dtype, num_bytes, bin_aside, idx_aside)
    except OSError as error:
        error = disk_error(error) or error
        error.filename = None  # that of a temporary file, which the user did not name
        raise MegapruneError(f"--output-prefix {explain(error, prefix)}") from error


def _write_batches(
    options: PreprocessOptions,
    batches: Iterable["Encoded"],
    dtype: np.dtype,
    num_bytes: int | None,
    bin_path: Path,
    idx_path: Path,
) -> tuple[int, int, bool]:
    from tqdm import tqdm

    from megaprune.mcore.datasets import new_builder

    documents = tokens = 0
    masked = False
    noted: set[str] = set()
    builder = new_builder(bin_path, dtype)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenizing", delay=_BAR_DELAY) as bar:
        for batch in batches:
            start = 0
            for length in batch.lengths:
                # A document without tokens has no sequence: the format knows no empty ones.
                builder.add_document(batch.tokens[start : start + length], [length] if length else [])
                start += length
            documents, tokens = documents + len(batch.lengths), tokens + start
            masked |= batch.masked
            for about, note in batch.notes.items():
                if about not in noted:
                    bar.write(note)
            noted |= batch.notes.keys()
            bar.update(batch.bytes_read - bar.n)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s", refresh=False)
        if not tokens:
            raise MegapruneError(f"--input {' '.join(options.inputs)} holds no documents: every row is empty")
        builder.finalize(str(idx_path))
    return documents, tokens, masked


@dataclass(frozen=True)
class Encoding:
    """Everything that determines the tokens of a row.

    Args:
        chat_template: the text of a template that replaces the tokenizer's.
        dtype: numpy's name of the type of the tokens.
        vocab_size: the model's, if known.
    """

    tokenizer: str
    chat_template: str | None
    trust_remote_code: bool
    keys: RowKeys
    dtype: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch.

    Args:
        tokens: of all documents, end to end.
        lengths: the number of tokens of each document.
        bytes_read: as in `Row`.
        masked: whether the chat template marks the assistant's tokens; the marks are not kept.
        notes: messages for the user, by their subject.
    """

    tokens: np.ndarray
    lengths: list[int]
    bytes_read: int
    masked: bool
    notes: dict[str, str]


def load_tokenizer(folder: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder or hub id, with another chat template if one is given.

    Raises:
        MegapruneError: the tokenizer can't be loaded or has no end-of-text token.
    """
    tokenizer = tokenizer_in(folder, trust_remote_code, "--tokenizer")
    if tokenizer.eos_token_id is None:
        raise MegapruneError(
            f"--tokenizer {folder} has no end-of-text token to separate documents: set eos_token in its "
            "tokenizer_config.json"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


class DocumentEncoder:
    """Encoder of rows as documents.

    A text gets the tokenizer's own special tokens and ends with its end-of-text token. A chat is rendered by the chat
    template, and the end-of-text token follows unless the rendered chat ends with it. An empty text has no tokens.
    """

    def __init__(self, encoding: Encoding, tokenizer: Any) -> None:
        self.encoding, self.tokenizer = encoding, tokenizer
        self.encoder = Encoder(tokenizer, np.dtype(encoding.dtype), encoding.vocab_size)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Return the documents of the rows.

        Raises:
            MegapruneError: a row is not a document; names the first such row.
        """
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


def encode_rows(rows: Iterable[Row], encoding: Encoding, tokenizer: Any, workers: int) -> Generator[Encoded]:
    """Yield the documents of the rows in order, in batches. The result does not depend on the number of workers.

    Raises:
        MegapruneError: a row is not a document (names the first such row), or a worker process died.
    """
    batches = batches_of(rows)
    if workers == 1:
        yield from map(DocumentEncoder(encoding, tokenizer).encode, batches)
    else:
        yield from in_order(batches, _begin_worker, (encoding,), workers, "--workers")


def batches_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield consecutive rows, of which a worker takes one batch at a time."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        # The size of a parsed row is unknown; such rows come in small batches.
        size += len(row.content) if isinstance(row.content, bytes) else BATCH_BYTES // 128
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _begin_worker(encoding: Encoding) -> Callable[[list[Row]], Encoded]:
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.chat_template, encoding.trust_remote_code)
    return DocumentEncoder(encoding, tokenizer).encode
