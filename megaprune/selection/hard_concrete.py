"""Sheared-LLaMA's search (Xia et al., 2024), for layers only: hard concrete gates under a Lagrangian constraint."""

import math
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import uniform_noise
from megaprune.selection.one_shot import top_layers
from megaprune.selection.selector import check_gradient, check_same_search

# Louizos et al. (2018): the concrete's temperature, and how far it is stretched beyond 0 and 1.
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
_START = 5.0
# Of log alpha, from open to closed; a search too short for it at the least learning rate closes no gate, and what it
# ranks is noise. Much higher rates overshoot: all gates close at once and none learns any more.
_WAY, _LEAST_LR = 10.0, 0.1


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return gates in [0, 1]: sigmoid((log u - log(1 - u) + log alpha) / beta), stretched and clipped."""
    noise = uniform.log() - (1 - uniform).log()
    return (torch.sigmoid((noise + log_alpha) / BETA) * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_open(log_alpha: Tensor) -> Tensor:
    """Return the probability that a gate is not 0, for each gate."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def never_all_open(gates: Tensor) -> Tensor:
    """Return the gates with the lowest ones closed further, until they are closed by at least one layer in total
    (ours).

    A search begins with open gates. A step with all of them open would distill the model from itself: its gradient is
    rounding noise, which Adam scales up to full steps.
    """
    if not len(gates):
        return gates
    missing = (1 - (1 - gates.detach()).sum()).clamp(min=0)
    lowest = torch.nn.functional.one_hot(gates.detach().argmin(), len(gates))
    return (gates - missing * lowest).clamp(min=0)


class HardConcrete:
    """Selector that learns log alpha of each layer's gate; gates are soft in the forward pass.

    Loss = the model's + l1 (s - t) + l2 (s - t)^2. s is the expected removed share of the total cost. t is its target,
    which increases linearly over the first `ramp` of the steps. l1 and l2 are multipliers that ascend. At the end, the
    layers with the highest log alpha stay. The gates of protected layers are 1. By default, both learning rates follow
    from `num_steps`, such that log alpha can change by about 10.

    Raises:
        UsageError: the budget does not fit.
    """

    def __init__(
        self,
        budget: Budget,
        protected: Set[int],
        num_steps: int,
        lr: float | None = None,
        lagrangian_lr: float | None = None,
        ramp: float = 0.2,
        seed: int = 0,
    ) -> None:
        budget.check(protected)
        self.num_layers, self.budget = budget.num_layers, budget
        self._protected = frozenset(protected)
        self._free = torch.tensor([i for i in range(budget.num_layers) if i not in protected], dtype=torch.long)
        self._num_steps, self._ramp_steps, self._seed = num_steps, max(1, round(ramp * num_steps)), seed
        costs = torch.tensor(budget.costs, dtype=torch.float64)
        self._shares = (costs[self._free] / costs.sum()).float()
        self._target = 1 - budget.limit / sum(budget.costs)
        enough = max(_LEAST_LR, _WAY / num_steps)
        self._log_alpha = torch.full((len(self._free),), _START, requires_grad=True)
        self._multipliers = torch.zeros(2, requires_grad=True)
        self._optimizers = (
            torch.optim.Adam([self._log_alpha], lr=lr or enough),
            torch.optim.Adam([self._multipliers], lr=lagrangian_lr or enough, maximize=True),
        )

    @property
    def scores(self) -> Tensor:
        """Log alpha, [num_layers] fp32 on the CPU, detached; protected layers have the highest."""
        best = self._log_alpha.detach().max() if len(self._free) else torch.tensor(_START)
        return best.repeat(self.num_layers).index_copy(0, self._free, self._log_alpha.detach())

    def temperature(self, step: int) -> float:
        """Return the temperature of the concrete distribution, which is constant."""
        return BETA

    def target(self, step: int) -> float:
        """Return the target of the removed share of the cost at a step."""
        return self._target * min(1.0, (step + 1) / self._ramp_steps)

    def mask(self, step: int) -> Tensor:
        """Return this step's gates, [num_layers] fp32 on the CPU, detached."""
        return self._draw(step).detach()

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Take one step of descent on log alpha and of ascent on the multipliers.

        Raises:
            MegapruneError: the gradient is not finite.
        """
        check_gradient(mask_grad, step)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        with torch.enable_grad():
            gone = (self._shares * (1 - expected_open(self._log_alpha))).sum()
            excess = gone - self.target(step)
            constraint = self._multipliers[0] * excess + self._multipliers[1] * excess**2
            gates = self._draw(step)
            (gates @ mask_grad.detach().to("cpu", torch.float32) + constraint).backward()
        for optimizer in self._optimizers:
            optimizer.step()

    def kept_layers(self) -> list[int]:
        """Return the protected layers and the best of the others, within the budget."""
        return top_layers(self.scores, self.budget, self._protected)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to continue the same trajectory bit for bit."""
        return {
            "log_alpha": self._log_alpha.detach().clone(),
            "multipliers": self._multipliers.detach().clone(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            MegapruneError: the saved search had other settings.
        """
        check_same_search(state["settings"], self._settings())
        with torch.no_grad():
            self._log_alpha.copy_(state["log_alpha"])
            self._multipliers.copy_(state["multipliers"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _draw(self, step: int) -> Tensor:
        uniform = uniform_noise(self.num_layers, self._seed, step)[self._free]
        gates = never_all_open(hard_concrete(self._log_alpha, uniform))
        return torch.ones(self.num_layers).index_copy(0, self._free, gates)

    def _settings(self) -> dict[str, Any]:
        return {
            "costs": list(self.budget.costs),
            "limit": self.budget.limit,
            "protected": sorted(self._protected),
            "num_steps": self._num_steps,
            "ramp_steps": self._ramp_steps,
            "seed": self._seed,
            "lr": self._optimizers[0].param_groups[0]["lr"],
        }
