"""Gumbel-TopK mask search of E3-Pruner, with the relaxation of Plötz and Roth (2018)."""

import hashlib
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.one_shot import top_layers
from megaprune.selection.selector import check_gradient, check_same_search, check_settings
from megaprune.utils.errors import MegapruneError, UsageError


def gumbel_topk_mask(
    scores: Tensor, limit: int, temperature: float, noise: Tensor, costs: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mask of the best layers by perturbed score, with the gradient of a soft top-k, and the soft mask.

    `scores` and `noise` are [n]; computed in fp32 (fp64 if given). With a = scores + noise, `limit` times:
    p = softmax(a / temperature), a <- a + log(1 - p); soft is the sum of the p. The logarithm is added
    before the division by the temperature; otherwise one item could be selected twice.

    With `costs`, [n], the limit is the maximum total cost of the ones (ours; by default, each costs 1). Each round
    spends
    p @ costs, and the last one counts in part, so that soft @ costs is the limit exactly. The mask takes items in the
    order of a, each one that still fits.

    Returns:
        (mask, soft), both [n]. The mask is 0 or 1 in the forward pass (ties keep the lower index) and soft in the
        backward
        pass (straight-through). If nothing fits or everything does, both are constants without a graph.
    """
    budget = Budget(tuple(costs or (1,) * len(scores)), limit)
    if not 0 <= limit <= sum(budget.costs):
        raise MegapruneError(f"a mask of {len(scores)} layers that cost {sum(budget.costs)} cannot cost {limit}")
    if temperature <= 0:
        raise UsageError(f"--gumbel-temperature: {temperature} is not positive")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    perturbed = scores.to(dtype) + noise.to(dtype)
    # The exact Gumbel-TopK sample. The top k of `soft` is another set where scores are close beside the temperature:
    # the better of two near-equal items is taken in part, lowered for it, and then passed over for the other.
    order = torch.sort(perturbed.detach(), descending=True, stable=True).indices.tolist()
    chosen = torch.tensor(budget.take(order), dtype=torch.long)
    hard = torch.zeros(len(scores), dtype=dtype).index_fill(0, chosen, 1.0)
    if len(chosen) in (0, len(scores)):
        return hard, hard.clone()

    largest = max(budget.costs)
    prices = torch.tensor(budget.costs, dtype=dtype) / largest
    room: Tensor | float = limit / largest
    soft = torch.zeros_like(perturbed)
    while True:
        share = torch.softmax(perturbed / temperature, dim=0)
        spent = share @ prices
        if spent >= room:
            soft = soft + share * (room / spent)
            break
        soft, room = soft + share, room - spent
        perturbed = perturbed + _log_complement(perturbed / temperature)

    # In this order the added term is exactly 0, and the mask exactly 0 or 1.
    return hard + (soft - soft.detach()), soft


def _log_complement(logits: Tensor) -> Tensor:
    """Return log(1 - softmax(logits)), [n] with n > 1, always finite.

    It is computed as the share of the other items. In fp32, 1 - p is 0 for an item that leads by 17, and a clamped
    logarithm would allow an item that leads by more than the clamp to be selected again.
    """
    n = len(logits)
    itself = torch.eye(n, dtype=torch.bool, device=logits.device)
    others = logits.expand(n, n).masked_fill(itself, -torch.inf).logsumexp(1)
    return others - logits.logsumexp(0)


def gumbel_noise(num_layers: int, seed: int, *draw: int) -> Tensor:
    """Return standard Gumbel noise, [num_layers] fp32, which depends on the arguments alone, not on earlier draws.

    Args:
        draw: numbers of the draw, such as the step.
    """
    return (-(-_uniform(num_layers, seed, *draw).log()).log()).float()


def uniform_noise(num_layers: int, seed: int, step: int) -> Tensor:
    """Return uniform noise within (0, 1), [num_layers] fp32, which depends on the arguments alone."""
    return _uniform(num_layers, seed, step).clamp(1e-6, 1 - 1e-6).float()


def _uniform(num_layers: int, seed: int, *draw: int) -> Tensor:
    # The CPU generator takes 32 bits of its seed, so the numbers have to be mixed into 32 bits.
    digest = hashlib.blake2b(":".join(map(str, (seed, *draw))).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    uniform = torch.rand(num_layers, dtype=torch.float64, generator=generator)
    return uniform.clamp_min(torch.finfo(torch.float64).tiny)


def removal_limit(budget: Budget, step: int, ramp_steps: float) -> int:
    """Return the maximum cost of a step's mask: less than all layers from step 0 on, the budget's limit after
    `ramp_steps`.

    The removed share is rounded up. A step with every layer would distill the model from itself: its gradient
    is rounding noise, which Adam scales up to a full step.
    """
    total, steps = sum(budget.costs), max(1, round(ramp_steps))
    return total - -(-(total - budget.limit) * min(step + 1, steps) // steps)


class GumbelTopK:
    """Selector that learns one score per layer and samples a Gumbel-TopK mask per step (E3-Pruner).

    `init_scores` is [num_layers] (see `scores_from_kl`). Over the `num_steps` of the search the temperature
    decreases linearly to `1 - anneal` of its start. Over the first `ramp` of them (a share, in (0, 1]) the maximum cost
    of the kept layers decreases linearly from the cost of all layers to the budget's limit. Layers in `protected` are
    always kept and take no part in the relaxation. `lr` is the learning rate of the scores' own Adam. `damped` (ours)
    lets the noise and the learning rate decrease to 0.

    Raises:
        UsageError: a setting is out of range.
        MegapruneError: an initial score is not finite.
    """

    def __init__(
        self,
        init_scores: Tensor,
        budget: Budget,
        protected: Set[int],
        num_steps: int,
        temperature: float = 1.0,
        anneal: float = 0.9,
        lr: float = 0.05,
        seed: int = 0,
        ramp: float = 1.0,
        damped: bool = True,
    ) -> None:
        self.num_layers = len(init_scores)
        self.budget = budget
        budget.check(protected)
        check_settings(num_steps, temperature, anneal, ramp)
        if lr <= 0:
            raise UsageError(f"--mask-lr: cannot be {lr}; give a number above 0, such as 0.05")
        if not init_scores.isfinite().all():
            raise MegapruneError("the initial scores of the search are not all finite")

        self._protected = frozenset(protected)
        self._free = torch.tensor([i for i in range(self.num_layers) if i not in protected], dtype=torch.long)
        self._num_steps = num_steps
        self._ramp_steps = max(1, round(ramp * num_steps))
        self._temperature = temperature
        self._anneal = anneal
        self._lr = lr
        self._seed = seed
        self._damped = damped
        self._scores = init_scores.detach().cpu().float().clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self._scores], lr=lr)

    @property
    def scores(self) -> Tensor:
        """Scores, [num_layers] fp32 on the CPU, detached; higher is kept. Protected layers keep their initial score."""
        return self._scores.detach().clone()

    def limit_at(self, step: int) -> int:
        """Return the maximum cost of this step's mask; see `removal_limit`."""
        return removal_limit(self.budget, step, self._ramp_steps)

    def temperature(self, step: int) -> float:
        """Return the initial temperature times 1 - anneal * step / num_steps."""
        return self._temperature * (1 - self._anneal * step / self._num_steps)

    def mask(self, step: int) -> Tensor:
        """Return this step's sample, [num_layers] fp32 on the CPU, detached, within `limit_at(step)`."""
        return self._draw(step).detach()

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Take one Adam step on the scores from `mask_grad`, [num_layers], the gradient at `mask(step)`.

        If this step's mask is the only possible one (all free layers kept, or none), the scores stay unchanged.

        Raises:
            MegapruneError: the gradient is not finite.
        """
        check_gradient(mask_grad, step)
        # The mask is drawn again. The noise depends on the step alone and the scores have not changed, so the graph
        # equals that of `mask`, and nothing has to be stored between the two calls.
        with torch.enable_grad():
            mask = self._draw(step)
        if not mask.requires_grad:
            return
        self._optimizer.param_groups[0]["lr"] = self._lr * self._share_left(step)
        self._optimizer.zero_grad()
        mask.backward(mask_grad.detach().to("cpu", torch.float32))
        self._optimizer.step()

    def kept_layers(self) -> list[int]:
        """Return the protected layers and the best of the others by score, without noise, ascending."""
        return top_layers(self.scores, self.budget, self._protected)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, Adam's moments, and the settings that the trajectory depends on."""
        adam = self._optimizer.state.get(self._scores) or self._fresh_adam_state()
        return {
            "scores": self.scores,
            "adam": {name: value.clone() for name, value in adam.items()},
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            MegapruneError: the saved search had other settings.
        """
        check_same_search(state["settings"], self._settings())
        with torch.no_grad():
            self._scores.copy_(state["scores"])
        self._optimizer.state[self._scores] = {name: value.clone() for name, value in state["adam"].items()}

    def _draw(self, step: int) -> Tensor:
        """Return this step's mask, [num_layers], with its graph to the scores if there is one."""
        if not 0 <= step < self._num_steps:
            raise MegapruneError(f"step {step} is outside the search, whose steps are 0 to {self._num_steps - 1}")
        noise = gumbel_noise(self.num_layers, self._seed, step)[self._free] * self._share_left(step) ** 2
        costs = [self.budget.costs[layer] for layer in self._free.tolist()]
        limit = self.limit_at(step) - sum(self.budget.costs[layer] for layer in self._protected)
        free_mask, _ = gumbel_topk_mask(self._scores[self._free], limit, self.temperature(step), noise, costs)
        return torch.ones(self.num_layers).index_copy(0, self._free, free_mask)

    def _share_left(self, step: int) -> float:
        """Return the factor by which noise and learning rate are damped.

        The noise dies down over the search (ours): its last masks are close to the one that will be kept, so that the
        weights that train beside them are healing for that one already. The learning rate decreases too, so that
        similar layers do not change places at the end.
        """
        return 1 - step / self._num_steps if self._damped else 1.0

    def _fresh_adam_state(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.num_layers)
        return {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros}

    def _settings(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "costs": list(self.budget.costs),
            "limit": self.budget.limit,
            "protected": sorted(self._protected),
            "num_steps": self._num_steps,
            "ramp_steps": self._ramp_steps,
            "temperature": self._temperature,
            "anneal": self._anneal,
            "lr": self._lr,
            "seed": self._seed,
            "damped": self._damped,
        }
