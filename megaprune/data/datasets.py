"""Datasets: numbered windows of tokens, and the order in which training reads them.

Documents are concatenated and cut into windows of `seq_length` tokens, regardless of where documents end.
"""

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

# A random stream of its own: the choice of calibration windows is independent of the order of any epoch.
CALIBRATION_STREAM = 0xCA11B


class Windows(Protocol):
    """A dataset: windows of tokens that are read by their numbers."""

    @property
    def seq_length(self) -> int:
        """Predicted tokens in a window."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that fills incomplete windows and batches."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tokens and their loss mask."""
        ...

    def __len__(self) -> int: ...

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window: tokens int64 [seq_length + 1], and the loss mask float32 [seq_length] of its labels.

        The labels are the tokens from the second on.

        Raises:
            IndexError: `index` is not in [0, len(self)).
        """
        ...

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Return the windows of training samples start .. start + count - 1, int64 [count]."""
        ...


@dataclass(frozen=True)
class PackedDataset:
    """Windows of a token stream.

    Window i holds seq_length + 1 tokens, from i * seq_length on, so that every token of the stream except the first
    is predicted exactly once. An incomplete last window is dropped, or with `pad_last` filled with `pad_id`, which
    carries no loss.
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
        """Number of tokens in the stream."""
        return len(self.stream.tokens)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the token stream and its loss mask; independent of seq_length and padding."""
        return self.stream.fingerprint

    @property
    def document_offsets(self) -> np.ndarray:
        """Offsets of the documents in the stream, and its length: int64 [documents + 1]."""
        return self.stream.document_offsets

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return window `index` (see `Windows.window`)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_length
        stop = min(start + self.seq_length + 1, self.tokens_total)
        tokens = np.full(self.seq_length + 1, self.pad_id, np.int64)
        tokens[: stop - start] = self.stream.tokens[start:stop]
        loss_mask = np.zeros(self.seq_length, np.float32)
        mask = self.stream.loss_mask
        loss_mask[: stop - start - 1] = 1.0 if mask is None else mask[start + 1 : stop]
        return tokens, loss_mask

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Return the windows of training samples start .. start + count - 1, int64 [count]."""
        return sample_order(len(self), seed, start, count)


@dataclass(frozen=True)
class JoinedWindows:
    """The windows of several datasets, one dataset after the other. No window spans two datasets."""

    parts: list[PackedDataset]

    @property
    def seq_length(self) -> int:
        return self.parts[0].seq_length

    @property
    def pad_id(self) -> int:
        return self.parts[0].pad_id

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parts' fingerprints."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return window `index` (see `Windows.window`)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ends = list(accumulate(map(len, self.parts)))
        part = bisect.bisect_right(ends, index)
        return self.parts[part].window(index - (ends[part - 1] if part else 0))

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Return the windows of training samples start .. start + count - 1, int64 [count]."""
        return sample_order(len(self), seed, start, count)


def sample_order(num_windows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return the windows of samples start .. start + count - 1 of an endless sequence, int64 [count].

    Sample n belongs to epoch n // num_windows. Each epoch is a permutation of all windows, drawn from (seed, epoch).
    """
    samples = np.arange(start, start + count)
    order = np.empty(count, np.int64)
    for epoch in np.unique(samples // num_windows):
        inside = samples // num_windows == epoch
        order[inside] = _permutation(num_windows, seed, int(epoch))[samples[inside] % num_windows]
    return order


@lru_cache(maxsize=2)  # used at every iteration; a batch may span two epochs
def _permutation(num_windows: int, seed: int, stream: int) -> np.ndarray:
    # numpy promises never to change RandomState's numbers (NEP 19), so a run may resume under a newer version.
    return np.random.RandomState([seed, stream]).permutation(num_windows)


def calibration_ids(num_windows: int, count: int, seed: int, skip: int = 0) -> list[int]:
    """Return `count` windows for calibration, in ascending order, chosen by the seed alone.

    Args:
        skip: windows that another call chose; the result has none of them.

    Raises:
        UsageError: there are fewer than skip + count windows.
    """
    if skip + count > num_windows:
        raise UsageError(
            f"--calibration-samples {skip + count} is more than the {num_windows} windows of --train-data: "
            "lower it, give more data or a smaller --seq-length"
        )
    return sorted(int(i) for i in _permutation(num_windows, seed, CALIBRATION_STREAM)[skip : skip + count])
