"""Optimizers' states in checkpoints where ranks hold unlike parts of them, down to nothing.

A rank holds nothing where no weight of its pipeline stage trains, or no expert is on it. What optimizers share (the
count of steps) is saved by the first rank, as it is there, and Megatron-Core 0.16.1 leaves empty parts out of what it
loads.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megaprune import device

# Megatron-Core's name of the fp32 copies of bf16 weights: a list for each parameter group
_COPIES = "fp32_from_fp16_params"


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of one kind of weight each (dense, experts) that make up a model's."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def align_steps(optimizer: MegatronOptimizer) -> int:
    """Gives every part of every rank a state, and the number of steps that any has made. Collective.

    Returns:
        That number.
    """
    steps = torch.tensor(max(map(_steps_of, parts(optimizer)), default=0), device=device.torch_device())
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    for part in parts(optimizer):
        part.steps_made = int(steps)
        if part.optimizer is not None and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)
            if not _counts_in_groups(part):
                for state in part.optimizer.state.values():
                    state["step"] = torch.tensor(float(steps))
    return int(steps)


def shared_state(optimizer: MegatronOptimizer, state: dict[Any, Any], steps: int) -> dict[Any, Any]:
    """A sharded state dict in which what is shared is the same on every rank, whatever it holds."""
    for part, found in zip(parts(optimizer), _states(optimizer, state), strict=True):
        inner = found.get("optimizer", found)
        if _counts_in_groups(part):
            for group in inner["param_groups"]:
                group["step"] = steps
        elif not isinstance(part, DistributedOptimizer):
            inner["state"]["common_step"] = torch.tensor(float(steps))
        if _COPIES in found:
            # by their places, so that the empty ones can be left out
            found[_COPIES] = {
                number: dict(enumerate(group)) for number, group in enumerate(found[_COPIES]) if len(group)
            }
    return state


def completed(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """A loaded state dict with the parts that are empty on this rank."""
    for part, found in zip(parts(optimizer), _states(optimizer, state), strict=True):
        if isinstance(part, DistributedOptimizer):
            continue
        found.get("optimizer", found).setdefault("state", {})
        if hasattr(part, "fp32_from_float16_groups"):
            copies = found.get(_COPIES, {})
            found[_COPIES] = [
                [copies[number][place] for place in range(len(group))]
                for number, group in enumerate(part.fp32_from_float16_groups)
            ]
    return state


def _states(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The state of each part: the core numbers them where there are several."""
    count = len(parts(optimizer))
    return [state] if count == 1 else [state[number] for number in range(count)]


def _counts_in_groups(part: MegatronOptimizer) -> bool:
    """Whether steps are counted in the parameter groups, as fused Adams do, and not for each parameter."""
    return part.optimizer is not None and not isinstance(part.optimizer, torch.optim.Adam)


def _steps_of(part: MegatronOptimizer) -> int:
    if part.optimizer is None:
        return 0
    counts = [state["step"] for state in part.optimizer.state.values() if "step" in state]
    counts += [group["step"] for group in part.optimizer.param_groups if group["params"] and "step" in group]
    return max((int(count) for count in counts if count is not None), default=0)
