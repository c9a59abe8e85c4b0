"""Training data: packed windows over one token stream, and which of them each rank sees at each iteration.

Documents are laid end to end and cut into windows of `seq_length` tokens, without regard to where documents
end. The order depends on the seed alone and the position on the iteration alone: nothing needs saving to
resume, and every parallel layout trains on the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaprune.data.datasets import Windows
from megaprune.utils.errors import UsageError

PADDING_ID = -1  # the sample id of a row that only fills up a batch


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]; sample_ids: the
    windows it holds, PADDING_ID for rows that only fill it up and carry no loss."""

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
