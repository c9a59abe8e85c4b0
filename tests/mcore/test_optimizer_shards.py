"""Shards of the distributed optimizer's states: boxes, and the same stored tensors as the core's own format."""

import importlib.util
import itertools

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megaprune.mcore import checkpoint
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.optimizer_shards import boxes
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource
from tests.helpers.gradients import step


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (4, 1), (2, 3, 2), (2, 1, 3)])
def test_boxes_cover_a_range_once_and_are_contiguous(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        assert len(found) <= 2 * len(shape) - 1
        parts = [
            whole[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
            for offset, size in found
        ]
        assert all(part.is_contiguous() for part in parts)
        assert [int(value) for part in parts for value in part.flatten()] == list(range(start, stop))


@pytest.fixture(scope="module")
def core():
    """The core's own distributed optimizer, from a second copy of its module."""
    spec = importlib.util.spec_from_file_location("megatron.core.optimizer.unpatched", distrib_optimizer.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DistributedOptimizer


def make_trainer(source):
    arch = source.family.architecture(source.config)
    engine = EngineOptions(ParallelSizes(), bf16=True)
    model = build_model(arch, [arch.num_layers], engine)
    import_weights(model, source)
    return Trainer(model, engine, OptimizerOptions(1e-2, 0.0, "constant", 0, 10, 0.1, 0.0, distributed=True))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", ["qwen3_tied", "deepseek_v3"])
@pytest.mark.parametrize("saved_by", ["core", "megaprune"])
def test_each_reads_what_the_other_has_written(tiny_model, tmp_path, monkeypatch, core, family, saved_by):
    names = ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable")
    source = HFSource(tiny_model(family))
    saved, loaded = make_trainer(source), make_trainer(source)
    step(saved, 0)
    with monkeypatch.context() as patch:
        for name in names if saved_by == "core" else ():
            patch.setattr(DistributedOptimizer, name, getattr(core, name))
        folder = checkpoint.save(tmp_path, 1, saved, {})
    with monkeypatch.context() as patch:
        for name in names if saved_by == "megaprune" else ():
            patch.setattr(DistributedOptimizer, name, getattr(core, name))
        checkpoint.load(folder, loaded)
    for trainer in (saved, loaded):
        step(trainer, 1)
    for (name, parameter), other in zip(saved.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    tensors = dist_checkpointing.load_tensors_metadata(str(folder))
    assert {name.split(".")[2] for name in tensors if name.startswith("optimizer.")} == {
        "param",
        "exp_avg",
        "exp_avg_sq",
    }
