"""The steps that `benchmark train-step` compares: search, recovery and plain training of one random model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megaprune import device
from megaprune.benchmarks.timing import SavedActivations
from megaprune.data.batches import Batch
from megaprune.distillation.cache_format import CacheKey, CachePlan
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.cache_writer import ShardFile, begin, finish
from megaprune.distillation.objectives import Objective, make_objective
from megaprune.distillation.teachers import CachedTeacher, OnlineTeacher, SelfTeacher, Teacher, vocab_shard
from megaprune.mcore import parallel
from megaprune.mcore.adapters import attach_adapters
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models import Architecture
from megaprune.pruning.step import search_step, train_step
from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import GumbelTopK

PLAIN = "plain"
RECOVERY, ADAPTERS = "recovery, cross-entropy", "adapters, cross-entropy"
_TOP_K = 10
_ADAPTERS = LoRAOptions(16, 32.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
# Small, so that training on random labels stays finite.
_LR = 1e-5


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Args:
        kept_layers: layers that run and learn.
        ideal: compute of the layers relative to the baseline's; a backward pass costs two forward passes, or one if
            the weights are frozen.
        baseline: the case that this one is compared with.
        kind: a plain training step, a search step of the gated model, recovery of a pruned model, or of adapters.
        teacher: the teacher of recovery; None for cross-entropy.
        skip_masked_backward: see `LayerGate`.
    """

    name: str
    kept_layers: int
    ideal: float
    baseline: str = PLAIN
    kind: Literal["plain", "search", "recovery", "adapters"] = "search"
    teacher: Literal["online", "cached", "self"] | None = None
    skip_masked_backward: bool = True


@dataclass(frozen=True)
class Sample:
    """Seconds of one step: in total, and without clearing gradients and updating weights."""

    step: float
    forward_backward: float


@dataclass(frozen=True)
class Memory:
    """Bytes that one step takes.

    Args:
        activations: the maximum that autograd held for the backward pass, without parameters.
        peak: the maximum that was allocated beyond weights, gradients and optimizer state; None if the device does
            not count.
    """

    activations: int
    peak: int | None


def cases(num_layers: int) -> list[Case]:
    """Return the steps that are compared; the first is the baseline of all steps of the whole model."""
    quarter, half = (num_layers - round(share * num_layers) for share in (0.25, 0.5))
    share = quarter / num_layers
    return [
        Case(PLAIN, num_layers, 1.0, kind="plain"),
        Case("gated, nothing masked", num_layers, 1.0),
        Case("search, 25% masked", quarter, (1 + 2 * share) / 3),
        Case("search, 50% masked", half, (1 + 2 * half / num_layers) / 3),
        Case("50% masked, backward not skipped", half, 1.0, skip_masked_backward=False),
        Case(RECOVERY, quarter, share, kind="recovery"),
        Case("recovery, cached teacher", quarter, 1.0, RECOVERY, "recovery", "cached"),
        Case("recovery, online teacher", quarter, 1 + 1 / (3 * share), RECOVERY, "recovery", "online"),
        Case(ADAPTERS, quarter, 2 * share / 3, kind="adapters"),
        Case("adapters, self as teacher", quarter, 1 + 1 / (2 * share), ADAPTERS, "adapters", "self"),
    ]


class StepCases:
    """The batch that all cases share, and a model of each kind that is trained."""

    def __init__(
        self, arch: Architecture, engine: EngineOptions, micro_batch_size: int, rounds: int, folder: Path
    ) -> None:
        self._arch, self._engine, self._rounds, self._folder = arch, engine, rounds, folder
        self._shard = vocab_shard(arch)
        self._batch = _random_batch(arch.vocab_size, micro_batch_size, engine.seq_length)
        self._gates = {"search": LayerGate(), "adapters": LayerGate()}
        self._trainers: dict[str, _TimedTrainer] = {}

    def stepper(self, case: Case) -> "Stepper":
        """Return what takes a case's steps."""
        trainer = self._trainer(case)
        if case.kind == "search":
            return Stepper(trainer, self._search(case, trainer))
        objective = self._objective(case, trainer)
        return Stepper(trainer, lambda number: train_step(trainer, [self._batch], objective, number))

    def _trainer(self, case: Case) -> "_TimedTrainer":
        if case.kind not in self._trainers:
            dropped = self._arch.num_layers - case.kept_layers if case.kind in ("recovery", "adapters") else 0
            kept = [0, *range(1 + dropped, self._arch.num_layers)]
            whole = case.kind != "recovery"
            model = self._model(self._arch if whole else self._arch.pruned(kept), self._gates.get(case.kind))
            if case.kind == "adapters":
                attach_adapters(model, _ADAPTERS, seed=0)
                self._gates["adapters"].bypass(set(range(self._arch.num_layers)) - set(kept))
            self._trainers[case.kind] = _TimedTrainer(model, self._engine, _optimizer_options(self._rounds))
        return self._trainers[case.kind]

    def _model(self, arch: Architecture, gate: LayerGate | None) -> PipelineModel:
        model = build_model(arch, [arch.num_layers], self._engine, gate)
        _initialize(model)
        return model

    def _search(self, case: Case, trainer: "_TimedTrainer") -> Callable[[int], None]:
        num_layers, gate = self._arch.num_layers, self._gates["search"]
        # A new sample at every step, always of this many layers.
        selector = GumbelTopK(
            torch.zeros(num_layers),
            Budget.of_layers(num_layers, case.kept_layers),
            {0, num_layers - 1},
            self._rounds,
            ramp=1 / self._rounds,
        )
        objective = make_objective("ce", "rest", self._shard, None)

        def step(number: int) -> None:
            gate.skip_masked_backward = case.skip_masked_backward
            search_step(trainer, [self._batch], objective, number, selector, gate)

        return step

    def _objective(self, case: Case, trainer: "_TimedTrainer") -> Objective:
        if case.teacher is None:
            return make_objective("ce", "rest", self._shard, None)
        if case.teacher == "self":
            teacher: Teacher = SelfTeacher(trainer.ddp, self._gates["adapters"], self._shard, _TOP_K)
        else:
            model = in_half_precision(self._model(self._arch, None), self._engine)
            teacher = OnlineTeacher(model, self._shard, _TOP_K)
        if case.teacher == "cached":
            teacher = self._cached(teacher)
        return make_objective("adaptive", "rest", self._shard, teacher)

    def _cached(self, teacher: Teacher) -> CachedTeacher:
        """Write the teacher's targets of the batch to a cache, and return the teacher that reads it."""
        windows = len(self._batch.sample_ids)
        key = CacheKey("model", "tokenizer", "data", self._engine.seq_length, windows, self._arch.vocab_size)
        plan = CachePlan(key, _TOP_K, "bf16" if self._engine.bf16 else "fp32")
        folder = self._folder / f"replica-{parallel.rank()}"
        found = teacher.targets([self._batch])[0]
        folder.mkdir()
        for number in range(plan.num_shards):
            some = plan.windows_of(number)
            with ShardFile(folder, plan, number) as shard:
                shard.add(some, found.map(partial(_of_windows, some)))
                shard.close()
        begin(folder, plan)
        finish(folder, folder.with_name(f"{folder.name}-cache"), plan)
        return CachedTeacher(TeacherCache(folder.with_name(f"{folder.name}-cache"), key, _TOP_K))


def _of_windows(some: range, column: Tensor) -> Tensor:
    return column[:, some.start : some.stop].cpu()


def _optimizer_options(rounds: int) -> OptimizerOptions:
    return OptimizerOptions(
        lr=_LR,
        min_lr=_LR,
        lr_decay_style="constant",
        lr_warmup_iters=0,
        train_iters=rounds,
        weight_decay=0.0,
        clip_grad=1.0,
    )


class Stepper:
    """The steps of a case, taken one by one."""

    def __init__(self, trainer: "_TimedTrainer", step: Callable[[int], Any]) -> None:
        self._trainer, self._step, self._number = trainer, step, 0

    def _next(self) -> None:
        self._step(self._number)
        self._number += 1

    def timed_step(self) -> Sample:
        """Take a step and time it."""
        self._trainer.seconds = 0.0
        with _stopwatch() as elapsed:
            self._next()
        return Sample(elapsed(), elapsed() - self._trainer.seconds)

    def measure_memory(self) -> Memory:
        """Take a step and measure its memory."""
        saved = SavedActivations(self._trainer.model.parameters())
        with saved:
            peak = device.peak_memory_of(self._next)
        return Memory(saved.peak, peak)


class _TimedTrainer(Trainer):
    """A trainer that adds up the time of clearing gradients and updating weights."""

    seconds = 0.0

    def zero_grad(self) -> None:
        with _stopwatch() as elapsed:
            super().zero_grad()
        self.seconds += elapsed()

    def step(self, iteration: int) -> tuple[float, float | None]:
        with _stopwatch() as elapsed:
            result = super().step(iteration)
        self.seconds += elapsed()
        return result


@contextmanager
def _stopwatch() -> Iterator[Callable[[], float]]:
    """A block that yields a function; after the block it returns the seconds of the block and the device's work."""
    device.synchronize()
    start = end = time.perf_counter()
    yield lambda: end - start
    device.synchronize()
    end = time.perf_counter()


def _random_batch(vocab_size: int, micro_batch_size: int, seq_length: int) -> Batch:
    """A random batch, the same on all ranks of a replica."""
    generator = torch.Generator().manual_seed(parallel.data_parallel_rank())
    tokens = torch.randint(vocab_size, (micro_batch_size, seq_length + 1), generator=generator)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(micro_batch_size, seq_length),
        position_ids=torch.arange(seq_length).expand(micro_batch_size, seq_length),
        sample_ids=list(range(micro_batch_size)),
    )


@torch.no_grad()
def _initialize(model: PipelineModel) -> None:
    """Initialize weights as of a new model: normal(0, 0.02), norms 1."""
    generator = torch.Generator().manual_seed(parallel.tensor_parallel().rank)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
