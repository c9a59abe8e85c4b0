"""Training data: packed windows over one token stream, and which of them each rank sees at each iteration.

Documents are laid end to end and cut into windows of `seq_length` tokens, without regard to where documents
end. The order depends on the seed alone and the position on the iteration alone: nothing needs saving to
resume, and every parallel layout trains on the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megaprune.data.sources import RowKeys
from megaprune.data.token_cache import TokenStream, end_of_text, open_or_build
from megaprune.utils.errors import MegapruneError, UsageError

PADDING_ID = -1  # the sample id of a row that only fills up a batch
# Keeps the choice of calibration windows apart from the order of any epoch of the same seed.
_CALIBRATION_STREAM = 0xCA11B


class Windows(Protocol):
    """Windows of tokens, by number: what batches are made of."""

    @property
    def seq_length(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray: ...


@dataclass(frozen=True)
class PackedDataset:
    """Windows of seq_length + 1 tokens over a token stream, seq_length apart, so that every token of the
    stream but the first is predicted exactly once.

    A last window that is not full is left out, or with `pad_last` filled up with `pad_id` at no loss.
    """

    stream: TokenStream
    seq_length: int
    pad_id: int
    pad_last: bool = False

    def __len__(self) -> int:
        predicted = self.tokens_total - 1
        return -(-predicted // self.seq_length) if self.pad_last else predicted // self.seq_length

    @property
    def tokens_total(self) -> int:
        """Tokens in the stream."""
        return len(self.stream.tokens)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the token stream and its loss mask; seq_length and padding are no part of it."""
        return self.stream.fingerprint

    @property
    def document_offsets(self) -> np.ndarray:
        """Where each document begins in the stream, and the stream's end: int64 [documents + 1]."""
        return self.stream.document_offsets

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Window `index`: tokens int64 [seq_length + 1], and the loss mask float32 [seq_length] of its
        labels, which are the tokens from the second on. Raises IndexError outside 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_length
        stop = min(start + self.seq_length + 1, self.tokens_total)
        tokens = np.full(self.seq_length + 1, self.pad_id, np.int64)
        tokens[: stop - start] = self.stream.tokens[start:stop]
        loss_mask = np.zeros(self.seq_length, np.float32)
        all_ones = self.stream.loss_mask is None
        loss_mask[: stop - start - 1] = 1.0 if all_ones else self.stream.loss_mask[start + 1 : stop]
        return tokens, loss_mask

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """The windows of training samples start .. start + count - 1, int64 [count]."""
        return sample_order(len(self), seed, start, count)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]; sample_ids: the
    windows it holds, PADDING_ID for rows that only fill it up and carry no loss."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: list[int]


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
    from megaprune.data.blend import find_blend, open_blend, stored_windows  # which builds on this module

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


def sample_order(num_windows: int, seed: int, start: int, count: int) -> np.ndarray:
    """The windows of samples start .. start + count - 1 of the endless sample sequence, int64 [count].

    Sample n stands in epoch n // num_windows, which is a permutation of all windows drawn from (seed, epoch).
    """
    samples = np.arange(start, start + count)
    order = np.empty(count, np.int64)
    for epoch in np.unique(samples // num_windows):
        inside = samples // num_windows == epoch
        order[inside] = _permutation(num_windows, seed, int(epoch))[samples[inside] % num_windows]
    return order


@lru_cache(maxsize=2)  # asked for at every iteration, and two epochs meet in one batch
def _permutation(num_windows: int, seed: int, stream: int) -> np.ndarray:
    # RandomState, whose numbers numpy promises never to change (NEP 19): a run may resume under a newer one.
    return np.random.RandomState([seed, stream]).permutation(num_windows)


def calibration_ids(num_windows: int, count: int, seed: int, skip: int = 0) -> list[int]:
    """`count` windows for calibration, in ascending order, the same at every call; behind the `skip` that another call
    gives. Raises UsageError for more windows than there are."""
    if skip + count > num_windows:
        raise UsageError(
            f"--calibration-samples {skip + count} is more than the {num_windows} windows of --train-data: "
            "lower it, give more data or a smaller --seq-length"
        )
    return sorted(int(i) for i in _permutation(num_windows, seed, _CALIBRATION_STREAM)[skip : skip + count])


def train_batches(
    dataset: Windows,
    *,
    iteration: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
) -> list[Batch]:
    """The micro-batches of data-parallel rank `dp_rank` at `iteration`, counted from 0.

    The iteration's global batch is the same set at every layout; micro-batch m of rank r holds its samples
    (m * dp_size + r) * micro_batch_size and the following. Raises UsageError where the sizes do not divide.
    """
    rows = train_ids(
        dataset,
        iteration=iteration,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=seed,
    )
    return [_batch(dataset, row) for row in rows]


def train_ids(
    dataset: Windows,
    *,
    iteration: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
) -> list[list[int]]:
    """The windows of each of the micro-batches that `train_batches` gives."""
    per_step = micro_batch_size * dp_size
    if global_batch_size % per_step:
        raise UsageError(
            f"--global-batch-size {global_batch_size} is no multiple of --micro-batch-size "
            f"{micro_batch_size} times the data-parallel size {dp_size}: change one of them"
        )
    ids = dataset.train_order(seed, iteration * global_batch_size, global_batch_size)
    return ids.reshape(-1, dp_size, micro_batch_size)[:, dp_rank].tolist()


def eval_batches(
    dataset: Windows, *, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """The windows of `dataset` in order, or the first `limit`, dealt out as by `batches_for`."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return batches_for(dataset, range(count), micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)


def batches_for(
    dataset: Windows, ids: Sequence[int], *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """The windows `ids` in order, micro-batch m going to rank m % dp_size.

    All ranks get equally many micro-batches of equal size, because expert-parallel collectives need every
    rank in each of them: the ends are filled up with rows that carry no loss.
    """
    per_step = micro_batch_size * dp_size
    for start in range(dp_rank * micro_batch_size, -(-len(ids) // per_step) * per_step, per_step):
        chosen = list(ids[start : start + micro_batch_size])
        yield _batch(dataset, chosen + [PADDING_ID] * (micro_batch_size - len(chosen)))


def _batch(dataset: Windows, ids: list[int]) -> Batch:
    tokens = np.full((len(ids), dataset.seq_length + 1), dataset.pad_id, np.int64)
    loss_mask = np.zeros((len(ids), dataset.seq_length), np.float32)
    for row, index in enumerate(ids):
        if index != PADDING_ID:
            tokens[row], loss_mask[row] = dataset.window(index)
    both = torch.from_numpy(tokens)
    return Batch(
        tokens=both[:, :-1].contiguous(),
        labels=both[:, 1:].contiguous(),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(dataset.seq_length).expand(len(ids), -1).contiguous(),
        sample_ids=ids,
    )
