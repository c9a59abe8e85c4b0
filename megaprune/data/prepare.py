"""Preparation of a dataset: from what a flag names to windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprune.data.blend import find_blend, open_blend, stored_windows
from megaprune.data.datasets import PackedDataset, Windows
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
) -> Windows:
    """The windows of `paths`: .jsonl, .json (also .zst, .gz), .parquet, folders of these, or hub dataset ids; or of
    preprocessed datasets (prefixes of .bin and .idx), in the order of the files.

    Where `vocab_size`, the model's, is given, all tokens are held against it. Preprocessed data is mapped as it is. The
    rest is tokenised into `cache_dir` at the first call and mapped from there afterwards: rank 0 calls it alone, the
    others after a barrier. Texts are tokenised with the tokenizer's own special tokens and end with its end-of-text
    token; chats are what the chat template makes of them, and where it marks the assistant's tokens (a
    `{% generation %}` block) only those carry loss. A hub dataset ("id" or "id:split") is fetched once: later calls use
    the cache and do not ask whether the hub has a newer one.

    Raises UsageError or MegapruneError, naming `flag` and the file and line, for data that cannot be used,
    and for fewer tokens than one window.
    """
    blend = find_blend(paths, flag)
    if blend is not None:
        pad_id = end_of_text(tokenizer, vocab_size, flag)
        files = open_blend(blend, flag, seq_length, vocab_size, whole=True)
        return stored_windows(blend, files, seq_length, pad_id, pad_last, flag)
    stream = open_or_build(paths, tokenizer, RowKeys(text_key, messages_key), Path(cache_dir), flag, vocab_size)
    dataset = PackedDataset(stream, seq_length, tokenizer.eos_token_id, pad_last)
    if not len(dataset):
        needed = 2 if pad_last else seq_length + 1
        raise MegapruneError(
            f"{flag} {' '.join(paths)} holds {dataset.tokens_total} tokens, and one window takes {needed}: "
            "give more data" + ("" if pad_last else " or a smaller --seq-length")
        )
    return dataset
