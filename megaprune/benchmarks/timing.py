"""Measuring: cases interleaved in one process, and the bytes that a forward pass keeps."""

import math
import statistics
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaprune.report.run_report import versions

T = TypeVar("T")
# The settings, the environment and the measured cases of a benchmark, for JSON.
Result = dict[str, Any]


def environment(device_name: str, processes: int) -> dict[str, Any]:
    """Return the device, processes, threads and versions behind a result."""
    return {
        "device": device_name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def interleaved(cases: Mapping[str, Callable[[], T]], repeats: int, warmup: int) -> dict[str, list[T]]:
    """Run every case once a round, and return the results of each in the rounds after the warm-up, in order.

    Background load thus affects every case equally. The order rotates, so that no case always follows the same one.
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
    """Return the median over rounds of a case's sample divided by the baseline's sample of the same round.

    On a busy machine it varies less than the ratio of the medians, because load affects both samples of a round.
    """
    return statistics.median(a / b for a, b in zip(samples, baseline, strict=True))


@dataclass(frozen=True)
class Interval:
    """Bounds of a median, and the probability with which bounds made like this contain it."""

    low: float
    high: float
    confidence: float


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the narrowest pair of samples, equally far from both ends in order, that bounds the median of the
    distribution with this confidence; all samples if there are too few. It assumes nothing of the distribution.
    """
    ordered, number = sorted(samples), len(samples)
    # The median is below the k-th smallest sample with the probability of fewer than k heads in `number` coin tosses.
    outside, cut = 0.5**number, 0
    while cut + 1 < number / 2:
        more = outside + math.comb(number, cut + 1) * 0.5**number
        if 1 - 2 * more < confidence:
            break
        outside, cut = more, cut + 1
    return Interval(ordered[cut], ordered[-1 - cut], max(0.0, 1 - 2 * outside))


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """A block that counts the bytes that autograd holds for the backward pass; ``peak`` is the maximum.

    Tensors that share a storage count once. Nothing but the graph is counted, and it works on any device.

    Args:
        not_counted: tensors that exist anyway, such as parameters.
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
    """A saved tensor in an object that a finalizer can watch."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Any:
        return self.tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
