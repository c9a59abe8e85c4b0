"""The verb `preprocess-data`: text or chat to Megatron's indexed datasets."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megaprune.cli.parser import parse_flags
from megaprune.config.fields import flag
from megaprune.utils.errors import MegapruneError, UsageError

_DESCRIPTION = "Text or chat to Megatron's indexed dataset: PREFIX.bin and PREFIX.idx."
_BAR_DELAY = 3.0  # seconds; shorter work shows no bar


@dataclass
class PreprocessConfig:
    """The flags of `preprocess-data`."""

    _argument_group_name = "preprocessing"
    input: list[str] = flag(
        "text or chat: .jsonl, .jsonl.zst, .jsonl.gz, .parquet, folders of these, or hub dataset ids (ID or ID:SPLIT)",
        [],
    )
    tokenizer: str | None = flag("the model's tokenizer: a folder or a hub id")
    output_prefix: str | None = flag("the dataset to write, without .bin and .idx")
    workers: int | None = flag("processes that tokenise (default: one for each core); the output is the same", least=1)
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    chat_template: str | None = flag("a Jinja file to render chats with, in place of the tokenizer's template")
    trust_remote_code: bool = flag("let the tokenizer run code that comes with it", False)


def run(argv: Sequence[str], command: str = "") -> None:
    """Writes the dataset and prints what it holds and how fast it was written.

    Raises:
        MegapruneError: what was asked can't be done; nothing is left behind.
        UsageError: the flags are wrong.
    """
    [config] = parse_flags(argv, (PreprocessConfig,), "preprocess_data.py", _DESCRIPTION)
    _check(config)
    # SIGTERM ends the process without a word or a chance to remove half-written files; a raised exit has both.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    preprocess(config)


def preprocess(config: PreprocessConfig) -> None:
    """As `run`, of checked flags."""
    from megaprune.data.chat import argument_columns
    from megaprune.data.preprocess import Encoding, encode_rows, load_tokenizer
    from megaprune.data.sources import RowKeys, find_sources, read_rows
    from megaprune.data.token_cache import end_of_text
    from megaprune.data.tokenizer import model_vocabulary
    from megaprune.mcore.datasets import token_dtype

    try:
        sources = find_sources(config.input, "--input")
        sizes = [source.path.stat().st_size if hasattr(source, "path") else None for source in sources]
    except OSError as error:
        raise MegapruneError(f"--input {error.filename} cannot be read ({error.strerror})") from error
    template = Path(config.chat_template).read_text() if config.chat_template else None
    tokenizer = load_tokenizer(config.tokenizer, template, config.trust_remote_code)
    # Ids may have gaps.
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    keys = RowKeys(config.text_key, config.messages_key, argument_columns(tokenizer))
    dtype = token_dtype(vocab_size)
    # Of the model no more is known than lies beside its tokenizer; what is trained later looks at the tokens again.
    folder = tokenizer.name_or_path  # of a hub id what was fetched, for all workers
    encoding = Encoding(
        folder, template, config.trust_remote_code, keys, dtype.name, vocab_size=model_vocabulary(folder)
    )
    end_of_text(tokenizer, encoding.vocab_size, "--input")
    rows = read_rows(sources, keys, "--input", hub_cache=None)
    batches = encode_rows(rows, encoding, tokenizer, config.workers or len(os.sched_getaffinity(0)))
    begin = time.perf_counter()
    with closing(batches):
        documents, tokens = _write(config, batches, dtype, None if None in sizes else sum(sizes))
    seconds = time.perf_counter() - begin
    print(
        f"{config.output_prefix}.bin and .idx: {documents:,} documents, {tokens:,} tokens as {dtype.name} in "
        f"{seconds:,.1f} s ({tokens / seconds:,.0f} tokens/s)",
        flush=True,
    )


def _write(config: PreprocessConfig, batches: Iterable, dtype: object, num_bytes: int | None) -> tuple[int, int]:
    """Writes both files aside, then gives them their names, the index last: without it there is no dataset. Returns
    the numbers of documents and tokens."""
    from tqdm import tqdm

    from megaprune.mcore.datasets import new_builder
    from megaprune.utils.disk import disk_error, explain
    from megaprune.utils.files import whole_file
    from megaprune.utils.locks import lock_beside, locked

    documents = tokens = 0
    masked = False
    noted: set[str] = set()
    bin_path, idx_path = _outputs(config)
    prefix = Path(config.output_prefix)
    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenising", delay=_BAR_DELAY)
    try:
        with (
            locked(lock_beside(prefix), f"--output-prefix {prefix}"),
            whole_file(idx_path) as idx_aside,
            whole_file(bin_path) as bin_aside,
            bar,
        ):
            _check_free(config)  # again, now that no other process can come between
            builder = new_builder(bin_aside, dtype)
            for batch in batches:
                start = 0
                for length in batch.lengths:
                    # a sequence of no tokens is none: its document has no sequence
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
                raise MegapruneError(f"--input {' '.join(config.input)} holds no documents: every row is empty")
            builder.finalize(str(idx_aside))
    except OSError as error:
        error = disk_error(error) or error
        error.filename = None  # an unfinished file's, which the user has not named
        raise MegapruneError(f"--output-prefix {explain(error, prefix)}") from error
    if masked:
        print(
            "note: the chat template marks the assistant's tokens, and an indexed dataset has no place for that: every "
            "token will carry loss",
            flush=True,
        )
    return documents, tokens


def _outputs(config: PreprocessConfig) -> tuple[Path, Path]:
    return Path(f"{config.output_prefix}.bin"), Path(f"{config.output_prefix}.idx")


def _check(config: PreprocessConfig) -> None:
    for name in ("input", "tokenizer", "output_prefix"):
        if not getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')} is required")
    if config.output_prefix.endswith(("/", ".bin", ".idx")):
        raise UsageError(
            f"--output-prefix {config.output_prefix}: give the dataset's path without .bin or .idx, not a folder's"
        )
    if config.chat_template and not Path(config.chat_template).is_file():
        raise UsageError(f"--chat-template {config.chat_template} is no file")
    _check_free(config)


def _check_free(config: PreprocessConfig) -> None:
    for path in _outputs(config):
        if path.exists():
            raise MegapruneError(f"--output-prefix {config.output_prefix}: {path} is there already; remove it first")
