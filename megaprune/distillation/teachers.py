"""Where a student's targets come from. A teacher is asked before the step for all of its micro-batches."""

from collections.abc import Sequence
from typing import Protocol

import torch

from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.mcore.gated_layer import LayerGate
from megaprune.mcore.lora import adapters_off
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


class SelfTeacher:
    """The student's own frozen weights, with adapters off and every layer on: no second copy of the model.

    Right for a student that trains adapters only, and that keeps its pruned layers resident.
    """

    def __init__(self, student: torch.nn.Module, gate: LayerGate, shard: VocabShard, top_k: int) -> None:
        self._student = student
        self._gate = gate
        self._shard = shard
        self._top_k = top_k

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """See `Teacher`."""
        with adapters_off(self._student), self._gate.all_layers():
            return forward(self._student, batches, lambda logits, _: teacher_targets(logits, self._top_k, self._shard))
