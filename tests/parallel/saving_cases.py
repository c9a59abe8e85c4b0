"""Records of the memory, communication and files of a rank while it saves a checkpoint or exports a model."""

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaprune.mcore import checkpoint, optimizer_state, parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import export_weights, import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages
from megaprune.pruning.export import copy_weights
from megaprune.weights.source import HFSource
from megaprune.weights.writer import ShardWriter, WrittenShard
from tests.helpers.gradients import step

FILE_BYTES = 50_000


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that operations within the block allocated or communicated."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.communicated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
            for tree in ((args, kwargs), out)
        )
        if str(func).startswith("c10d."):
            self.communicated = max([self.communicated, *(tensor.numel() for tensor in given)])
            return out
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in made:
            if tensor.untyped_storage().data_ptr() not in known:
                self.allocated = max(self.allocated, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def saved_in_parts(hf_model: str, sizes: dict[str, Any], bf16: bool, out: str) -> None:
    """Save and load the distributed optimizer. Write the sizes of what was allocated, and of the rank's own part."""
    sizes, source, folder = ParallelSizes(**sizes), HFSource(hf_model), Path(out)
    parallel.initialize(sizes)
    saved, loaded = (_trainer(source, sizes, bf16) for _ in range(2))
    for iteration in range(2):
        step(saved, iteration)
    with Largest() as at_save:
        path = checkpoint.save(folder / "checkpoints", 2, saved, {})
    with Largest() as at_load:
        checkpoint.load(path, loaded)
    for trainer in (saved, loaded):
        step(trainer, 2)
    for (name, parameter), other in zip(saved.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    buffers = [buffer for part in optimizer_state.parts(saved.optimizer) for buffer in part.buffers]
    found = {
        "buffer": max(buffer.numel for buffer in buffers),
        "parameter": max(parameter.numel() for parameter in saved.model.parameters()),
        "allocated": max(at_save.allocated, at_load.allocated),
        "communicated": max(at_save.communicated, at_load.communicated),
    }
    torch.save(found, folder / f"found.{parallel.rank()}")
    parallel.finish()


def exported(hf_model: str, sizes: dict[str, Any], trained: bool, out: str) -> None:
    """Export a model, as one that was trained or as a copy of its source. Write the bytes of this rank's files."""
    sizes, source, folder = ParallelSizes(**sizes), HFSource(hf_model), Path(out) / "hf"
    parallel.initialize(sizes)
    arch, layers = source.family.architecture(source.config), range(source.config["num_hidden_layers"])
    parallel.on_rank0(lambda: folder.mkdir(parents=True))
    written: list[WrittenShard] = []
    finish_shard = ShardWriter.close

    def noted(self: ShardWriter) -> list[WrittenShard]:
        found = finish_shard(self)
        written[:] = found
        return found

    ShardWriter.close = noted
    try:
        if trained:
            model = build_model(arch, balanced_stages([1] * arch.num_layers, sizes.pipeline), EngineOptions(sizes))
            import_weights(model, source)
            export_weights(model, source, layers, folder, FILE_BYTES)
        else:
            copy_weights(source, layers, folder, FILE_BYTES, keep_mtp=True)
    finally:
        ShardWriter.close = finish_shard
    (Path(out) / f"bytes.{parallel.rank()}").write_text(str(sum(shard.num_bytes for shard in written)))
    parallel.finish()


def _trainer(source: HFSource, sizes: ParallelSizes, bf16: bool) -> Trainer:
    arch, engine = source.family.architecture(source.config), EngineOptions(sizes, bf16=bf16)
    model = build_model(arch, balanced_stages([1] * arch.num_layers, sizes.pipeline), engine)
    import_weights(model, source)
    return Trainer(model, engine, OptimizerOptions(1e-2, 0.0, "constant", 0, 10, 0.1, 0.0, distributed=True))
