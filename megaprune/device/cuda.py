"""CUDA with NCCL: Megatron-Core's home. Nothing needs patching."""

from collections.abc import Callable

import torch

NAME = "cuda"
BACKEND = "nccl"


def prepare_megatron() -> None:
    """Megatron-Core runs on CUDA as it is."""


def bind_local_device(local_rank: int) -> None:
    """Makes ``cuda:local_rank`` this process's device."""
    torch.cuda.set_device(local_rank)


def synchronize() -> None:
    """Waits for the work that was queued."""
    torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """The largest number of bytes that tensors have held in this process."""
    return torch.cuda.max_memory_allocated()


def peak_memory_of(run: Callable[[], object]) -> int | None:
    """Runs it, and returns the bytes that tensors held at most, beyond those held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
