"""Datasets: windows of tokens by number, and the order in which training reads them."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from megaprune.data.token_cache import TokenStream
from megaprune.utils.errors import UsageError

# Keeps the choice of calibration windows apart from the order of any epoch of the same seed.
CALIBRATION_STREAM = 0xCA11B


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
class JoinedWindows:
    """The windows of several datasets, one dataset after the other; none spans two."""

    parts: list[PackedDataset]

    @property
    def seq_length(self) -> int:
        return self.parts[0].seq_length

    @property
    def pad_id(self) -> int:
        return self.parts[0].pad_id

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parts'."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As `PackedDataset.window`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ends = list(accumulate(map(len, self.parts)))
        part = bisect.bisect_right(ends, index)
        return self.parts[part].window(index - (ends[part - 1] if part else 0))

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """As `PackedDataset.train_order`."""
        return sample_order(len(self), seed, start, count)


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
    return sorted(int(i) for i in _permutation(num_windows, seed, CALIBRATION_STREAM)[skip : skip + count])
