"""The cost of a search step beside that of a plain training step, of the same model with random weights."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megaprune import device
from megaprune.evaluation.measuring import SavedActivations, interleaved, median_ratio
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model, vocab_shard
from megaprune.mcore.gated_layer import LayerGate
from megaprune.mcore.trainer import OptimizerOptions, Trainer
from megaprune.models import Architecture
from megaprune.selection.budget import Budget
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.training.data import Batch
from megaprune.training.step import Objective, search_step, train_step

PLAIN = "plain"
# Small, so that random labels don't blow the random weights up.
_LR = 1e-5


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Args:
        kept_layers: layers that the mask keeps; None is the plain step of a model without gates.
        skip_masked_backward: see `LayerGate`.
    """

    name: str
    kept_layers: int | None
    skip_masked_backward: bool = True

    def ideal(self, num_layers: int) -> float:
        """Compute of the layers by the plain step's, where a backward pass costs two forward passes: (1 + 2k/L) / 3."""
        if self.kept_layers is None or not self.skip_masked_backward:
            return 1.0
        return (1 + 2 * self.kept_layers / num_layers) / 3


@dataclass(frozen=True)
class Sample:
    """Seconds of one step: all of it, and without clearing gradients and updating weights."""

    step: float
    forward_backward: float


@dataclass(frozen=True)
class Memory:
    """Bytes that one step takes. `activations`: the most that autograd held for the backward pass, parameters left
    out; `peak`: the most that was allocated beyond weights, gradients and optimizer state (None: nobody counts)."""

    activations: int
    peak: int | None


def cases(num_layers: int) -> list[Case]:
    """The steps that are compared; the first is the baseline."""
    quarter, half = (num_layers - round(share * num_layers) for share in (0.25, 0.5))
    return [
        Case(PLAIN, None),
        Case("gated, nothing masked", num_layers),
        Case("search, 25% masked", quarter),
        Case("search, 50% masked", half),
        Case("50% masked, backward not skipped", half, skip_masked_backward=False),
    ]


def measure_steps(
    arch: Architecture, engine: EngineOptions, micro_batch_size: int, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Times the steps of all cases, interleaved, then measures the memory of one more step of each. Collective.

    The steps are the run's own (`megaprune.training.step`), with cross-entropy loss and one micro-batch: gradients
    cleared, mask drawn, forward, backward, reductions, weights and scores updated.

    Args:
        arch: at least 4 layers, of which the first and the last are never masked.

    Returns:
        A record for each case, the same keys in each; ratios are to the first.
    """
    setup = _Setup(arch, engine, micro_batch_size, rounds=repeats + warmup + 1)
    every = cases(arch.num_layers)
    steps = {case.name: setup.stepper(case) for case in every}
    samples = interleaved({name: stepper.timed_step for name, stepper in steps.items()}, repeats, warmup)
    memory = {name: stepper.measure_memory() for name, stepper in steps.items()}
    tokens = micro_batch_size * engine.seq_length * parallel.data_parallel_size()
    return [_record(case, arch.num_layers, tokens, samples, memory) for case in every]


def _record(
    case: Case, num_layers: int, tokens: int, samples: dict[str, list[Sample]], memory: dict[str, Memory]
) -> dict[str, Any]:
    step, baseline_step = ([sample.step for sample in samples[name]] for name in (case.name, PLAIN))
    passes, baseline_passes = ([sample.forward_backward for sample in samples[name]] for name in (case.name, PLAIN))
    return {
        "case": case.name,
        "kept_layers": num_layers if case.kept_layers is None else case.kept_layers,
        "forward_backward_seconds": statistics.median(passes),
        "step_seconds": statistics.median(step),
        "tokens_per_second": tokens / statistics.median(step),
        "forward_backward_ratio": median_ratio(passes, baseline_passes),
        "step_ratio": median_ratio(step, baseline_step),
        "ideal_ratio": case.ideal(num_layers),
        "activation_bytes": memory[case.name].activations,
        "activation_ratio": memory[case.name].activations / memory[PLAIN].activations,
        "peak_bytes": memory[case.name].peak,
        "rounds": [asdict(sample) for sample in samples[case.name]],
    }


class _Setup:
    """What all cases share: the batch, a model of stock layers and a gated one."""

    def __init__(self, arch: Architecture, engine: EngineOptions, micro_batch_size: int, rounds: int) -> None:
        self._arch, self._engine, self._rounds = arch, engine, rounds
        self._objective = Objective("ce", "rest", vocab_shard(arch), None)
        self._batch = _random_batch(arch.vocab_size, micro_batch_size, engine.seq_length)
        self._gate = LayerGate()
        self._plain, self._gated = self._trainer(None), self._trainer(self._gate)

    def _trainer(self, gate: LayerGate | None) -> "_TimedTrainer":
        model = build_model(self._arch, [self._arch.num_layers], self._engine, gate)
        _initialize(model)
        options = OptimizerOptions(
            lr=_LR,
            min_lr=_LR,
            lr_decay_style="constant",
            lr_warmup_iters=0,
            train_iters=self._rounds,
            weight_decay=0.0,
            clip_grad=1.0,
        )
        return _TimedTrainer(model, self._engine, options)

    def stepper(self, case: Case) -> "_Stepper":
        if case.kept_layers is None:
            return _Stepper(self._plain, lambda number: train_step(self._plain, [self._batch], self._objective, number))
        num_layers = self._arch.num_layers
        # Another draw at every step, always of this many layers.
        selector = GumbelTopK(
            torch.zeros(num_layers),
            Budget.of_layers(num_layers, case.kept_layers),
            {0, num_layers - 1},
            self._rounds,
            ramp=1 / self._rounds,
        )

        def step(number: int) -> None:
            self._gate.skip_masked_backward = case.skip_masked_backward
            search_step(self._gated, [self._batch], self._objective, number, selector, self._gate)

        return _Stepper(self._gated, step)


class _Stepper:
    """Takes a case's steps one by one."""

    def __init__(self, trainer: "_TimedTrainer", step: Callable[[int], Any]) -> None:
        self._trainer, self._step, self._number = trainer, step, 0

    def _next(self) -> None:
        self._step(self._number)
        self._number += 1

    def timed_step(self) -> Sample:
        self._trainer.seconds = 0.0
        with _stopwatch() as elapsed:
            self._next()
        return Sample(elapsed(), elapsed() - self._trainer.seconds)

    def measure_memory(self) -> Memory:
        saved = SavedActivations(self._trainer.model.parameters())
        with saved:
            peak = device.peak_memory_of(self._next)
        return Memory(saved.peak, peak)


class _TimedTrainer(Trainer):
    """Adds up the time of clearing gradients and updating weights."""

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
    """Yields what, after the block, gives the seconds that the block and the device's work in it took."""
    device.synchronize()
    start, end = time.perf_counter(), None
    yield lambda: end - start
    device.synchronize()
    end = time.perf_counter()


def _random_batch(vocab_size: int, micro_batch_size: int, seq_length: int) -> Batch:
    """The same on all ranks of a replica."""
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
def _initialize(model: torch.nn.Module) -> None:
    """Weights as a new model's: normal(0, 0.02), norms 1."""
    generator = torch.Generator().manual_seed(parallel.tensor_parallel().rank)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
