"""Training objectives: the loss of a step on this rank's tokens, and what it needs of a teacher."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaprune.distillation.losses import (
    LossKind,
    Tail,
    TeacherTargets,
    VocabShard,
    cross_entropy,
    distillation_loss,
)
from megaprune.distillation.teachers import Teacher
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.schedule import LossTokens, MicroBatch
from megaprune.utils.errors import MegapruneError


class LossPart(NamedTuple):
    """The factor of a part of the loss, and its mean over the global batch."""

    share: float
    mean: float


class Objective(Protocol):
    """The loss of a training step: the mean of its token losses, weighted over the global batch.

    The parts are called in this order: `targets` once per step on every rank; then, on the last pipeline stage,
    `token_weights` for all micro-batches, and `token_losses` as each of them leaves the model. The targets of a
    micro-batch are opaque to the caller, so an objective may need anything of its teacher, or nothing.
    """

    shares: Mapping[str, float] = MappingProxyType({"loss": 1.0})
    """The factors of the parts of which the loss is the sum, by the names of their metrics. The mean of each part is
    taken by its own weights. With several parts, weights and losses are [parts, s, b]."""

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[Any]:
        """Return what the loss needs of the teacher, per micro-batch, on the last pipeline stage. Collective."""

    def token_weights(self, tokens: LossTokens, targets: Any) -> Tensor:
        """Return the weights [s, b] of the tokens; 0 where a token carries no loss."""

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: Any) -> Tensor:
        """Return the losses [s, b] of the logits [s, b, vocab / tp]; differentiable."""

    def watching(self, model: PipelineModel) -> AbstractContextManager[None]:
        """Return the block in which the step's passes run; losses on hidden states hook the layers in it."""
        return nullcontext()

    def hook_losses(self) -> Mapping[str, LossPart]:
        """Return the parts of the step's loss that hooks have added, by the names of their metrics. Collective."""
        return {}


class CrossEntropy(Objective):
    """Next-token cross-entropy with the data; there is no teacher."""

    shares = MappingProxyType({"lm_loss": 1.0})

    def __init__(self, shard: VocabShard) -> None:
        self._shard = shard

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[None]:
        """See `Objective`."""
        return [None] * len(batches)

    def token_weights(self, tokens: LossTokens, targets: None) -> Tensor:
        """See `Objective`."""
        return tokens.loss_mask

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: None) -> Tensor:
        """See `Objective`."""
        return cross_entropy(logits, tokens.labels, self._shard)


class KL(Objective):
    """KL(teacher || student) from the teacher's top k; every token counts alike.

    Args:
        teacher: asked at every step; a run with no step left needs none.
    """

    shares = MappingProxyType({"kd_loss": 1.0})

    def __init__(self, shard: VocabShard, tail: Tail, teacher: Teacher | None) -> None:
        self._shard, self._tail, self._teacher = shard, tail, teacher

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[TeacherTargets]:
        """See `Objective`.

        Raises:
            MegapruneError: there is no teacher.
        """
        if self._teacher is None:
            raise MegapruneError("--distill-loss kl and adaptive need a teacher, and there is none")
        return self._teacher.targets(batches)

    def token_weights(self, tokens: LossTokens, targets: TeacherTargets) -> Tensor:
        """See `Objective`."""
        return tokens.loss_mask

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: TeacherTargets) -> Tensor:
        """See `Objective`."""
        return distillation_loss(logits, targets, self._shard, self._tail)


class AdaptiveKL(KL):
    """KL(teacher || student), each token weighted by the entropy H of the teacher's distribution (E3-Pruner).

    The mean over the global batch divides by the sum of the weights, which makes them H / mean H.
    """

    def token_weights(self, tokens: LossTokens, targets: TeacherTargets) -> Tensor:
        """See `Objective`."""
        return targets.entropy * tokens.loss_mask


class Mixture(Objective):
    """A x distillation + (1 - A) x cross-entropy.

    Each part is a mean over the global batch by its own weights: the teacher's entropies weight the first alone.

    Args:
        distillation: the part that compares with the teacher.
        cross_entropy: the part that compares with the data.
        alpha: A, the factor of the first part.
    """

    def __init__(self, distillation: KL, cross_entropy: CrossEntropy, alpha: float) -> None:
        self._distillation, self._cross_entropy = distillation, cross_entropy
        self.shares = {"kd_loss": alpha, "lm_loss": 1.0 - alpha}

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[TeacherTargets]:
        """See `Objective`. Raises as `KL`."""
        return self._distillation.targets(batches)

    def token_weights(self, tokens: LossTokens, targets: TeacherTargets) -> Tensor:
        """See `Objective`."""
        weights = self._distillation.token_weights(tokens, targets)
        return torch.stack([weights, self._cross_entropy.token_weights(tokens, None).to(weights.dtype)])

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: TeacherTargets) -> Tensor:
        """See `Objective`."""
        losses = self._distillation.token_losses(logits, tokens, targets)
        return torch.stack([losses, self._cross_entropy.token_losses(logits, tokens, None)])


def make_objective(
    kind: LossKind, tail: Tail, shard: VocabShard, teacher: Teacher | None, kd_alpha: float = 1.0
) -> Objective:
    """Return the objective that `--distill-loss` and `--kd-loss-alpha` name.

    Args:
        teacher: None for cross-entropy, and where no step will be taken.
        kd_alpha: share of the distillation loss; the rest is cross-entropy.
    """
    if kind == "ce":
        return CrossEntropy(shard)
    distillation = (AdaptiveKL if kind == "adaptive" else KL)(shard, tail, teacher)
    return distillation if kd_alpha == 1.0 else Mixture(distillation, CrossEntropy(shard), kd_alpha)
