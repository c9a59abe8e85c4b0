"""Loss of multi-token-prediction (MTP) layers: the cross-entropy of the tokens after the next one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaprune.distillation.losses import VocabShard, cross_entropy
from megaprune.distillation.objectives import LossPart, Objective
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.schedule import LossTokens, MicroBatch


class WithMTP(Objective):
    """An objective, plus factor x the mean over the MTP layers of their cross-entropy (DeepSeek-V3).

    MTP layer k, counted from 1, predicts the token k positions behind the one that the model predicts. As in
    Megatron-LM, a position counts if that token carries a loss.

    Args:
        inner: the objective on the model's own logits.
        num_layers: number of MTP layers.
        factor: factor of the mean.
    """

    def __init__(self, inner: Objective, shard: VocabShard, num_layers: int, factor: float) -> None:
        self._inner, self._shard, self._num_layers = inner, shard, num_layers
        ahead = {f"mtp_{number}_loss": factor / num_layers for number in range(1, num_layers + 1)}
        self.shares = {**inner.shares, **ahead}

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[Any]:
        """See `Objective`."""
        return self._inner.targets(batches)

    def token_weights(self, tokens: LossTokens, targets: Any) -> Tensor:
        """See `Objective`."""
        weights = self._parts(self._inner.token_weights(tokens, targets))
        ahead = [_shifted(tokens.loss_mask, number) for number in range(1, self._num_layers + 1)]
        return torch.cat([weights, torch.stack(ahead).to(weights.dtype)])

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: Any) -> Tensor:
        """See `Objective`.

        Args:
            logits: those of the model and of the MTP layers, [(1 + MTP layers) x s, b, vocab / tp].
        """
        own, *ahead = logits.chunk(1 + self._num_layers)
        losses = [
            cross_entropy(predicted, _shifted(tokens.labels, number), self._shard)
            for number, predicted in enumerate(ahead, start=1)
        ]
        return torch.cat([self._parts(self._inner.token_losses(own, tokens, targets)), torch.stack(losses)])

    @contextmanager
    def watching(self, model: PipelineModel) -> Iterator[None]:
        """See `Objective`."""
        with self._inner.watching(model), model.predicting_ahead():
            yield

    def hook_losses(self) -> Mapping[str, LossPart]:
        """See `Objective`."""
        return self._inner.hook_losses()

    def _parts(self, values: Tensor) -> Tensor:
        """Return the inner objective's values, [s, b] or [parts, s, b], as [parts, s, b]."""
        return values.reshape(len(self._inner.shares), *values.shape[-2:])


def _shifted(values: Tensor, number: int) -> Tensor:
    """Return [s, b] values of the tokens so many positions behind; 0 where the window ends before."""
    return torch.cat([values[number:], torch.zeros_like(values[:number])])
