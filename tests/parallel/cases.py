"""Cases for any number of processes, under torchrun or alone."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing

from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import OnlineTeacher, vocab_shard
from megaprune.importance.evaluator import LayerEvaluator
from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import (
    export_weights,
    gather_over_tensor_parallel,
    import_weights,
)
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages
from megaprune.mcore.pipeline_model import global_name
from megaprune.models.sizes import layer_costs, output_cost
from megaprune.pruning.step import search_step
from megaprune.selection.budget import Budget
from megaprune.utils.errors import RunStopped
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config
from megaprune.weights.torch_dist.layout import checkpoint_key
from tests.helpers import tiny


def model(hf_model: str, sizes: dict[str, Any], out: str) -> None:
    """Import a model, compute logits, and export it again in several files: ``out/logits.pt`` and ``out/hf``."""
    sizes, source, folder = ParallelSizes(**sizes), HFSource(hf_model), Path(out)
    arch = source.family.architecture(source.config)
    parallel.initialize(sizes)
    if parallel.rank() == 0:
        (folder / "hf").mkdir(parents=True)
    stages = balanced_stages(layer_costs(source.config), sizes.pipeline, output_cost(source.config))
    built = build_model(arch, stages, EngineOptions(sizes))
    import_weights(built, source)
    batch = tiny.make_batch(tiny.random_tokens())
    for logits in schedule.forward(built, [batch], whole_vocabulary):
        if parallel.tensor_parallel().rank == parallel.data_parallel_rank() == 0:
            torch.save(logits.transpose(0, 1)[..., : arch.vocab_size].contiguous(), folder / "logits.pt")
    export_weights(built, source, range(arch.num_layers), folder / "hf", max_shard_bytes=100_000)
    if parallel.rank() == 0:
        write_pruned_config(source, range(arch.num_layers), folder / "hf")
    parallel.finish()


def load_by_the_core(hf_model: str, megatron_path: str, sizes: dict[str, Any]) -> None:
    """Load an imported checkpoint by Megatron-Core at a layout, and compare it with the import of its source."""
    sizes, source = ParallelSizes(**sizes), HFSource(hf_model)
    arch = source.family.architecture(source.config)
    parallel.initialize(sizes)
    stages = balanced_stages(layer_costs(source.config), sizes.pipeline, output_cost(source.config))
    expected, loaded = (build_model(arch, stages, EngineOptions(sizes)) for _ in range(2))
    import_weights(expected, source)
    keys = {rule.megatron: checkpoint_key(rule) for rule in source.family.rules(source.config) if rule.export}
    wanted = {}
    for name, entry in loaded.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
        if not name.endswith("_extra_state"):
            # The model has local layers, the checkpoint the keys of Transformer Engine's. Keys of experts are equal.
            entry.key = (
                keys.get(global_name(name, loaded.chunks[0]), entry.key) if ".experts." not in name else entry.key
            )
            wanted[name] = entry
    loaded.load_state_dict(dist_checkpointing.load(wanted, megatron_path), strict=False)
    found, count = dict(loaded.named_weights()), 0
    for name, weight in expected.named_weights():
        rows = min(len(weight), arch.vocab_size) if "embedding" in name or "output_layer" in name else len(weight)
        if sizes.tensor == 1:
            assert torch.equal(found[name][:rows], weight[:rows]), name
        elif rows == len(weight):
            assert torch.equal(found[name], weight), name
        count += 1
    assert count == len(found) > 10
    parallel.finish()


def mask_gradient(hf_model: str, sizes: dict[str, Any], out: str) -> None:
    """Run one step of search on a fixed mask, each replica with its share of four uneven windows. Write to ``out`` its
    loss, gradient norm and mask gradient, and the layers' Taylor importance before the step.
    """
    sizes, source = ParallelSizes(**sizes), HFSource(hf_model)
    arch, engine = source.family.architecture(source.config), EngineOptions(sizes)
    gate, selector = LayerGate(), tiny.FixedMask()
    parallel.initialize(sizes)
    built = build_model(arch, balanced_stages([1] * arch.num_layers, sizes.pipeline), engine, gate)
    import_weights(built, source)
    batches = tiny.uneven_batches([1, 1, 1, 1])[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    evaluator = LayerEvaluator(
        built, gate, lambda *_: batches, len(batches), Budget.of_layers(arch.num_layers, 4), vocab_shard(arch)
    )
    taylor = evaluator.taylor_importance()
    trainer = Trainer(built, engine, OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=1.0))
    original = build_model(arch, balanced_stages([1] * arch.num_layers, sizes.pipeline), engine)
    import_weights(original, source)
    teacher = OnlineTeacher(original, vocab_shard(arch), 10)
    objective = make_objective("adaptive", "rest", vocab_shard(arch), teacher, 0.3)
    result = search_step(trainer, batches, objective, 0, selector, gate)
    found = {
        "loss": result.loss,
        "parts": result.parts,
        "norm": result.grad_norm,
        "mask": selector.mask_grad,
        "taylor": taylor,
    }
    torch.save(found, f"{out}.{parallel.rank()}")
    parallel.finish()


def prune(argv: list[str]) -> None:
    """Complete a run."""
    tiny.run_here(argv)


def prune_any_candidate(argv: list[str]) -> None:
    """Complete a run that compares its best candidates with their stitch, however far apart they are by KL."""
    with patch("megaprune.pruning.stitched_choice.CLOSE", 1e9):
        tiny.run_here(argv)


def interrupted_prune(stops: list[list[Any]]) -> None:
    """Execute a run in several parts, each with its own flags, stopped after this number of its iterations (None: at
    the end).
    """
    for argv, iterations in stops:
        try:
            tiny.run_here(argv, tiny.stop_after(iterations))
        except RunStopped:
            assert iterations is not None
        else:
            assert iterations is None, f"the run was not stopped after {iterations} iterations"


def whole_vocabulary(logits: torch.Tensor, tokens: schedule.LossTokens) -> torch.Tensor:
    """Return the logits [s, b, padded vocab] from each rank's [s, b, vocab / tp]."""
    return torch.cat(gather_over_tensor_parallel(logits), dim=-1)
