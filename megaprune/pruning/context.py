"""State that the stages of a run share: options, data, models, progress, metrics, and checkpoints."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megaprune.data.batches import Batch
from megaprune.distillation.cache_key import fingerprint_of
from megaprune.importance.measures import loss_sums, mean_of
from megaprune.importance.records import Records
from megaprune.mcore import checkpoint, parallel
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.data import Data
from megaprune.pruning.models import Models, Origin
from megaprune.pruning.options import RunOptions
from megaprune.pruning.progress import Progress
from megaprune.pruning.run_dir import RunDir
from megaprune.pruning.step import StepResult
from megaprune.pruning.throughput import Throughput
from megaprune.report.metrics import MetricsLogger
from megaprune.selection.masks import masks_of
from megaprune.utils import stopping
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.progress import say
from megaprune.utils.stopping import ShouldStop, StopRequest
from megaprune.weights.tensor_source import TensorSource

# Micro-batches of a replica in one part of a validation, for each pipeline stage.
_VALIDATED_AT_ONCE = 8


class RunContext:
    """State of a run.

    Args:
        origin: the teacher's model, if it is not `source`.
        should_stop: called on every rank before the first iteration and after each one. If it returns True on any
            rank, the run saves a checkpoint and stops.
        identity: returns the fingerprint of `source`, if it is known; collective.
    """

    def __init__(
        self,
        options: RunOptions,
        source: TensorSource,
        data: Data,
        should_stop: ShouldStop | None = None,
        origin: Origin | None = None,
        identity: Callable[[], str] | None = None,
    ) -> None:
        self.options, self.data, self._given_identity = options, data, identity
        self.source, self.origin, self._should_stop = source, origin, should_stop
        self.valid: Sequence[Batch] = data.valid_batches()
        self.resume_from = self.latest_checkpoint()
        self.progress = Progress()
        self._saving: checkpoint.PendingSave | None = None
        if self.resume_from is not None:
            found = self.resume_from
            self.progress = Progress(**parallel.on_rank0_for_all(lambda: checkpoint.load_state(found)))
        self.throughput = Throughput(options, source.config, (origin.source if origin else source).config)
        self.shorten(self.progress.other_iterations)
        if self.resume_from is not None:
            self._check_batch(self.progress.global_batch_size)
            say(f"continuing from {self.resume_from}, iteration {self.progress.iteration}")
        self.progress.global_batch_size = options.training.global_batch_size
        if self._is_to_stop("start"):
            raise self._stopped("at the start of its first stage")
        self.metrics = MetricsLogger(
            options.output.run_dir.path,
            enabled=parallel.rank() == 0,
            total_iterations=options.training.train_iters,
            tokens_per_iteration=options.tokens_per_iteration,
            log_interval=options.output.log_interval,
            tensorboard_dir=options.output.tensorboard_dir,
            wandb_project=options.output.wandb_project,
            start_iteration=self.progress.iteration,
        )

    def shorten(self, iterations: int) -> None:
        """Leave out a number of training iterations, and let the learning rate fall over the others."""
        training, optimizer = self.options.training, self.options.optimizer
        training = replace(training, train_iters=training.train_iters - iterations)
        averaged = optimizer.averaged_from
        averaged = None if averaged is None else max(training.search_iters, averaged - iterations)
        optimizer = replace(optimizer, train_iters=training.train_iters, averaged_from=averaged)
        self.options = replace(self.options, training=training, optimizer=optimizer)
        self.data = replace(self.data, training=training)
        self.models = Models(self.options, self.source, self.data.teacher_cache, self.origin)

    def branch(self, folder: Path, iterations: int) -> "RunContext":
        """Return a run in a folder of its own, which begins like this one or goes on from its own checkpoint.

        Args:
            iterations: number of training iterations that it leaves out.
        """
        output = replace(self.options.output, run_dir=RunDir(folder), tensorboard_dir=None, wandb_project=None)
        options = replace(self.options, output=output)
        begun = RunContext(
            options, self.source, self.data, self._should_stop, self.origin, lambda: self._source_fingerprint
        )
        begun.shorten(iterations)
        return begun

    def _check_batch(self, begun_with: int | None) -> None:
        """Refuse to resume with another batch size. Without --global-batch-size, it follows the number of replicas."""
        size = self.options.training.global_batch_size
        if begun_with not in (None, size):
            raise UsageError(
                f"--global-batch-size: the run began with {begun_with}, and on these processes it would go on with "
                f"{size}; give --global-batch-size {begun_with}"
            )

    @property
    def kept_layers(self) -> list[int]:
        """Return the layers that stay, after they have been selected."""
        assert self.progress.kept_layers is not None, "the selection comes first"
        return self.progress.kept_layers

    def validate(self, which: str, model: PipelineModel) -> None:
        """Measure the validation loss of a model, where there is validation data, for the report."""
        if self.valid:
            at_once = _VALIDATED_AT_ONCE * self.options.sizes.pipeline
            with self.progress.timed("validation"):
                sums = self.records.summed(
                    [f"validation {which}"],
                    self.valid,
                    lambda batches, _: loss_sums(model, batches, self.models.shard)[None],
                    f"while it measures the {which} model",
                    at_once,
                )
                self.progress.valid[which] = {"loss": mean_of(sums[0])}

    @cached_property
    def records(self) -> Records:
        """The measurements of the run. Collective at the first use."""
        data, training = self.data, self.options.training
        scope = {
            "model": self._source_fingerprint,
            "calibration": data.calibration.fingerprint if data.calibration else None,
            "valid": data.valid.fingerprint if data.valid else None,
            "seq_length": self.options.data.seq_length,
            "seed": training.seed,
            "bf16": self.options.engine.bf16,
        }
        return Records(self.options.output.run_dir.measurements, scope)

    @cached_property
    def _source_fingerprint(self) -> str:
        return fingerprint_of(self.source) if self._given_identity is None else self._given_identity()

    def record(
        self, iteration: int, stage: str, result: StepResult, start: float, extra: dict[str, Any] | None = None
    ) -> None:
        """Record a finished iteration.

        Args:
            start: the time at which it began, by `time.perf_counter`.
        """
        seconds = time.perf_counter() - start
        self.progress.iteration = iteration + 1
        self.progress.spend(stage, seconds, self.options.tokens_per_iteration)
        num_kept = len(self.kept_layers) if result.mask is None else int((result.mask > 0).sum())
        record: dict[str, Any] = {
            "iteration": iteration + 1,
            "stage": stage,
            "loss": result.loss,
            **result.parts,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "num_kept": num_kept,
            "tokens": (iteration + 1 + self.progress.other_iterations) * self.options.tokens_per_iteration,
            "seconds": seconds,
        }
        if result.mask is not None:
            record["mask"] = result.mask.tolist()
        self.metrics.log(record | (extra or {}))

    def measured(
        self, iteration: int, result: StepResult, start: float, waited: float, student: Trainer
    ) -> dict[str, Any]:
        """Return the speed of a step for its record (see `Throughput.of_step`).

        Args:
            start: the time at which the step began, by `time.perf_counter`.
            waited: seconds until its data were there.
        """
        seconds = time.perf_counter() - start
        flops = self.throughput.flops(self.progress.kept_layers or [], result.mask)
        return self.throughput.of_step(iteration, seconds, waited, student.times, flops)

    @property
    def weights_are_the_source(self) -> bool:
        """Return whether the weights still equal the source, because nothing or only scores were trained."""
        iteration, training = self.progress.iteration, self.options.training
        return iteration == 0 or (iteration <= training.search_iters and not training.trains_weights_in_search)

    def saved_weights(self) -> Path | None:
        """Return the newest checkpoint if it contains weights. Collective."""
        return None if self.weights_are_the_source else self.latest_checkpoint()

    def latest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that rank 0 sees. Collective."""
        return parallel.on_rank0_for_all(lambda: checkpoint.latest(self.options.output.run_dir.checkpoints))

    def save_state(self) -> None:
        """Save the progress of a run that has trained nothing yet."""
        self._save(0, None)

    def save_if_due(self, trainer: Trainer, force: bool) -> None:
        """Save a checkpoint at the interval, at the ends of stages, and when asked to stop.

        Raises:
            RunStopped: a rank was asked to stop. The checkpoint has been saved.
        """
        interval, iteration = self.options.output.save_interval, self.progress.iteration
        stops = self._is_to_stop("iteration")
        is_due = bool(interval and iteration % interval == 0)
        self.finish_saving(wait=force or stops or is_due)
        # What follows a stage reads its last checkpoint, and a run that stops ends with it.
        if force or stops or (is_due and not self.options.output.async_save):
            self.save(trainer)
        elif is_due:
            folder, trained = self.options.output.run_dir.checkpoints, None if self.weights_are_the_source else trainer
            self._saving = checkpoint.save_in_background(folder, iteration, trained, self.progress.state())
        if stops:
            raise self._stopped(f"at iteration {iteration}")

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint. Collective."""
        self._save(self.progress.iteration, None if self.weights_are_the_source else trainer)

    def finish_saving(self, wait: bool) -> None:
        """Put a checkpoint that is written in the background in place, if there is one and it is complete. Collective.

        Args:
            wait: wait until it is complete.
        """
        if self._saving is not None and self._saving.finish(wait):
            self._saving = None
            stopping.saved()

    def close(self) -> None:
        """Close the metrics and the measurements. After an error, call `abandon`."""
        self._close_records()
        self.metrics.close()

    def abandon(self) -> None:
        """Close the metrics and the measurements; errors while closing are dropped in favor of the run's own error."""
        with suppress(OSError):
            self._close_records()
        with suppress(OSError):
            self.metrics.close()

    def _save(self, iteration: int, trainer: Trainer | None) -> None:
        with stopping.saving():
            self.finish_saving(wait=True)
            checkpoint.save(self.options.output.run_dir.checkpoints, iteration, trainer, self.progress.state())
        stopping.saved()

    def _close_records(self) -> None:
        if "records" in self.__dict__:
            self.records.close()

    def _is_to_stop(self, stage: str) -> bool:
        asked = self._should_stop
        if asked is None:
            return False
        return parallel.any_rank(asked.is_due(stage) if isinstance(asked, StopRequest) else asked())

    def _stopped(self, where: str) -> Exception:
        return stopping.stopped(where, self._should_stop)


def agreed_layers(kept: list[int], options: RunOptions) -> list[int]:
    """Return the layers that a method keeps, which must be the same on every rank. Collective.

    Raises:
        MegapruneError: the layers differ between ranks; raised on every rank.
    """
    mask = masks_of([kept], options.model.arch.num_layers)
    error = None
    if not torch.equal(mask, parallel.broadcast_from_rank0(mask.clone())):
        name = options.selection.name
        error = MegapruneError(
            f"--method {name} chose different layers on different ranks: it must depend on --seed alone"
        )
    parallel.raise_together(error)
    return kept
