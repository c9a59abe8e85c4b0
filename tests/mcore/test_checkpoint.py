"""Checkpoints: whole or absent, complete, and loadable into a pruned model."""

import errno
import queue

import megatron.core.dist_checkpointing.strategies.torch as torch_strategy
import pytest
import torch
from megatron.core import dist_checkpointing

from megaprune.mcore import checkpoint
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers.disks import full_disk
from tests.helpers.gradients import parameters, step

pytestmark = pytest.mark.usefixtures("one_process")
KEPT = [0, 2, 3, 6]


@pytest.fixture(scope="module")
def source(tiny_model):
    return HFSource(tiny_model("qwen3"))


@pytest.fixture(params=["plain", "distributed", "bf16"])
def make_trainer(request, source):
    """Return a function that makes a trainer of the model or of its kept layers, with one kind of optimizer."""

    def make(kept=None):
        arch = source.family.architecture(source.config)
        arch = arch if kept is None else arch.pruned(kept)
        engine = EngineOptions(ParallelSizes(), bf16=request.param == "bf16")
        model = build_model(arch, [arch.num_layers], engine)
        import_weights(model, source, kept)
        options = OptimizerOptions(
            lr=1e-2,
            min_lr=0.0,
            lr_decay_style="cosine",
            lr_warmup_iters=1,
            train_iters=10,
            weight_decay=0.1,
            clip_grad=0.0,
            distributed=request.param == "distributed",
        )
        return Trainer(model, engine, options)

    return make


def assert_same_weights(trainer, other, kept=None):
    expected = dict(parameters(other))
    for name, parameter in parameters(trainer, kept):
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_loaded_model_trains_on_as_the_saved_one(make_trainer, tmp_path, kept):
    """Adam's next step depends on its whole state: equal gradients give equal weights."""
    saved = make_trainer()
    for iteration in range(3):
        step(saved, iteration)
    folder = checkpoint.save(tmp_path, 3, saved, {"iteration": 3, "scores": [0.5, 1.0]})

    loaded = make_trainer(kept)
    checkpoint.load(folder, loaded, kept)
    assert_same_weights(loaded, saved, kept)
    for iteration in range(3, 5):
        step(saved, iteration)
        step(loaded, iteration, kept)
    assert_same_weights(loaded, saved, kept)
    assert checkpoint.load_state(folder) == {"iteration": 3, "scores": [0.5, 1.0]}

    without_optimizer = make_trainer(kept)
    with torch.no_grad():
        for (_, parameter), (_, trained) in zip(parameters(without_optimizer), parameters(loaded), strict=True):
            parameter.copy_(trained)
    step(loaded, 5, kept)
    step(without_optimizer, 5, kept)
    with pytest.raises(AssertionError):
        assert_same_weights(without_optimizer, loaded)


def test_a_pruned_checkpoint_loads_as_it_is(make_trainer, tmp_path):
    saved = make_trainer(KEPT)
    step(saved, 0, KEPT)
    loaded = make_trainer(KEPT)
    checkpoint.load(checkpoint.save(tmp_path, 1, saved, {}), loaded)
    for _ in range(2):
        assert_same_weights(loaded, saved)
        step(saved, 1, KEPT)
        step(loaded, 1, KEPT)


@pytest.mark.parametrize("make_trainer", ["plain"], indirect=True)
def test_saves_use_the_writer_of_the_core(make_trainer, tmp_path, monkeypatch):
    """Its queue is replaced. The writer of nvidia-resiliency-ext has a queue of its own, in a process of its own."""
    if not hasattr(torch_strategy, "get_async_strategy"):
        pytest.skip("this Megatron-Core has one writer only")
    asked, get = [], torch_strategy.get_async_strategy
    monkeypatch.setattr(
        torch_strategy, "get_async_strategy", lambda name, *rest, **more: asked.append(name) or get(name, *rest, **more)
    )
    checkpoint.save(tmp_path, 3, make_trainer(), {"iteration": 3})
    assert set(asked) == {"mcore"}


@pytest.mark.parametrize("asked", [True, False])
def test_errors_of_writing_threads_are_recorded(asked):
    error, failures, results = OSError(errno.ENOSPC, "No space left on device"), [], queue.Queue()

    def write(transforms, number, results_queue, full):
        assert results_queue is None and transforms == []
        return number, (error if full else ["written"])

    recorded = checkpoint.recording(write, failures)
    where = {"results_queue": results} if asked else {}
    assert recorded([], number=3, full=False, **where) == (3, ["written"]) and failures == []
    assert recorded([], number=4, full=True, **where) == (4, []) and failures == [error]
    assert [results.get_nowait() for _ in range(results.qsize())] == ([(3, ["written"]), (4, [])] if asked else [])


def test_the_state_of_a_newer_core_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "STATE_IN_A_FILE", True)
    with pytest.raises(MegapruneError, match="was saved with megatron-core 0.17 or newer: install that version"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize("make_trainer", ["plain"], indirect=True)
def test_only_the_last_whole_checkpoint_is_there(make_trainer, tmp_path, monkeypatch):
    folder, trainer = tmp_path / "checkpoints", make_trainer()
    assert checkpoint.latest(folder) is None
    checkpoint.save(folder, 3, trainer, {"iteration": 3})
    (folder / "iter_0000009.tmp").mkdir()
    (folder / "notes").mkdir()
    assert checkpoint.latest(folder).name == "iter_0000003"

    def killed_while_saving(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        raise KeyboardInterrupt

    save = dist_checkpointing.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dist_checkpointing, "save", killed_while_saving)
        checkpoint.save(folder, 6, trainer, {"iteration": 6})
    assert checkpoint.latest(folder).name == "iter_0000003"
    assert checkpoint.load_state(checkpoint.latest(folder)) == {"iteration": 3}

    checkpoint.save(folder, 6, trainer, {"iteration": 6})
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000006", "notes"]
    checkpoint.save(folder, 6, trainer, {"iteration": 6, "again": True})
    assert checkpoint.load_state(checkpoint.latest(folder)) == {"iteration": 6, "again": True}


@pytest.mark.parametrize("make_trainer", ["distributed", "bf16"], indirect=True)
def test_a_background_save_holds_the_weights_of_its_iteration_and_counts_when_finished(make_trainer, tmp_path):
    trainer, expected = make_trainer(), make_trainer()
    for saved in (trainer, expected):
        step(saved, 0)
    checkpoint.save(tmp_path, 0, None, {"iteration": 0})
    pending = checkpoint.save_in_background(tmp_path, 1, trainer, {"iteration": 1})
    step(trainer, 1)  # training goes on while it is written
    assert checkpoint.latest(tmp_path).name == "iter_0000000"
    assert pending.finish(wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]
    loaded = make_trainer()
    checkpoint.load(checkpoint.latest(tmp_path), loaded)
    assert_same_weights(loaded, expected)
    for other in (loaded, expected):
        step(other, 1)
    assert_same_weights(loaded, expected)
    assert_same_weights(loaded, trainer)


@pytest.mark.parametrize("make_trainer", ["distributed"], indirect=True)
def test_a_background_save_that_fails_leaves_the_former_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    former = checkpoint.save(tmp_path, 1, trainer, {"iteration": 1})
    with full_disk(100_000):
        pending = checkpoint.save_in_background(tmp_path, 2, trainer, {"iteration": 2})
    with pytest.raises(MegapruneError, match="iter_0000002.tmp can't be written .*run the same command to continue"):
        pending.finish(wait=True)
    assert list(tmp_path.iterdir()) == [former]
