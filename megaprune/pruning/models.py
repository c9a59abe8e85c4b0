"""The models of a run: the original, the student and the teacher, built, filled with weights and put into training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import VocabShard
from megaprune.distillation.teachers import CachedTeacher, OnlineTeacher, SelfTeacher, Teacher
from megaprune.mcore import checkpoint
from megaprune.mcore.adapters import attach_adapters
from megaprune.mcore.builder import build_model, in_half_precision, train_only, vocab_shard
from megaprune.mcore.hf_weights import import_weights, round_to_source_dtype
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import merge_adapters
from megaprune.mcore.optimizer import Trainer
from megaprune.pruning.prepare import Setup
from megaprune.selection.segments import endpoints


class Models:
    """Makes a run's models. The original and a student that keeps its pruned layers share one gate."""

    def __init__(self, setup: Setup, teacher_cache: TeacherCache | None = None) -> None:
        self._setup, self._teacher_cache = setup, teacher_cache
        self.gate = LayerGate()
        self.shard: VocabShard = vocab_shard(setup.arch)

    @property
    def student_stays_whole(self) -> bool:
        """Whether the student keeps its pruned layers, bypassed: they are part of the teacher that it also is."""
        return self._setup.config.distillation.teacher == "self"

    def original(self, imported: bool = True, gated: bool = True) -> torch.nn.Module:
        """The whole model, behind the gate or plain."""
        model = build_model(self._setup.arch, self._setup.stages(), self._setup.engine, self.gate if gated else None)
        if imported:
            import_weights(model, self._setup.source)
        return model

    def whole_student(self, original: torch.nn.Module | None, saved: Path | None) -> Trainer:
        """The whole model in training.

        Args:
            original: the model if it is at hand, with the source's weights.
            saved: a checkpoint to go on from.
        """
        if original is None:
            # A checkpoint holds all that trains: every weight, or the adapters.
            original = self.original(imported=saved is None or self._setup.lora is not None)
        student = self._in_training(original)
        if saved is not None:
            checkpoint.load(saved, student)
        return student

    def pruned_student(self, kept: Sequence[int], saved: Path | None, saved_is_pruned: bool) -> Trainer:
        """The model of the kept layers in training, its pipeline balanced for them.

        Args:
            saved: a checkpoint to go on from: this model's, or the whole one's; None starts from the source.
        """
        setup = self._setup
        model = build_model(setup.arch.pruned(kept), setup.stages_of_layers(kept), setup.engine)
        if saved is None or setup.lora is not None:
            import_weights(model, setup.source, kept)
        if setup.config.tunes_endpoints:
            train_only(model, endpoints(kept, setup.arch.num_layers))
        student = self._in_training(model, kept)
        if saved is not None:
            checkpoint.load(saved, student, None if saved_is_pruned else kept)
        return student

    def teacher(self, student: Trainer | None, original: torch.nn.Module | None = None) -> Teacher | None:
        """The student's teacher: itself, what is cached, or the original model, imported unless it is at hand. None for
        CE.

        Args:
            student: not asked for by a teacher apart from it.
        """
        distillation = self._setup.config.distillation
        if distillation.distill_loss == "ce":
            return None
        if self.student_stays_whole:
            return SelfTeacher(student.ddp, self.gate, self.shard, distillation.distill_top_k)
        if self._teacher_cache is not None:
            return CachedTeacher(self._teacher_cache)
        model = self.original(gated=False) if original is None else original
        return OnlineTeacher(in_half_precision(model, self._setup.engine), self.shard, distillation.distill_top_k)

    def merge_and_round(self, student: Trainer, kept: Sequence[int]) -> None:
        """Makes the trained weights what the export will hold: adapters merged, rounded to the source's dtype."""
        merge_adapters(student.model)
        round_to_source_dtype(student.model, self._setup.source, None if self.student_stays_whole else kept)

    def _in_training(self, model: torch.nn.Module, kept: Sequence[int] | None = None) -> Trainer:
        if self._setup.lora is not None:
            attach_adapters(model, self._setup.lora, self._setup.config.recovery.seed, kept)
        return Trainer(model, self._setup.engine, self._setup.optimizer)
