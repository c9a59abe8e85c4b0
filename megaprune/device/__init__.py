"""Device of the run: CUDA with NCCL if there is a GPU, otherwise the CPU with gloo.

The choice is made on import. No other package depends on the kind of device.
"""

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megaprune.device.peak import bf16_tflops
from megaprune.utils.errors import UsageError

if torch.cuda.is_available():
    from megaprune.device.cuda import (
        BACKEND,
        NAME,
        Stopwatch,
        bind_local_device,
        empty_cache,
        model_name,
        peak_memory_bytes,
        peak_memory_of,
        prepare_megatron,
        synchronize,
    )
else:
    from megaprune.device.cpu import (  # type: ignore[assignment]  # the same interface
        BACKEND,
        NAME,
        Stopwatch,
        bind_local_device,
        empty_cache,
        model_name,
        peak_memory_bytes,
        peak_memory_of,
        prepare_megatron,
        synchronize,
    )

__all__ = [
    "BACKEND",
    "NAME",
    "Stopwatch",
    "bf16_tflops",
    "bind_local_device",
    "free_unused",
    "model_name",
    "on_meta",
    "peak_memory_bytes",
    "peak_memory_of",
    "prepare_megatron",
    "synchronize",
    "torch_device",
    "use_transformer_engine",
]


_device = torch.device(NAME)


def torch_device() -> torch.device:
    """Return the device of this process's tensors."""
    return _device


def free_unused() -> None:
    """Free objects that only refer to each other, and give the memory that the allocator caches back to the device.

    Call it before a model is built and where one is no longer needed. A model's modules, the core's wrappers and
    optimizers are such objects, and blocks that are cached in the sizes of one model may not fit those of the next.
    """
    gc.collect()
    empty_cache()


@contextmanager
def on_meta() -> Iterator[None]:
    """Create all new tensors within the block, including the core's, on the meta device: with shapes but no memory."""
    global _device
    cuda: Any = torch.cuda
    device, current_device = _device, cuda.current_device
    meta = _device = torch.device("meta")
    cuda.current_device = lambda: meta
    try:
        with meta:
            yield
    finally:
        _device, cuda.current_device = device, current_device


def use_transformer_engine(transformer_impl: str) -> bool:
    """Return whether to use Transformer Engine, given ``--transformer-impl``.

    Args:
        transformer_impl: ``auto`` (Transformer Engine if it is installed and there is a GPU), ``transformer_engine`` or
            ``local``.

    Raises:
        UsageError: ``transformer_engine`` was requested, but cannot run here.
    """
    available = NAME == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" and not available:
        raise UsageError(
            "--transformer-impl transformer_engine needs a GPU and the package transformer-engine, and one of them is "
            "missing; install megaprune[te], or use --transformer-impl local"
        )
    return available and transformer_impl != "local"
