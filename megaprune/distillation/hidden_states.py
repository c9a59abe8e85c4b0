"""Loss on the hidden states of the kept layers, across pipeline stages.

The teacher's hidden states are kept during its pass, and sent to the stages that own the same layers of the student,
whose pipeline is balanced for fewer layers. The loss is added to the gradient where the student's layer ends, on the
rank that runs it, so that no hidden state of the student has to travel.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaprune import device
from megaprune.distillation.objectives import LossPart, Objective
from megaprune.distillation.teachers import Teacher
from megaprune.mcore import parallel
from megaprune.mcore.layers.squared_error import with_squared_error
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.schedule import LossTokens, MicroBatch
from megaprune.mcore.stage_transfer import Route, stage_of_layers, transfer


class WithHiddenStates(Objective):
    """An objective, plus the mean relative squared error of the kept layers' outputs. Construction is collective.

    The error of a token is ||student - teacher||^2 / ||teacher||^2: 0 for equal states, 1 for a state of 0, whatever
    their scale, which grows over the layers and differs between tokens. The mean is taken over the kept layers and over
    the tokens of the global batch that carry a loss.

    Args:
        inner: the objective on the logits; its targets come from the same teacher.
        teacher: a teacher whose layers run.
        student: the model that is trained.
        layers: the teacher's layer of each of the student's layers.
        weight: factor of this loss.
    """

    def __init__(
        self, inner: Objective, teacher: Teacher, student: PipelineModel, layers: Mapping[int, int], weight: float
    ) -> None:
        self.shares = inner.shares
        self._inner, self._teacher, self._layers, self._weight = inner, teacher, layers, weight
        self._config = student.config
        senders, receivers = teacher.stage_of_layers(), stage_of_layers(student)
        self._routes = [Route(taught, senders[taught], receivers[number]) for number, taught in layers.items()]
        self._states: dict[int, list[Tensor]] = {}
        self._token_weights: list[Tensor] = []
        self._sum = torch.zeros(())

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[Any]:
        """See `Objective`."""
        held: dict[int, list[Tensor]] = {route.layer: [] for route in self._routes}

        def keep(layer: int, _: Tensor, output: Tensor) -> None:
            if layer in held:
                held[layer].append(output.detach())

        with self._teacher.watched_layers(keep):
            targets = self._inner.targets(batches)
        masks = [self._local(LossTokens(batch, number).loss_mask) for number, batch in enumerate(batches)]
        shape = (*masks[0].shape, self._config.hidden_size)
        self._states = transfer(held, self._routes, len(batches), shape, self._config.pipeline_dtype)
        self._token_weights = self._normalized(batches, masks)
        return targets

    def token_weights(self, tokens: LossTokens, targets: Any) -> Tensor:
        """See `Objective`."""
        return self._inner.token_weights(tokens, targets)

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: Any) -> Tensor:
        """See `Objective`."""
        return self._inner.token_losses(logits, tokens, targets)

    @contextmanager
    def watching(self, model: PipelineModel) -> Iterator[None]:
        """See `Objective`."""
        self._sum = torch.zeros((), device=device.torch_device())
        passes: Counter[int] = Counter()
        # DDP takes the mean over replicas. The schedule's division by the number of micro-batches is that of its own
        # loss, which this one is no part of.
        factor = self._weight * parallel.data_parallel_size()

        def add(layer: int, _: Tensor, output: Tensor) -> Tensor | None:
            # The first of two passes under recomputation has no gradients. The others come in the batches' order.
            if layer not in self._layers or not torch.is_grad_enabled():
                return None
            number = passes[layer]
            passes[layer] += 1
            state, weights = self._states[self._layers[layer]][number], self._token_weights[number]
            energy = state.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            with torch.no_grad():
                self._sum += (weights / energy * (output.float() - state.float()).square().sum(-1)).sum()
            return with_squared_error(output, state, factor * weights / energy)

        with self._inner.watching(model), model.watched_layers(add):
            yield
        self._states = {}

    def hook_losses(self) -> Mapping[str, LossPart]:
        """See `Objective`."""
        total = parallel.sum_over_all(self._sum.clone())
        copies = 1 if self._config.sequence_parallel else parallel.tensor_parallel().size
        return {**self._inner.hook_losses(), "hidden_loss": LossPart(self._weight, total.item() / copies)}

    def _local(self, mask: Tensor) -> Tensor:
        """Return this rank's rows [s / tp, b] of a mask [s, b] under sequence parallelism, otherwise all of them."""
        place = parallel.tensor_parallel()
        return mask.chunk(place.size)[place.rank] if self._config.sequence_parallel else mask

    def _normalized(self, batches: Sequence[MicroBatch], masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights of this rank's tokens, whose sum over the global batch and the layers is 1."""
        count = sum((batch.loss_mask.sum() for batch in batches), torch.zeros(()))
        total = parallel.sum_over_data_parallel(count.to(device.torch_device(), torch.float32))
        return [mask / (total * len(self._layers)).clamp(min=torch.finfo(torch.float32).tiny) for mask in masks]
