"""Megatron-Core 0.16.1's distributed optimizer around torch's Adam, which it takes where neither Transformer Engine nor
apex brings a fused one: what it lacks to load its saved state.

Fused Adams count their steps in the parameter groups; torch's keeps a count in each parameter's state.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def make_loadable() -> None:
    """Patches the distributed optimizer so that it loads what it saves."""
    if not HAVE_APEX_OR_TE:
        DistributedOptimizer.state_dict = _with_states
        DistributedOptimizer.load_state_dict = _with_counts_of_their_own
        DistributedOptimizer._set_main_param_and_optimizer_states = _but_for_the_count


def _with_states(self: DistributedOptimizer) -> dict[str, Any]:
    """The core asserts that there is a step count: a fresh optimizer's state dict, which loading starts from, gets one
    of 0, and that of an optimizer without weights on this rank the one that the others have."""
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


def _with_counts_of_their_own(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """The core gives all parameters one and the same tensor as their count, and each would add to it."""
    _load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _but_for_the_count(
    self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    """The core looks for every entry of a parameter's state among what it loaded; the count is in place already."""
    group, place = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
    _set_states(self, model_param, {"step": state["step"], **tensors})
