"""CLP's differentiable concave gate, which finds a contiguous segment to remove. Re-derived: the text that this follows
contains no equations.
"""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.segments import segments
from megaprune.selection.selector import check_gradient
from megaprune.utils.errors import MegapruneError


def notch(num_layers: int, start: Tensor, length: int, temperature: float) -> Tensor:
    """Return the gates [num_layers], near 0 on `length` layers from `start` (a scalar, not always whole) on, near 1
    elsewhere: g_l = 1 - sigmoid((l - a + 1/2) / t) * sigmoid((a + n - 1/2 - l) / t). Differentiable in `start`.
    """
    layers = torch.arange(num_layers, dtype=start.dtype)
    behind = torch.sigmoid((layers - start + 0.5) / temperature)
    before = torch.sigmoid((start + length - 0.5 - layers) / temperature)
    return 1 - behind * before


class ConcaveGate:
    """Selector that learns the start of a segment of fixed length, by the gradient of a soft gate.

    The temperature decreases linearly from `temperature` to `final_temperature`. The gate has a gradient only near its
    edges. The search therefore starts at several positions, one after the other, and gives each an equal share of the
    steps. `kept_sets` are the results, from which the caller chooses. The gates of protected layers stay 1.

    Raises:
        UsageError: the budget does not fit.
        MegapruneError: the budget does not count layers, or no segment is free of protected layers.
    """

    def __init__(
        self,
        budget: Budget,
        protected: Set[int],
        num_steps: int,
        lr: float = 0.25,
        temperature: float = 2.0,
        final_temperature: float = 0.25,
        begins: int = 3,
    ) -> None:
        budget.check(protected)
        if not budget.counts_layers:
            raise MegapruneError("a segment of fixed length needs a number of layers, not of parameters")
        self.num_layers, self.budget = budget.num_layers, budget
        self._kept = segments(budget, protected)
        if not self._kept:
            raise MegapruneError("no contiguous segment between protected layers is long enough; protect fewer layers")
        self._length = budget.num_layers - budget.limit
        self._starts = [min(set(range(self.num_layers)) - set(kept)) for kept in self._kept]
        self._protected = sorted(protected)
        self._begins = max(1, min(begins, len(self._starts), num_steps))
        self._ends_at = [round(num_steps * (number + 1) / self._begins) for number in range(self._begins)]
        self._temperatures = temperature, final_temperature
        self._lr = lr
        self._ends: list[float] = []
        self._begin()

    @property
    def scores(self) -> Tensor:
        """Current gates, [num_layers] fp32; higher is kept."""
        return self.mask(self._step)

    @property
    def start(self) -> float:
        """Current first layer of the segment, not always whole."""
        return self._start.item()

    def temperature(self, step: int) -> float:
        """Return the temperature, which decreases linearly over the steps of each start."""
        first, last = self._temperatures
        number = sum(step >= end for end in self._ends_at[:-1])
        begun, end = self._begun_at(number), self._ends_at[number]
        return first + (last - first) * min(1.0, (step - begun) / max(1, end - begun - 1))

    def mask(self, step: int) -> Tensor:
        """Return this step's soft gates, [num_layers] fp32 on the CPU, detached."""
        return self._gates(step).detach()

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Move the start by the loss's gradient [num_layers] at `mask(step)`.

        Raises:
            MegapruneError: the gradient is not finite.
        """
        check_gradient(mask_grad, step)
        self._optimizer.zero_grad()
        with torch.enable_grad():
            self._gates(step).backward(mask_grad.detach().to("cpu", torch.float32))
        self._optimizer.step()
        with torch.no_grad():
            self._start.clamp_(min(self._starts), max(self._starts))
        self._step = step + 1
        if self._step == self._ends_at[len(self._ends)]:
            self._ends.append(self._start.item())
            if len(self._ends) < self._begins:
                self._begin()

    def kept_sets(self) -> list[list[int]]:
        """Return the kept layers for the final segment of each start, rounded to whole layers, and for the segments one
        layer before and after it. Each set occurs once; final segments come first.
        """
        ends = self._ends or [self._start.item()]
        nearest = [min(range(len(self._starts)), key=lambda i: abs(self._starts[i] - end)) for end in ends]
        beside = [i + step for i in nearest for step in (-1, 1) if 0 <= i + step < len(self._starts)]
        return [self._kept[i] for i in dict.fromkeys(nearest + beside)]

    def kept_layers(self) -> list[int]:
        """Return the kept layers for the final segment of the first start."""
        return self.kept_sets()[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resuming needs."""
        return {
            "start": self._start.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "ends": list(self._ends),
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        with torch.no_grad():
            self._start.copy_(state["start"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._ends, self._step = list(state["ends"]), state["step"]

    def _begin(self) -> None:
        low, high = min(self._starts), max(self._starts)
        place = low + (high - low) * (len(self._ends) + 0.5) / self._begins
        self._start = torch.tensor(place, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._start], lr=self._lr)
        self._step = self._begun_at(len(self._ends))

    def _begun_at(self, number: int) -> int:
        return self._ends_at[number - 1] if number else 0

    def _gates(self, step: int) -> Tensor:
        gates = notch(self.num_layers, self._start, self._length, self.temperature(step))
        keep = torch.zeros(self.num_layers).index_fill(0, torch.tensor(self._protected, dtype=torch.long), 1.0)
        return gates + keep * (1 - gates)
