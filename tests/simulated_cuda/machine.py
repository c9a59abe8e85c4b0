"""A CUDA machine that is not there: tensors on cuda:N are FakeTensors, those on the CPU are real.

Import it first in a process that preloads what `device_guard.build` made. It counts what a GPU would wait for: copies
from the device to the host, and operations whose result has a size that depends on values. It also records tensors on
the CPU in collectives. An operation on tensors of two devices fails, as on a GPU.

A copy from the device holds ones, or what `Machine.values` gives for its shape.
"""

import contextlib
import os
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

LOCAL_RANK = 3
_ROOT = f"{Path(__file__).parents[2]}/"
_aten = torch.ops.aten
# Results whose size depends on values.
_SIZED_BY_VALUES = (
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
_READING = (_aten._local_scalar_dense.default, _aten.is_nonzero.default)


def _is_on_device(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"


def _places() -> str:
    """Return the innermost lines of the project and of the core that led here."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename.rpartition("site-packages/")[2].removeprefix(_ROOT)
        if name.startswith(("megaprune/", "megatron/core/", "transformers/")):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def _fills(func: Any, args: Any) -> bool:
    """Return whether an assignment to a mask fills in a number of the host, for which torch needs no indices."""
    return func is not _aten.index.Tensor and args[2].numel() == 1 and args[2].device.type == "cpu"


class Machine(TorchDispatchMode):
    """The dispatch mode in which everything runs, and what it has seen since `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.syncs: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.cpu_in_collectives: Counter[str] = Counter()
        # Integers that stand for numbers of tokens, by shape; and the number of elements that a mask selects.
        self.values: dict[tuple[int, ...], int] = {}
        self.selected: Callable[[], int] = lambda: 1

    def clear(self) -> None:
        """Forget what was seen."""
        for counter in (self.syncs, self.collectives, self.cpu_in_collectives):
            counter.clear()

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a real tensor of the same shape and dtype."""
        value = 1
        if tensor.dtype in (torch.int32, torch.int64):
            value = self.values.get(tuple(tensor.shape), 1)
        with _disable_current_modes():
            return torch.full(tuple(tensor.shape), value, dtype=tensor.dtype)

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in pytree.arg_tree_leaves(*args, **kwargs) if each is not None]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        on_device = any(_is_on_device(tensor) for tensor in tensors)
        if str(func).startswith("c10d."):
            return self._collective(func, tensors, args, kwargs)
        target = next((each for each in given if isinstance(each, torch.device)), None)
        if on_device:
            found = self._waiting(func, tensors, target, args, kwargs)
            if found is not NotImplemented:
                return found
        if target is not None and target.type == "cuda" and func is _aten._to_copy.default and not on_device:
            with self.fake:
                return func(self.fake.from_tensor(tensors[0], static_shapes=True), *args[1:], **kwargs)
        if not on_device and not (target is not None and target.type == "cuda"):
            return func(*args, **kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        return pytree.tree_map_only(FakeTensor, lambda each: self._settled(each, tensors), result)

    def _settled(self, result: FakeTensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return a result; one on the CPU is made real."""
        if result.device.type == "cuda" or any(result is tensor for tensor in tensors):
            return result
        return self.host_copy(result)

    def _collective(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        name = str(func).split(".")[1]
        self.collectives[name] += 1
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.cpu_in_collectives[f"{name} at {_places()}"] += 1
        with self.fake if any(isinstance(tensor, FakeTensor) for tensor in tensors) else contextlib.nullcontext():
            return func(*args, **kwargs)

    def _waiting(self, func: Any, tensors: list[torch.Tensor], target: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation that waits for the device; NotImplemented if it is none."""
        if func in _READING:
            self._sync("item")
            dtype = tensors[0].dtype
            return 1.0 if dtype.is_floating_point else dtype == torch.bool or 1
        if func is _aten.equal.default:
            self._sync("equal")
            return True
        if func in _SIZED_BY_VALUES:
            self._sync(str(func))
            nonzero = func is _aten.nonzero.default
            shape = (1, tensors[0].dim()) if nonzero else (self.selected(),)
            with self.fake:
                return torch.empty(shape, dtype=torch.int64 if nonzero else tensors[0].dtype, device=tensors[0].device)
        if func in _INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1]):
            if _fills(func, args):
                return args[0] if func is _aten.index_put_.default else args[0].clone()
            self._sync("mask as index")
            if func is not _aten.index.Tensor:
                return args[0]
            with self.fake:
                return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if func is _aten._to_copy.default and target is not None and target.type == "cpu":
            if not kwargs.get("non_blocking"):  # else an event says when the copy has arrived
                self._sync("copy to the host")
            with self.fake:
                return self.host_copy(func(*args, **kwargs))
        if func is _aten.copy_.default and not isinstance(tensors[0], FakeTensor):
            self._sync("copy to the host")
            with _disable_current_modes():
                return tensors[0].fill_(1)
        return NotImplemented

    def _sync(self, kind: str) -> None:
        self.syncs[f"{kind} at {_places()}"] += 1


MACHINE = Machine()


class _Stream:
    """Substitute for a stream; waiting for it is counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def synchronize(self) -> None:
        MACHINE.syncs[f"stream at {_places()}"] += 1


class _Event:
    """Substitute for an event; waiting for it is counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        MACHINE.syncs[f"event at {_places()}"] += 1


def _synchronize(*args: Any) -> None:
    MACHINE.syncs[f"synchronize at {_places()}"] += 1


def _replace_cuda() -> None:
    """Answer for the device what torch.cuda asks of a driver."""
    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.current_device, cuda.device_count = lambda: LOCAL_RANK, lambda: 8
    cuda.synchronize = _synchronize
    for name in ("set_device", "_lazy_init", "empty_cache", "reset_peak_memory_stats", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx = types.SimpleNamespace(range_push=lambda *args: None, range_pop=lambda *args: None)
    cuda.get_device_capability = lambda *args: (9, 0)
    properties = dict(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="simulated")
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(**properties)
    tensor_class: Any = torch.Tensor
    tensor_class.record_stream = lambda self, *args: None
    torch.nn.Module._apply = _apply


def _apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Replace parameters and buffers where torch's own method would swap their storage."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = function(parameter)
        if moved is not parameter and (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
            replaced = torch.nn.Parameter(moved, parameter.requires_grad)
            replaced.__dict__.update(parameter.__dict__)
            self._parameters[name] = replaced
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _replace_collectives_of_objects() -> None:
    """Answer collectives of Python objects as if every rank had the same."""

    def gather(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    api: Any = dist
    api.all_gather_object = gather
    api.broadcast_object_list = lambda box, src=None, group=None, device=None, **kwargs: None
    api.gather_object = lambda value, found=None, *args, **kwargs: found is not None and gather(found, value)
    api.barrier = api.monitored_barrier = lambda *args, **kwargs: None


def install() -> None:
    """Make the machine the one of this process. Precedes the first import of the project and of the core."""
    os.environ |= {"TORCH_COMPILE_DISABLE": "1", "LOCAL_RANK": str(LOCAL_RANK)}
    torch._C._set_only_lift_cpu_tensors(True)
    _replace_cuda()
    _replace_collectives_of_objects()


def patch_core() -> None:
    """Replace what the core does with generators and communicators of a real device."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.tensor_parallel.random as random

    states = {
        "set": lambda *args, **kwargs: None,
        "get": lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8),
    }
    for verb, function in states.items():
        setattr(random, f"_{verb}_cuda_rng_state", function)
        setattr(torch.cuda, f"{verb}_rng_state", function)
        setattr(torch.cuda.random, f"{verb}_rng_state", function)
    handle = types.SimpleNamespace(wait=lambda: None)
    buffers._coalescing_manager = lambda *args, **kwargs: contextlib.nullcontext(handle)
