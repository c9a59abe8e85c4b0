"""Average of the weights over the last iterations of a run, which is exported in place of the last weights.

All iterations count the same. The average is kept in fp32, of the fp32 weights of the optimizer where this rank holds
them whole, otherwise of the model's own.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megaprune.mcore.pipeline_model import PipelineModel

_PREFIX = "average"


def first_averaged(share: float, search_iters: int, train_iters: int) -> int | None:
    """Return the first iteration whose weights are averaged, which is one of recovery; None if none are.

    Args:
        share: of recovery, at its end; at least one iteration unless it is 0.
    """
    recovery = train_iters - search_iters
    if share <= 0 or recovery < 1:
        return None
    return train_iters - max(1, round(share * recovery))


class WeightAverage:
    """Average of a model's trained parameters.

    Args:
        first_iteration: the first iteration that counts, from 0. The number of iterations in the average follows from
            it, so only the average itself is in checkpoints.
    """

    def __init__(self, model: PipelineModel, first_iteration: int) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._first = first_iteration
        self._average: dict[int, Tensor] = {}
        self._by_name: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, iteration: int) -> None:
        """Count the weights after an iteration."""
        count = iteration + 1 - self._first
        if count < 1:
            return
        if count == 1:
            self._average = {id(parameter): _weights(parameter).float().clone() for parameter in self._parameters}
            return
        for parameter in self._parameters:
            self._average[id(parameter)].lerp_(_weights(parameter).float(), 1 / count)

    @torch.no_grad()
    def use(self) -> None:
        """Replace the model's weights by the average, if there is one."""
        for parameter in self._parameters:
            if id(parameter) in self._average:
                parameter.copy_(self._average[id(parameter)])

    def sharded_state(self, model_state: dict[str, Any], iterations: int | None = None) -> dict[str, Any]:
        """Return the entries of a checkpoint.

        Args:
            model_state: sharded state dict of the model.
            iterations: the completed iterations of the checkpoint that is to be loaded; None to save.
        """
        if iterations is not None:
            counted = self._parameters if iterations > self._first else []
            self._average = {id(parameter): torch.zeros_like(parameter, dtype=torch.float32) for parameter in counted}
        self._by_name = {
            name: self._average[id(entry.data)]
            for name, entry in model_state.items()
            if isinstance(entry, ShardedBase) and id(entry.data) in self._average
        }
        return {
            name: make_sharded_optimizer_tensor(model_state[name], average, _PREFIX)
            for name, average in self._by_name.items()
        }

    def load(self, loaded: dict[str, Tensor]) -> None:
        """Take over what was loaded into the entries of `sharded_state`."""
        for name, average in loaded.items():
            self._by_name[name].copy_(average)


def _weights(parameter: torch.nn.Parameter) -> Tensor:
    main = getattr(parameter, "main_param", None)
    # The distributed optimizer holds a flat part of each parameter.
    return parameter if main is None or main.shape != parameter.shape else main
