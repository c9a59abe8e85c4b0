"""One import decides where the run lives: CUDA with NCCL where there is a GPU, otherwise the CPU with gloo.

Nothing else in the project asks which device it is on.
"""

import importlib.util

import torch

from megaprune.errors import UsageError

if torch.cuda.is_available():
    from megaprune.device.cuda import BACKEND, NAME, bind_local_device, peak_memory_bytes, prepare_megatron, synchronize
else:
    from megaprune.device.cpu import BACKEND, NAME, bind_local_device, peak_memory_bytes, prepare_megatron, synchronize

__all__ = [
    "BACKEND",
    "NAME",
    "bind_local_device",
    "peak_memory_bytes",
    "prepare_megatron",
    "synchronize",
    "torch_device",
    "use_transformer_engine",
]


def torch_device() -> torch.device:
    """The device on which this process keeps its tensors."""
    return torch.device(NAME)


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
