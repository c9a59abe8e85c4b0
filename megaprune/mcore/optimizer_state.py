"""Saving and loading of optimizer states, including those of ranks without trainable weights.

A rank may have no state for a kind of weights: nothing on its pipeline stage trains, or it holds no expert. Rank 0
saves the values that all ranks share (the number of steps), and Megatron-Core 0.16.1 omits empty parts when it loads.
Both cases are handled here.

The module also patches the distributed optimizer of 0.16.1, which cannot load its own checkpoints with torch's Adam.
The core uses torch's Adam where neither Transformer Engine nor apex is installed. Fused Adams count their steps in the
parameter groups; torch's Adam counts them in each parameter's state.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megaprune import device
from megaprune.mcore.optimizer_shards import load_own_shards, own_shards

# The core's key for the fp32 copies of bf16 weights: a list for each parameter group.
_COPIES = "fp32_from_fp16_params"

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that a model's optimizer consists of, one for each kind of weights (dense, experts)."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def align_steps(optimizer: MegatronOptimizer) -> int:
    """Initialize missing states, and set the number of steps to the maximum over all ranks. Collective.

    Returns:
        The number of steps.
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


def with_common_steps(optimizer: MegatronOptimizer, state: dict[Any, Any], steps: int) -> dict[Any, Any]:
    """Return the sharded state dict with the same number of steps on every rank, and without empty fp32 copies."""
    for part, found in zip(parts(optimizer), _states(optimizer, state), strict=True):
        inner = found.get("optimizer", found)
        if _counts_in_groups(part):
            for group in inner["param_groups"]:
                group["step"] = steps
        elif not isinstance(part, DistributedOptimizer):
            inner["state"]["common_step"] = torch.tensor(float(steps))
        if _COPIES in found:
            # Dictionaries by position instead of lists, so that empty groups can be omitted.
            found[_COPIES] = {
                number: dict(enumerate(group)) for number, group in enumerate(found[_COPIES]) if len(group)
            }
    return state


def with_empty_parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the loaded state dict with the empty parts of this rank added, which the core's optimizers expect."""
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
    """Return the state of each part; the core numbers the parts if there are several."""
    count = len(parts(optimizer))
    return [state] if count == 1 else [state[number] for number in range(count)]


def _counts_in_groups(part: MegatronOptimizer) -> bool:
    """Return whether steps are counted in the parameter groups (fused Adams), not in each parameter's state."""
    return part.optimizer is not None and not isinstance(part.optimizer, torch.optim.Adam)


def _steps_of(part: MegatronOptimizer) -> int:
    """Return the number of steps of a part, 0 if it has no state."""
    if part.optimizer is None:
        return 0
    counts = [state["step"] for state in part.optimizer.state.values() if "step" in state]
    counts += [group["step"] for group in part.optimizer.param_groups if group["params"] and "step" in group]
    return max((int(count) for count in counts if count is not None), default=0)


def _state_dict_with_steps(self: DistributedOptimizer) -> dict[str, Any]:
    """Return the state dict with a number of steps, which the core requires.

    Loading starts from the state dict of a fresh optimizer: its number of steps is 0. An optimizer without weights on
    this rank gets the number of steps of the other ranks.
    """
    if not self.optimizer.state:
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(0.0)
    if self.optimizer.state:
        return _state_dict(self)
    inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
    for group in inner["param_groups"]:
        del group["params"]
        group["step"] = float(getattr(self, "steps_made", 0))
    scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
    return {"optimizer": inner} | scaler


def _load_with_separate_steps(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict, and give each parameter its own step tensor.

    The core assigns one shared tensor to all parameters, and each parameter's update would increment it.
    """
    _load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _set_states_but_steps(
    self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    """Set a parameter's loaded states and keep its number of steps.

    The core expects every entry of the parameter's state among the loaded tensors. The steps are set already.
    """
    group, position = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
    _set_states(self, model_param, {"step": state["step"], **tensors})


DistributedOptimizer.sharded_param_state_fully_reshardable = own_shards
DistributedOptimizer.load_parameter_state_from_fully_reshardable = load_own_shards
if not HAVE_APEX_OR_TE:
    DistributedOptimizer.state_dict = _state_dict_with_steps
    DistributedOptimizer.load_state_dict = _load_with_separate_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_but_steps
