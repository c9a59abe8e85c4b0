"""One import decides where the run lives: CUDA with NCCL where there is a GPU, otherwise the CPU with gloo.

Nothing else in the project asks which device it is on.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megaprune.utils.errors import UsageError

if torch.cuda.is_available():
    from megaprune.device.cuda import (
        BACKEND,
        NAME,
        bind_local_device,
        peak_memory_bytes,
        peak_memory_of,
        prepare_megatron,
        synchronize,
    )
else:
    from megaprune.device.cpu import (
        BACKEND,
        NAME,
        bind_local_device,
        peak_memory_bytes,
        peak_memory_of,
        prepare_megatron,
        synchronize,
    )

__all__ = [
    "BACKEND",
    "NAME",
    "bind_local_device",
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
    """The device on which this process keeps its tensors."""
    return _device


@contextmanager
def on_meta() -> Iterator[None]:
    """Within the block tensors have shapes and no memory: all new ones, the core's too, are on torch's meta device."""
    global _device
    device, current_device = _device, torch.cuda.current_device
    meta = _device = torch.device("meta")
    torch.cuda.current_device = lambda: meta
    try:
        with meta:
            yield
    finally:
        _device, torch.cuda.current_device = device, current_device


def use_transformer_engine(transformer_impl: str) -> bool:
    """Resolves ``--transformer-impl``: Transformer Engine where it is importable beside a GPU, else local.

    Raises:
        UsageError: ``transformer_engine`` was asked for where it can't run.
    """
    available = NAME == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" and not available:
        raise UsageError(
            "--transformer-impl transformer_engine needs a GPU and the package transformer-engine, which are not "
            "both here; install megaprune[te], or use --transformer-impl local"
        )
    return available and transformer_impl != "local"
