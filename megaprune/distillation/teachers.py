"""Where a student's targets come from. A teacher is asked before the step for all of its micro-batches."""

from collections.abc import Sequence
from typing import Protocol

import torch

from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.mcore.passes import MicroBatch, forward


class Teacher(Protocol):
    """Gives what the distillation loss needs of the original model."""

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """The targets of each micro-batch, shapes [s, b, ...], on the last pipeline stage; elsewhere nothing."""


class OnlineTeacher:
    """The frozen original model beside the student, at the same parallel layout.

    Its pass is forward only; of its logits, the top k, their log-sum-exp and their entropy stay.
    """

    def __init__(self, model: torch.nn.Module, shard: VocabShard, top_k: int) -> None:
        self._model = model.requires_grad_(False)
        self._shard = shard
        self._top_k = top_k

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """See `Teacher`."""
        return forward(self._model, batches, lambda logits, _: teacher_targets(logits, self._top_k, self._shard))
