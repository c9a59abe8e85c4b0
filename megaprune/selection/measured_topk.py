"""Gumbel-TopK mask search by measured values of layers: the default search of `--method e3`."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import gumbel_noise, removal_limit
from megaprune.selection.initial_scores import MIN_KL, check_finite
from megaprune.selection.one_shot import top_layers
from megaprune.selection.selector import check_gradient, check_same_search, check_settings
from megaprune.utils.errors import MegapruneError

# Gate of a probed layer. The change of the loss between a layer's removal and its return is the integral of the
# gate's gradient from 0 to 1. The midpoint rule is exact if the loss is quadratic in the gate, and has no variance of
# its own, unlike a gate at a random position.
PROBE = 0.5
# Layers probed in each window: a share of those that may go, and the most. With many at once, the other half-open gates
# distort each measurement.
_PROBED_SHARE, _MOST_PROBES = 1 / 3, 4
# Weight of the measurements before a step beside those of the step: the mask around a layer changes.
_MEMORY = 0.9
# Weight of a layer's initial KL, in windows.
_PRIOR_WINDOWS = 2.0
# Smallest value of a layer, relative to the mean value; measured values may be negative.
_SMALLEST_VALUE = 0.05


class MeasuredTopK:
    """Selector that measures how much each layer is worth beside the others that are kept (ours).

    The mask of a step is a Gumbel-TopK sample, as in E3-Pruner. The scores are not trained through its relaxation.
    In each window of the global batch, the gates of a few layers near the limit are half open. The gradient of such a
    gate estimates the change of the loss by the layer's removal. A layer's value is the mean of its measurements,
    in which older ones count less, and of its initial KL, scaled to their level. Scores are the standardized
    logarithms of the values, divided by the layers' costs.

    The noise is multiplied by the square of the temperature, which decreases linearly: the second half of the search
    measures layers beside those that will be kept.

    Args:
        kl: KL(original || model without the layer), [num_layers]; those of protected layers are ignored.
        ramp: share of the search, in (0, 1], over which the maximum cost of the kept layers decreases linearly to the
            budget's limit.

    Raises:
        UsageError: a setting is out of range.
        MegapruneError: an initial KL is not finite.
    """

    def __init__(
        self,
        kl: Tensor,
        budget: Budget,
        protected: Set[int],
        num_steps: int,
        temperature: float = 1.0,
        anneal: float = 0.9,
        seed: int = 0,
        ramp: float = 0.5,
    ) -> None:
        self.num_layers = len(kl)
        self.budget = budget
        budget.check(protected)
        check_settings(num_steps, temperature, anneal, ramp)
        self._protected = frozenset(protected)
        self._free = [layer for layer in range(self.num_layers) if layer not in protected]
        self.probes_per_window = max(2, min(_MOST_PROBES, int(_PROBED_SHARE * len(self._free))))
        self._prior = kl.detach().cpu().double().clamp_min(MIN_KL)
        check_finite(kl, self._free)
        self._prior[sorted(self._protected)] = 0.0
        self._num_steps, self._ramp = num_steps, ramp
        self._temperature, self._anneal, self._seed = temperature, anneal, seed
        self._sum = torch.zeros(self.num_layers, dtype=torch.float64)
        self._count = torch.zeros(self.num_layers, dtype=torch.float64)

    @property
    def values(self) -> Tensor:
        """Estimated increase of the loss by each layer's removal, [num_layers] fp64; 0 for protected layers."""
        if not self._count.any():
            return self._prior.clone()
        level = (self._sum.sum() / (self._count @ self._prior)).clamp_min(0.0)
        return (self._sum + _PRIOR_WINDOWS * level * self._prior) / (self._count + _PRIOR_WINDOWS)

    @property
    def scores(self) -> Tensor:
        """Scores, [num_layers] fp32 on the CPU; higher is kept. Protected layers have the highest score."""
        scores, free = torch.zeros(self.num_layers), self._free
        if not free:
            return scores
        per_cost = (self.values / torch.tensor(self.budget.costs, dtype=torch.float64))[free]
        floor = _SMALLEST_VALUE * per_cost.clamp_min(0.0).mean()
        logs = per_cost.clamp_min(floor.clamp_min(torch.finfo(torch.float64).tiny)).log()
        deviation = logs.std(correction=0)
        # Logarithms of equal values may differ by rounding, which must not be scaled up.
        scores[free] = ((logs - logs.mean()) / deviation if deviation > 1e-12 else torch.zeros_like(logs)).float()
        scores[sorted(self._protected)] = scores[free].max()
        return scores

    def limit_at(self, step: int) -> int:
        """Return the maximum cost of this step's mask; see `removal_limit`."""
        return removal_limit(self.budget, step, self._ramp * self._num_steps)

    def temperature(self, step: int) -> float:
        """Return the initial temperature times 1 - anneal * step / num_steps."""
        return self._temperature * (1 - self._anneal * step / self._num_steps)

    def mask(self, step: int) -> Tensor:
        """Return this step's sample, [num_layers] fp32 on the CPU, within `limit_at(step)`."""
        if not 0 <= step < self._num_steps:
            raise MegapruneError(f"step {step} is outside the search, whose steps are 0 to {self._num_steps - 1}")
        perturbed = self.scores + self.temperature(step) ** 2 * gumbel_noise(self.num_layers, self._seed, step)
        order = perturbed.sort(descending=True, stable=True).indices.tolist()
        limited = replace(self.budget, limit=self.limit_at(step))
        kept = limited.take(order, self._protected)
        return torch.zeros(self.num_layers).index_fill(0, torch.tensor(kept, dtype=torch.long), 1.0)

    def window_masks(self, step: int, count: int) -> Tensor:
        """Return the mask of each window of the step's global batch, [count, num_layers].

        They are `mask(step)`, except that a few gates are half open. These are the layers next to the limit by score
        and fresh noise: half of them among the removed layers if there are so many, the others among the kept ones.
        """
        mask = self.mask(step)
        masks = mask.repeat(count, 1)
        if self.budget.limit >= sum(self.budget.costs) or self.kept_layers() == sorted(self._protected):
            return masks  # nothing to choose
        scores = self.scores
        for window, row in enumerate(masks):
            perturbed = scores + gumbel_noise(self.num_layers, self._seed, step, window)
            order = [layer for layer in perturbed.argsort(descending=True).tolist() if layer not in self._protected]
            gone = [layer for layer in order if mask[layer] == 0][: self.probes_per_window // 2]
            kept = [layer for layer in order if mask[layer] == 1][::-1]
            row[[*gone, *kept[: self.probes_per_window - len(gone)]]] = PROBE
        return masks

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Add the measurements of a step.

        Args:
            mask_grad: [windows, num_layers], the gradient of the mean loss at `window_masks(step, windows)`.

        Raises:
            MegapruneError: the gradient is not finite.
        """
        check_gradient(mask_grad, step)
        count = len(mask_grad)
        probed = (self.window_masks(step, count) == PROBE).double()
        self._sum = _MEMORY * self._sum - (probed * mask_grad.double().cpu()).sum(0) * count
        self._count = _MEMORY * self._count + probed.sum(0)

    def kept_layers(self) -> list[int]:
        """Return the protected layers and the best of the others by score, without noise, ascending."""
        return top_layers(self.scores, self.budget, self._protected)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements, the initial KLs, and the settings that the trajectory depends on."""
        measured = {"sum": self._sum.clone(), "count": self._count.clone(), "prior": self._prior.clone()}
        return {**measured, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            MegapruneError: the saved search had other settings.
        """
        check_same_search(state["settings"], self._settings())
        self._sum, self._count, self._prior = (state[name].clone() for name in ("sum", "count", "prior"))

    def _settings(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "costs": list(self.budget.costs),
            "limit": self.budget.limit,
            "protected": sorted(self._protected),
            "num_steps": self._num_steps,
            "ramp": self._ramp,
            "temperature": self._temperature,
            "anneal": self._anneal,
            "seed": self._seed,
        }
