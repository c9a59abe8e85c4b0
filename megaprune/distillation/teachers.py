"""Sources of a student's targets. A teacher is asked before the step for all of its micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megaprune import device
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.mcore import parallel
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import adapters_off
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.schedule import MicroBatch, forward
from megaprune.mcore.stage_transfer import stage_of_layers
from megaprune.models import Architecture
from megaprune.models.shards import padded_vocab_size
from megaprune.utils.errors import MegapruneError

_NO_LAYERS = "--hidden-loss-weight: a cached teacher has no hidden states; use --teacher online or self"


def vocab_shard(arch: Architecture) -> VocabShard:
    """Return the columns of the vocabulary that this rank's logits hold."""
    place, group = parallel.tensor_parallel(), parallel.tensor_parallel_group()
    size = padded_vocab_size(arch.vocab_size, place.size) // place.size
    start = place.rank * size
    valid = min(max(arch.vocab_size - start, 0), size)
    return VocabShard(start, size, valid, group if place.size > 1 else None)


class Teacher(Protocol):
    """The source of what a loss needs of the original model."""

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """Return the targets of each micro-batch, shapes [s, b, ...], on the last pipeline stage; [] on the others.
        Collective."""

    def watched_layers(self, watch: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """Call `watch` on every layer's pass within the block (see `PipelineModel.watched_layers`)."""

    def stage_of_layers(self) -> dict[int, int]:
        """Return the pipeline stage of each of the teacher's layers. Collective."""


class OnlineTeacher:
    """The frozen original model beside the student, at the same parallel layout.

    Its pass is forward only, and keeps the top k, the logsumexp and the entropy of its logits.
    """

    def __init__(self, model: PipelineModel, shard: VocabShard, top_k: int) -> None:
        self._model = model.requires_grad_(False)
        self._shard = shard
        self._top_k = top_k

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """See `Teacher`."""
        return forward(self._model, batches, lambda logits, _: teacher_targets(logits, self._top_k, self._shard))

    def watched_layers(self, watch: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """See `Teacher`."""
        return self._model.watched_layers(watch)

    def stage_of_layers(self) -> dict[int, int]:
        """See `Teacher`."""
        return stage_of_layers(self._model)


class SelfTeacher:
    """The student's own frozen weights, with adapters off and every layer on: no second copy of the model.

    For a student that trains adapters only and whose pruned layers stay in memory.
    """

    def __init__(self, student: PipelineModel, gate: LayerGate, shard: VocabShard, top_k: int) -> None:
        self._student = student
        self._gate = gate
        self._shard = shard
        self._top_k = top_k

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """See `Teacher`."""
        with adapters_off(self._student), self._gate.all_layers():
            return forward(self._student, batches, lambda logits, _: teacher_targets(logits, self._top_k, self._shard))

    def watched_layers(self, watch: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """See `Teacher`."""
        return self._student.watched_layers(watch)

    def stage_of_layers(self) -> dict[int, int]:
        """See `Teacher`."""
        return stage_of_layers(self._student)


class CachedTeacher:
    """A teacher's stored targets of the same windows, read from disk: no model at all.

    Targets are found by the numbers of a batch's windows, so the order of the batches and the parallel layout may
    differ from those that made the cache.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache

    def targets(self, batches: Sequence[MicroBatch]) -> list[TeacherTargets]:
        """See `Teacher`. If one rank finds the cache damaged, all ranks refuse it.

        Raises:
            MegapruneError: the stored bytes differ from those that were written; names the file.
        """
        found: list[TeacherTargets] = []
        error: MegapruneError | None = None
        if parallel.is_last_stage():
            try:
                found = [self._cache.windows(batch.sample_ids) for batch in batches]
            except MegapruneError as met:
                error = met
        if parallel.any_rank(error is not None):
            parallel.raise_together(error)
        return [targets.map(lambda column: column.to(device.torch_device())) for targets in found]

    def watched_layers(self, watch: Callable[[int, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """See `Teacher`.

        Raises:
            MegapruneError: there is no model to watch.
        """
        raise MegapruneError(_NO_LAYERS)

    def stage_of_layers(self) -> dict[int, int]:
        """See `Teacher`. Raises as `watched_layers`."""
        raise MegapruneError(_NO_LAYERS)
