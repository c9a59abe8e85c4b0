"""Models of a run: the original, the student and the teacher, built, loaded and prepared for training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megaprune import device
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import VocabShard
from megaprune.distillation.teachers import CachedTeacher, OnlineTeacher, SelfTeacher, Teacher, vocab_shard
from megaprune.mcore import checkpoint
from megaprune.mcore.adapters import attach_adapters
from megaprune.mcore.builder import build_model, in_half_precision, train_only
from megaprune.mcore.hf_weights import import_weights, round_to_source_dtype
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import merge_adapters
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.options import RunOptions
from megaprune.selection.segments import endpoints
from megaprune.weights.tensor_source import TensorSource


@dataclass(frozen=True)
class Origin:
    """The model that teaches a run which starts from another one: that of a run in rounds, with its options.

    Args:
        layers: its layers of which the run's model consists.
    """

    options: RunOptions
    source: TensorSource
    layers: Sequence[int]


class Models:
    """Factory of a run's models. The original and a student that keeps its pruned layers share one gate.

    Args:
        origin: the teacher's model, if it is not the model that is pruned.
    """

    def __init__(
        self,
        options: RunOptions,
        source: TensorSource,
        teacher_cache: TeacherCache | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._options, self._source, self._teacher_cache = options, source, teacher_cache
        self._origin = Models(origin.options, origin.source) if origin else None
        self._taught_layers = origin.layers if origin else range(options.model.arch.num_layers)
        self.gate = LayerGate()
        self.shard: VocabShard = vocab_shard(options.model.arch)

    @property
    def student_stays_whole(self) -> bool:
        """Return whether the student keeps its pruned layers, bypassed, because it also serves as the teacher."""
        return self._options.distillation.teacher == "self"

    def original(self, imported: bool = True, gated: bool = True) -> PipelineModel:
        """Return the whole model, with or without the gate; without it, it is no student and has no MTP layers."""
        options, gate = self._options, self.gate if gated else None
        arch = options.model.arch if gated else replace(options.model.arch, num_mtp=0)
        device.free_unused()
        model = build_model(arch, options.pipeline.original, options.engine, gate)
        if imported:
            import_weights(model, self._source)
        return model

    def whole_student(self, original: PipelineModel | None, saved: Path | None) -> Trainer:
        """Return the whole model, prepared for training.

        Args:
            original: the model with the source's weights, if it exists already.
            saved: the checkpoint to resume from.
        """
        if original is None:
            # A checkpoint holds everything that trains: all weights, or the adapters.
            original = self.original(imported=saved is None or self._options.lora is not None)
        student = self._in_training(original)
        if saved is not None:
            checkpoint.load(saved, student)
        return student

    def pruned_student(self, kept: Sequence[int], saved: Path | None, saved_is_pruned: bool) -> Trainer:
        """Return the model of the kept layers, prepared for training, with a pipeline balanced for them.

        Args:
            saved: the checkpoint to resume from, of this model or of the whole one; None starts from the source.
        """
        options, arch = self._options, self._options.model.arch
        device.free_unused()  # the searched student, which has been closed
        model = build_model(arch.pruned(kept), options.pipeline.stages_of_layers(kept), options.engine)
        if saved is None or options.lora is not None:
            import_weights(model, self._source, kept)
        if options.training.endpoints_only:
            train_only(model, endpoints(kept, arch.num_layers))
        student = self._in_training(model, kept)
        if saved is not None:
            checkpoint.load(saved, student, None if saved_is_pruned else kept)
        return student

    def teacher(self, student: Trainer | None, original: PipelineModel | None = None) -> Teacher | None:
        """Return the student's teacher: the student itself, the cache, or the original model, which is imported unless
        it exists already. None for cross-entropy.

        Args:
            student: needed only by a teacher that is part of the student.
        """
        distillation = self._options.distillation
        if distillation.loss == "ce":
            return None
        if self.student_stays_whole:
            assert student is not None  # the teacher is made of it
            return SelfTeacher(student.ddp, self.gate, self.shard, distillation.top_k)
        if self._teacher_cache is not None:
            return CachedTeacher(self._teacher_cache)
        if self._origin is not None:
            model = self._origin.original(gated=False)
        else:
            model = self.original(gated=False) if original is None else original
        return OnlineTeacher(in_half_precision(model, self._options.engine), self.shard, distillation.top_k)

    def taught_layers(self, kept: Sequence[int]) -> dict[int, int]:
        """Return the teacher's layer of each layer of the student that consists of these layers."""
        if self.student_stays_whole:
            return {layer: layer for layer in kept}
        return {number: self._taught_layers[layer] for number, layer in enumerate(kept)}

    def merge_and_round(self, student: Trainer, kept: Sequence[int]) -> None:
        """Replace the trained weights by those that are exported: adapters merged, rounded to the source's dtype."""
        merge_adapters(student.model)
        round_to_source_dtype(student.model, self._source, None if self.student_stays_whole else kept)

    def _in_training(self, model: PipelineModel, kept: Sequence[int] | None = None) -> Trainer:
        if self._options.lora is not None:
            attach_adapters(model, self._options.lora, self._options.training.seed, kept)
        return Trainer(model, self._options.engine, self._options.optimizer)
