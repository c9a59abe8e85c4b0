"""Training objectives: the loss of a step on this rank's tokens, and what it needs of a teacher."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

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


class Objective(Protocol):
    """The loss of a training step: the mean of its token losses, weighted over the global batch.

    The parts are called in this order: `targets` once per step on every rank; then, on the last pipeline stage,
    `token_weights` for all micro-batches, and `token_losses` as each of them leaves the model. The targets of a
    micro-batch are opaque to the caller, so an objective may need anything of its teacher, or nothing.
    """

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[Any]:
        """Return what the loss needs of the teacher, per micro-batch, on the last pipeline stage. Collective."""

    def token_weights(self, tokens: LossTokens, targets: Any) -> Tensor:
        """Return the weights [s, b] of the tokens; 0 where a token carries no loss."""

    def token_losses(self, logits: Tensor, tokens: LossTokens, targets: Any) -> Tensor:
        """Return the losses [s, b] of the logits [s, b, vocab / tp]; differentiable."""

    def watching(self, model: PipelineModel) -> AbstractContextManager[None]:
        """Return the block in which the step's passes run; losses on hidden states hook the layers in it."""
        return nullcontext()


class CrossEntropy(Objective):
    """Next-token cross-entropy with the data; there is no teacher."""

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

    def __init__(self, shard: VocabShard, tail: Tail, teacher: Teacher | None) -> None:
        self._shard, self._tail, self._teacher = shard, tail, teacher

    def targets(self, batches: Sequence[MicroBatch]) -> Sequence[TeacherTargets]:
        """See `Objective`.

        Raises:
            MegapruneError: there is no teacher.
        """
        if self._teacher is None:
            raise MegapruneError("--distill-loss kl and adaptive compare with a teacher, and there is none")
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


def make_objective(kind: LossKind, tail: Tail, shard: VocabShard, teacher: Teacher | None) -> Objective:
    """Return the objective that `--distill-loss` names.

    Args:
        teacher: None for cross-entropy, and where no step will be taken.
    """
    if kind == "ce":
        return CrossEntropy(shard)
    return (AdaptiveKL if kind == "adaptive" else KL)(shard, tail, teacher)
