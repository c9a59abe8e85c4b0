"""How the benchmarks measure: cases interleaved in one process, and the bytes that a forward pass keeps."""

import statistics
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def interleaved(cases: Mapping[str, Callable[[], T]], repeats: int, warmup: int) -> dict[str, list[T]]:
    """Runs every case once a round, and returns what each gave in the rounds after the warm-up, in order.

    What disturbs the machine thus meets all cases alike. The order rotates, so that none always follows the same one.
    """
    names = list(cases)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            sample = cases[name]()
            if number >= warmup:
                samples[name].append(sample)
    return samples


def median_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of a case's sample by the baseline's of the same round.

    Steadier than the ratio of the medians where the machine is not quiet: both samples of a round saw the same.
    """
    return statistics.median(a / b for a, b in zip(samples, baseline, strict=True))


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes that autograd holds for the backward pass; ``peak`` is the most at once.

    Tensors that share a storage count once. Like an allocator's counter, and unlike the process's size, this sees what
    the graph holds and nothing else; unlike it, it works on any device.

    Args:
        not_counted: tensors that live anyway, such as parameters.
    """

    def __init__(self, not_counted: Iterable[Tensor] = ()) -> None:
        self.held = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._ignored = {_address(tensor) for tensor in not_counted}
        super().__init__(self._pack, _Saved.unpack)

    def _pack(self, tensor: Tensor) -> "_Saved":
        saved, address, size = _Saved(tensor), _address(tensor), tensor.untyped_storage().nbytes()
        if address not in self._ignored:
            if not self._holders[address]:
                self.held += size
                self.peak = max(self.peak, self.held)
            self._holders[address] += 1
            # The graph drops what it saved once it is used, and with it this object.
            weakref.finalize(saved, self._release, address, size)
        return saved

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.held -= size


class _Saved:
    """A saved tensor, in an object whose end can be seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Any:
        return self.tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
