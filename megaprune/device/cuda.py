"""Device functions for CUDA with NCCL. Megatron-Core needs no patches here."""

from collections.abc import Callable

import torch

from megaprune.utils.errors import UsageError

NAME = "cuda"
BACKEND = "nccl"


def prepare_megatron() -> None:
    """Do nothing: Megatron-Core runs on CUDA without patches."""


def model_name() -> str:
    """Return the name of the GPU model."""
    return torch.cuda.get_device_name()


def bind_local_device(local_rank: int) -> torch.device | None:
    """Make ``cuda:local_rank`` the device of this process, and return it: NCCL then connects when the group is made.

    Raises:
        UsageError: this process sees no such GPU.
    """
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise UsageError(
            f"LOCAL_RANK {local_rank} has no GPU: this process sees {visible}; start as many processes on a node as "
            "it has GPUs, and hide none of them (CUDA_VISIBLE_DEVICES, srun --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device(NAME, local_rank)


class Stopwatch:
    """Time of the GPU's work between `start` and `stop`. The host does not wait for it."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a span."""
        self._spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._spans[-1][0].record()

    def stop(self) -> None:
        """End the span."""
        self._spans[-1][1].record()

    def take(self) -> float:
        """Return the seconds since the last call. The GPU must have done the work: no call waits for it."""
        spans, self._spans = self._spans, []
        return sum(begun.elapsed_time(ended) for begun, ended in spans) / 1000


def empty_cache() -> None:
    """Give the memory that the allocator caches back to the device, where NCCL can use it, too."""
    torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for all queued work of the device."""
    torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the peak number of bytes allocated by tensors of this process."""
    return torch.cuda.max_memory_allocated()


def peak_memory_of(run: Callable[[], object]) -> int | None:
    """Call `run` and return its peak of bytes allocated by tensors, minus those allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
