"""Preparation of a dataset: from the paths in a flag to windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprune.data.blend import find_blend, open_blend, stored_windows
from megaprune.data.datasets import PackedDataset, Windows
from megaprune.data.parallel_encoder import IN_PROCESS, Workers
from megaprune.data.sources import RowKeys
from megaprune.data.token_cache import open_or_build
from megaprune.data.tokenizer import end_of_text
from megaprune.utils.errors import MegapruneError


def prepare_dataset(
    paths: Sequence[str],
    tokenizer: Any,
    *,
    seq_length: int,
    text_key: str = "text",
    messages_key: str = "messages",
    cache_dir: Path,
    flag: str = "--train-data",
    pad_last: bool = False,
    vocab_size: int | None = None,
    workers: Workers = IN_PROCESS,
) -> Windows:
    """Return the windows of `paths`, in the order of the files.

    Text and chats are tokenized into `cache_dir` by the first call and mapped from there by later ones. With several
    ranks, call it on rank 0 first and on the others after a barrier. Texts get the tokenizer's own special tokens and
    end with its end-of-text token. Chats are rendered by the chat template; if it marks the assistant's tokens (a
    `{% generation %}` block), only those carry loss. Preprocessed datasets are mapped without conversion. A hub
    dataset is fetched once: later calls use the cache and do not look for a newer version.

    Args:
        paths: .jsonl and .json files (also .zst, .gz), .parquet files, folders of these, and hub dataset ids ("id" or
            "id:split"); or prefixes of preprocessed .bin and .idx files.
        seq_length: predicted tokens in a window.
        flag: named in error messages.
        pad_last: fill the incomplete last window instead of dropping it.
        vocab_size: the model's; if given, all tokens are checked against it.
        workers: the processes that tokenize.

    Raises:
        UsageError: a path does not exist or has an unsupported ending.
        MegapruneError: the data can't be used (names the file and line), or has fewer tokens than one window.
    """
    blend = find_blend(paths, flag)
    if blend is not None:
        pad_id = end_of_text(tokenizer, vocab_size, flag)
        files = open_blend(blend, flag, seq_length, vocab_size, whole=True)
        return stored_windows(blend, files, seq_length, pad_id, pad_last, flag)
    stream = open_or_build(
        paths, tokenizer, RowKeys(text_key, messages_key), Path(cache_dir), flag, vocab_size, workers
    )
    dataset = PackedDataset(stream, seq_length, tokenizer.eos_token_id, pad_last)
    if not len(dataset):
        needed = 2 if pad_last else seq_length + 1
        raise MegapruneError(
            f"{flag} {' '.join(paths)} holds {dataset.tokens_total} tokens, but one window needs {needed}: "
            "give more data" + ("" if pad_last else " or a smaller --seq-length")
        )
    return dataset
