"""Cases that fail, each in its own way, between cases that pass."""

import os
from pathlib import Path

import torch
import torch.distributed as dist


def add(out: str) -> None:
    """Sum the ranks, and write the sum on rank 0."""
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        Path(out).write_text(str(int(total)))


def fail_together(why: str) -> None:
    """Fail on every rank, after a collective step."""
    dist.barrier()
    raise ValueError(why)


def fail_alone(why: str) -> None:
    """Fail on rank 1 while the others wait for it."""
    if dist.get_rank() == 1:
        raise ValueError(why)
    dist.barrier()


def fail_after_the_others(why: str) -> None:
    """Fail on rank 1 when no rank waits for it."""
    if dist.get_rank() == 1:
        raise ValueError(why)


def die() -> None:
    """End rank 1 without an exception."""
    if dist.get_rank() == 1:
        print("the last words of rank 1", flush=True)
        os._exit(3)
    dist.barrier()
