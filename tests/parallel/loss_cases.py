"""Steps of recovery with each loss, on any number of processes or alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaprune.distillation.hidden_states import WithHiddenStates
from megaprune.distillation.multi_token import WithMTP
from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import OnlineTeacher, vocab_shard
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import export_weights, import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages
from megaprune.pruning.step import train_step
from megaprune.weights.source import HFSource
from tests.helpers import tiny

_PP2, _EP2 = ("--pipeline-model-parallel-size", "2"), ("--expert-model-parallel-size", "2")
_TP2_SP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
# The parts of a run with every loss: flags and number of iterations.
STOPS = [((*_EP2,), 2), (_PP2, 3), ((*_TP2_SP, *_EP2), None)]
HIDDEN_KEPT, MTP_KEPT = [0, 2, 3, 6], [0, 2, 4]


def argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a run with every loss: 3 iterations of search and 3 of recovery."""
    flags = ("--train-iters", "6", "--search-iters", "3", "--kd-loss-alpha", "0.5", "--hidden-loss-weight", "0.5")
    return tiny.prune_argv(model, data, save, *flags, "--mtp-loss-scaling-factor", "0.3", *extra)


def hidden_states(
    hf_model: str, sizes: dict[str, Any], stages: list[list[int]], recompute: str | None, out: str
) -> None:
    """Run two steps with a loss on hidden states, each replica with its share of four uneven windows. Write to ``out``
    the losses, gradient norms and parts.

    Args:
        stages: layers on each pipeline stage, of the teacher and of the student.
    """
    source, kept = HFSource(hf_model), HIDDEN_KEPT
    arch, engine = source.family.architecture(source.config), _engine(sizes, recompute)
    parallel.initialize(engine.sizes)
    original, student = build_model(arch, stages[0], engine), build_model(arch.pruned(kept), stages[1], engine)
    import_weights(original, source)
    import_weights(student, source, kept)
    teacher, trainer = OnlineTeacher(original, vocab_shard(arch), 10), _trainer(student, engine)
    objective = make_objective("adaptive", "rest", vocab_shard(arch), teacher, 0.5)
    objective = WithHiddenStates(objective, teacher, trainer.model, dict(enumerate(kept)), 2.0)
    _two_steps(trainer, objective, out)
    parallel.finish()


def multi_token(hf_model: str, sizes: dict[str, Any], stages: list[list[int]], recompute: str | None, out: str) -> None:
    """Run two steps with the losses of an MTP layer and on hidden states, and export the model. The arguments are those
    of `hidden_states`; the model is in ``out-hf``.
    """
    source, kept, folder = HFSource(hf_model), MTP_KEPT, Path(f"{out}-hf")
    arch, engine = source.family.architecture(source.config), _engine(sizes, recompute)
    parallel.initialize(engine.sizes)
    original = build_model(arch, stages[0], engine)
    student = build_model(replace(arch, num_mtp=1).pruned(kept), stages[1], engine)
    import_weights(original, source)
    import_weights(student, source, kept)
    teacher, trainer = OnlineTeacher(original, vocab_shard(arch), 10), _trainer(student, engine)
    objective = WithMTP(make_objective("kl", "rest", vocab_shard(arch), teacher, 0.5), vocab_shard(arch), 1, 0.5)
    objective = WithHiddenStates(objective, teacher, trainer.model, dict(enumerate(kept)), 2.0)
    _two_steps(trainer, objective, out)
    if parallel.rank() == 0:
        folder.mkdir()
    parallel.barrier()
    export_weights(trainer.model, source, kept, folder, max_shard_bytes=100_000)
    parallel.finish()


def full_training(hf_model: str, sizes: dict[str, Any], out: str) -> None:
    """Run two steps of language modeling that train every weight. Write to ``out`` the losses and gradient norms."""
    source, engine = HFSource(hf_model), _engine(sizes, "full")
    arch = source.family.architecture(source.config)
    parallel.initialize(engine.sizes)
    model = build_model(arch, balanced_stages([1] * arch.num_layers, engine.sizes.pipeline), engine)
    import_weights(model, source)
    _two_steps(_trainer(model, engine), make_objective("ce", "rest", vocab_shard(arch), None), out)
    parallel.finish()


def _engine(sizes: dict[str, Any], recompute: str | None) -> EngineOptions:
    return EngineOptions(ParallelSizes(**sizes), recompute_granularity=recompute)


def _trainer(model: Any, engine: EngineOptions) -> Trainer:
    return Trainer(model, engine, OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.1, clip_grad=1.0))


def _two_steps(trainer: Trainer, objective: Any, out: str) -> None:
    batches = tiny.uneven_batches([1, 1, 1, 1])[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    steps = [train_step(trainer, batches, objective, iteration) for iteration in range(2)]
    torch.save([(step.loss, step.grad_norm, step.parts) for step in steps], f"{out}.{parallel.rank()}")
