"""Steps through Megatron-Core's spec for Transformer Engine, or through the project's own layers."""

from pathlib import Path
from typing import Any

import torch

from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import checkpoint, parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import export_weights, import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.pruning.step import train_step
from megaprune.weights.source import HFSource
from tests.helpers import tiny


def steps(hf_model: str, sizes: dict[str, Any], te: bool, out: str) -> None:
    """Run two steps of cross-entropy, save and load a checkpoint, run a third step, and export the model.

    ``out`` gets the losses and gradient norms (``steps.pt``), the names of the weights (``names.pt``),
    and the model (``hf``).
    """
    source, folder = HFSource(hf_model), Path(out)
    arch, engine = source.family.architecture(source.config), EngineOptions(ParallelSizes(**sizes), te)
    parallel.initialize(engine.sizes)

    def trainer() -> Trainer:
        model = build_model(arch, [arch.num_layers], engine)
        import_weights(model, source)
        options = OptimizerOptions(1e-2, 0.0, "constant", 0, 10, weight_decay=0.1, clip_grad=1.0, distributed=True)
        return Trainer(model, engine, options)

    objective, replicas = make_objective("ce", "rest", vocab_shard(arch), None), parallel.data_parallel_size()
    batches = tiny.uneven_batches([1, 1, 1, 1])[parallel.data_parallel_rank() :: replicas]
    first = trainer()
    found = [train_step(first, batches, objective, iteration) for iteration in range(2)]
    saved = checkpoint.save(folder / "checkpoints", 2, first, {})
    second = trainer()
    checkpoint.load(saved, second)
    found += [train_step(each, batches, objective, 2) for each in (first, second)]
    if parallel.rank() == 0:
        (folder / "hf").mkdir()
        torch.save([(step.loss, step.grad_norm) for step in found], folder / "steps.pt")
        torch.save([name for name, _ in second.model.named_weights()], folder / "names.pt")
    parallel.barrier()
    export_weights(second.model, source, range(arch.num_layers), folder / "hf", max_shard_bytes=100_000)
    parallel.finish()
