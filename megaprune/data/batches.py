"""Batches: which windows each data-parallel rank reads at each iteration.

The order of windows depends only on the seed, and the position in it only on the iteration. A resumed run therefore
needs no saved state, and every parallel layout trains on the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaprune.data.datasets import Windows
from megaprune.utils.errors import UsageError

PADDING_ID = -1  # the sample id of a row that only fills a batch


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        tokens: int64 [b, s], as labels and position_ids.
        loss_mask: float32 [b, s].
        sample_ids: the window in each row; PADDING_ID for rows that only fill the batch and carry no loss.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: list[int]


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
    """Return the micro-batches of data-parallel rank `dp_rank` at `iteration`, counted from 0.

    The global batch is the same set of windows at every layout. Micro-batch m of rank r holds `micro_batch_size`
    samples of it, from (m * dp_size + r) * micro_batch_size on.

    Raises:
        UsageError: the global batch size is not a multiple of micro_batch_size * dp_size.
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
    """Return the numbers of the windows in each micro-batch of `train_batches`.

    Raises:
        UsageError: the global batch size is not a multiple of micro_batch_size * dp_size.
    """
    per_step = micro_batch_size * dp_size
    if global_batch_size % per_step:
        raise UsageError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} times the data-parallel size {dp_size}: change one of them"
        )
    ids = dataset.train_order(seed, iteration * global_batch_size, global_batch_size)
    return ids.reshape(-1, dp_size, micro_batch_size)[:, dp_rank].tolist()


def eval_batches(
    dataset: Windows, *, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of all windows in order, or of the first `limit` (see `batches_for`)."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return batches_for(dataset, range(count), micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)


def batches_for(
    dataset: Windows, ids: Sequence[int], *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of the windows `ids` in order; rank m % dp_size gets micro-batch m.

    All ranks get the same number of micro-batches of the same size, because expert-parallel collectives need every
    rank each time. Rows that carry no loss fill the last ones.
    """
    per_step = micro_batch_size * dp_size
    for start in range(dp_rank * micro_batch_size, -(-len(ids) // per_step) * per_step, per_step):
        chosen = list(ids[start : start + micro_batch_size])
        yield _batch(dataset, chosen + [PADDING_ID] * (micro_batch_size - len(chosen)))


def even_size(count: int, most: int, dp_size: int) -> int:
    """Return the smallest micro-batch size with which `count` windows take no more micro-batches than with `most`, so
    that `batches_for` fills up as few rows as possible.
    """
    steps = max(1, -(-count // (most * dp_size)))
    return max(1, -(-count // (steps * dp_size)))


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
