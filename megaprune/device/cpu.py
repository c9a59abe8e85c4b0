"""Device functions for the CPU with gloo, and the patches that let Megatron-Core 0.16.1 run on it.

The core assumes CUDA in four ways: it names the device, it uses CUDA streams and events, it keeps CUDA RNG states, and
it compares dtypes by the names of CUDA tensor types. The patches map each of them to its CPU counterpart, as the
``transfer_to_npu`` modules of other hardware vendors do. This module is imported only if CUDA is not available.
"""

import contextlib
import functools
import os
import resource
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

NAME = "cpu"
BACKEND = "gloo"

_CPU = torch.device("cpu")
_FACTORIES = [
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like"),
]


def model_name() -> str:
    """Return the name of the device."""
    return NAME


def bind_local_device(local_rank: int) -> torch.device | None:
    """Return None: all processes of a host share its CPU."""
    return None


class Stopwatch:
    """Time of the work between `start` and `stop`."""

    def __init__(self) -> None:
        self._begun, self._seconds = 0.0, 0.0

    def start(self) -> None:
        """Begin a span."""
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """End the span."""
        self._seconds += time.perf_counter() - self._begun

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def empty_cache() -> None:
    """Do nothing: the C library reuses freed memory of any size."""


def synchronize() -> None:
    """Do nothing: CPU operations are synchronous."""


def peak_memory_bytes() -> int:
    """Return the peak resident set size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_of(run: Callable[[], object]) -> int | None:
    """Call `run` and return None: the peak resident set size covers the whole process, not a single call."""
    run()
    return None


@functools.cache
def prepare_megatron() -> None:
    """Patch torch and Megatron-Core so that the core runs on the CPU. Must precede the first import of megatron."""
    # The core's `jit_fuser` is torch.compile, which needs a C++ compiler and costs more time than it saves here.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    _map_device_names()
    _map_streams_and_events()
    _map_rng_states()
    _map_tensor_types()
    _patch_core()


def _map_device_names() -> None:
    """Map CUDA devices to the CPU.

    0.16.1 passes ``torch.cuda.current_device()`` and ``device="cuda"`` to factories, and calls ``.cuda()``.
    """
    cuda: Any = torch.cuda
    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.set_device = lambda *args, **kwargs: None
    cuda.empty_cache = lambda *args, **kwargs: None
    cuda.memory_allocated = lambda *args, **kwargs: 0
    cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    tensor_class.cuda = lambda self, *args, **kwargs: self
    module_class.cuda = lambda self, *args, **kwargs: self
    # `with torch.device(...)` recognizes factories by identity. It must see the originals, which the wrappers call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_class.to = _on_cpu(torch.Tensor.to)


def _on_cpu(function: Any) -> Any:
    """Wrap a torch function so that a device named "cuda" means the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if any(isinstance(a, str) and a.startswith("cuda") for a in args):
            args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return function(*args, **kwargs)

    return wrapper


class _Stream:
    """Substitute for a CUDA stream; CPU operations are ordered and synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()


class _Event:
    """Substitute for a CUDA event that has always completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _map_streams_and_events() -> None:
    """Replace streams and events, by which schedules, dispatchers and DDP of 0.16.1 order their copies."""
    cuda: Any = torch.cuda
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = _Stream  # a class, because libraries use it in annotations
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Event = _Event
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx = types.SimpleNamespace(range_push=lambda *args: None, range_pop=lambda *args: None)
    tensor_class: Any = torch.Tensor
    tensor_class.record_stream = lambda self, *args: None


def _map_rng_states() -> None:
    """Use the CPU's generator where the RNG tracker of 0.16.1 uses CUDA generators."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state


def _map_tensor_types() -> None:
    """Return CUDA names from ``Tensor.type()``, which the optimizers of 0.16.1 compare with those of CUDA tensors."""
    for name in ("Float", "BFloat16", "Half", "Int", "Long", "Byte", "Bool", "Double"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, *args, **kwargs)

    tensor_class: Any = torch.Tensor
    tensor_class.type = cuda_type


def _patch_core() -> None:
    """Replace functions of the core that have no CPU path."""
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # 0.16.1 uses torch.cuda.default_generators, which is empty without CUDA.
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()

    # 0.16.1 scales gradients with the multi-tensor kernels of Transformer Engine or apex; its fallback asserts CUDA.
    optimizer.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm

    # The all-to-all dispatcher of 0.16.1 converts its split sizes to host values only if they were on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _clip_grad_by_total_norm(
    parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale gradients in place if their norm exceeds `max_norm`."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    coefficient = max_norm / (total_norm + 1.0e-6)
    grads = [p.grad for p in parameters if p.grad is not None]
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)
