"""The Gumbel-TopK mask search of E3-Pruner, after the relaxation of Ploetz and Roth (2018)."""

import hashlib
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.selection.one_shot import top_layers
from megaprune.selection.selector import check_gradient, check_same_search
from megaprune.utils.errors import MegapruneError, UsageError


def gumbel_topk_mask(
    scores: Tensor, limit: int, temperature: float, noise: Tensor, costs: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """A mask of the best by perturbed score whose gradient is that of a soft top-k.

    `scores` and `noise` are [n]; computed in fp32 (fp64 if given). With a = scores + noise, `limit` times:
    p = softmax(a / temperature), a <- a + log(1 - p); soft is the sum of the p. The logarithm is added
    before the temperature divides: after it, one item could be picked twice.

    With `costs`, [n], the limit is what the ones may cost together (ours; without, each costs 1). Each round spends
    p @ costs, and the last one counts in part, so that soft @ costs is the limit exactly. The mask takes items in the
    order of a, each one that still fits.

    Returns (mask, soft), both [n]: mask is 0 and 1 in the forward pass (of equals, the lower index comes first) and
    soft in the backward pass (straight-through). Where nothing fits or everything does there is no choice, and both
    are constants without a graph.
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
    """log(1 - softmax(logits)), [n] with n > 1, always finite.

    As the others' share of the total: in fp32, 1 - p is 0 for an item that leads by 17, and a clamped
    logarithm would let an item that leads by more than the clamp be picked again.
    """
    n = len(logits)
    itself = torch.eye(n, dtype=torch.bool, device=logits.device)
    others = logits.expand(n, n).masked_fill(itself, -torch.inf).logsumexp(1)
    return others - logits.logsumexp(0)


def gumbel_noise(num_layers: int, seed: int, step: int) -> Tensor:
    """[num_layers] fp32 standard Gumbel noise that depends on its arguments alone, not on earlier draws."""
    return (-(-_uniform(num_layers, seed, step).log()).log()).float()


def uniform_noise(num_layers: int, seed: int, step: int) -> Tensor:
    """[num_layers] fp32 uniform noise within (0, 1), likewise."""
    return _uniform(num_layers, seed, step).clamp(1e-6, 1 - 1e-6).float()


def _uniform(num_layers: int, seed: int, step: int) -> Tensor:
    # The CPU generator takes 32 bits of its seed, so the numbers have to be mixed into 32 bits.
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    uniform = torch.rand(num_layers, dtype=torch.float64, generator=generator)
    return uniform.clamp_min(torch.finfo(torch.float64).tiny)


class GumbelTopK:
    """A Selector: learns one score a layer, drawing a Gumbel-TopK mask a step (E3-Pruner).

    `init_scores` is [num_layers] (see `scores_from_kl`). Over the `num_steps` of the search the temperature
    falls linearly to `1 - anneal` of its start. Over the first `ramp` of them (a share, in (0, 1]) what the kept
    layers may cost falls linearly from the cost of all to the budget's limit. Layers in `protected` are always
    kept and take no part in the relaxation. `lr` is that of the scores' own Adam. Raises
    UsageError for settings out of range, MegapruneError for scores that are not finite.
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
    ) -> None:
        self.num_layers = len(init_scores)
        self.budget = budget
        budget.check(protected)
        _check_settings(num_steps, temperature, anneal, lr, ramp)
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
        self._scores = init_scores.detach().cpu().float().clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self._scores], lr=lr)

    @property
    def scores(self) -> Tensor:
        """[num_layers] fp32 on the CPU, detached; higher is kept. Protected layers keep their first score."""
        return self._scores.detach().clone()

    def limit_at(self, step: int) -> int:
        """What this step's mask may cost: less than all layers from step 0 on, the budget's limit from the last ramp
        step on.

        The share that is gone rounds up. A step with every layer would distil the model from itself: its gradient
        is rounding noise, which Adam scales up to a full step.
        """
        total = sum(self.budget.costs)
        ramp_step = min(step + 1, self._ramp_steps)
        return total - -(-(total - self.budget.limit) * ramp_step // self._ramp_steps)

    def temperature(self, step: int) -> float:
        """The start temperature times 1 - anneal * step / num_steps."""
        return self._temperature * (1 - self._anneal * step / self._num_steps)

    def mask(self, step: int) -> Tensor:
        """[num_layers] fp32 on the CPU, detached: this step's draw, within `limit_at(step)`."""
        return self._draw(step).detach()

    def update(self, mask_grad: Tensor, step: int) -> None:
        """One Adam step on the scores from `mask_grad`, [num_layers], the gradient at `mask(step)`.

        Where the mask of this step was no choice (all free layers kept, or none) nothing moves. Raises
        MegapruneError if the gradient is not finite.
        """
        check_gradient(mask_grad, step)
        # Drawn anew: the noise is a function of the step and the scores have not moved, so it is the same
        # graph as the mask's, and nothing has to be held, or saved, between the two calls.
        with torch.enable_grad():
            mask = self._draw(step)
        if not mask.requires_grad:
            return
        # Like the noise, the steps shrink, so that near-equal layers don't change places at the very end.
        self._optimizer.param_groups[0]["lr"] = self._lr * (1 - step / self._num_steps)
        self._optimizer.zero_grad()
        mask.backward(mask_grad.detach().to("cpu", torch.float32))
        self._optimizer.step()

    def kept_layers(self) -> list[int]:
        """The protected layers and the best of the others by score, without noise, ascending."""
        return top_layers(self.scores, self.budget, self._protected)

    def state_dict(self) -> dict[str, Any]:
        """The scores, Adam's moments, and the settings that the trajectory depends on."""
        adam = self._optimizer.state.get(self._scores) or self._fresh_adam_state()
        return {
            "scores": self.scores,
            "adam": {name: value.clone() for name, value in adam.items()},
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved search. Raises MegapruneError if it had other settings."""
        check_same_search(state["settings"], self._settings())
        with torch.no_grad():
            self._scores.copy_(state["scores"])
        self._optimizer.state[self._scores] = {name: value.clone() for name, value in state["adam"].items()}

    def _draw(self, step: int) -> Tensor:
        """This step's mask, [num_layers], with its graph to the scores where it has one."""
        if not 0 <= step < self._num_steps:
            raise MegapruneError(f"step {step} is outside the search, whose steps are 0 to {self._num_steps - 1}")
        # The noise dies down over the search (ours): its last masks are close to the one that will be kept, so that
        # the weights that train beside them are healing for that one already.
        loudness = (1 - step / self._num_steps) ** 2
        noise = gumbel_noise(self.num_layers, self._seed, step)[self._free] * loudness
        costs = [self.budget.costs[layer] for layer in self._free.tolist()]
        limit = self.limit_at(step) - sum(self.budget.costs[layer] for layer in self._protected)
        free_mask, _ = gumbel_topk_mask(self._scores[self._free], limit, self.temperature(step), noise, costs)
        return torch.ones(self.num_layers).index_copy(0, self._free, free_mask)

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
        }


def _check_settings(num_steps: int, temperature: float, anneal: float, lr: float, ramp: float) -> None:
    for flag, value, valid, remedy in [
        ("--search-iters", num_steps, num_steps >= 1, "give at least 1"),
        ("--gumbel-temperature", temperature, temperature > 0, "give a number above 0, such as 1.0"),
        ("--gumbel-anneal", anneal, 0 <= anneal < 1, "give a number from 0 to below 1, such as 0.9"),
        ("--mask-lr", lr, lr > 0, "give a number above 0, such as 0.05"),
    ]:
        if not valid:
            raise UsageError(f"{flag}: cannot be {value}; {remedy}")
    if not 0 < ramp <= 1:
        raise MegapruneError(f"the ramp cannot be {ramp}: it is a share of the search, above 0 and at most 1")
