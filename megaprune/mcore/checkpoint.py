"""Checkpoints of a run, built on Megatron-Core's dist_checkpointing.

A checkpoint is saved completely or not at all. It can be loaded with any parallel layout, and into the pruned model:
the layers are renamed.
"""

import functools
import inspect
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import megatron.core.dist_checkpointing.strategies.common as common
import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import CheckpointException

from megaprune.mcore import optimizer_state, parallel
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.write_results import WriteResults
from megaprune.models.names import is_adapter, source_name
from megaprune.utils import disk
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_of, put_in_place

# The names of the function that returns the queue of a writer's results, in 0.16.1 and in newer cores.
for _name in ("_get_write_results_queue", "get_write_results_queue"):
    if hasattr(filesystem_async, _name):
        setattr(filesystem_async, _name, lambda *_, **__: WriteResults())
# An exception in a section that only rank 0 runs would leave the other ranks waiting in the next collective. Disk
# errors are therefore recorded here and raised after the last collective.
_failures: list[Exception] = []


def _postponing(write: Callable[..., None]) -> Callable[..., None]:
    """Wrap a writer so that its disk errors are recorded; `_attempt` raises them."""

    def postponing(*args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except Exception as error:
            if disk.disk_error(error) is None:
                raise
            _failures.append(error)

    return postponing


def recording(write: Callable[..., Any], failures: list[Exception]) -> Callable[..., Any]:
    """Wrap the function of the threads that write a checkpoint, so that their errors are recorded.

    From 0.17 on, the core asserts that a thread has no error. This loses the error, and it fails on one rank while the
    others wait for it in the next collective.
    """

    @functools.wraps(write)
    def recorded(transforms: Any, *, results_queue: Any = None, **options: Any) -> tuple[int, list[Any]]:
        number, results = write(transforms, results_queue=None, **options)
        if isinstance(results, Exception):
            failures.append(results)
            results = []
        if results_queue is not None:
            results_queue.put((number, results))
        return number, results

    return recorded


# 0.16.1 writes the run's state to a file of its own. Newer cores give it to the writers.
STATE_IN_A_FILE = hasattr(common, "TorchCommonSaveStrategy")
if STATE_IN_A_FILE:
    common.TorchCommonSaveStrategy.save_common = _postponing(common.TorchCommonSaveStrategy.save_common)
_writer: Any = filesystem_async.FileSystemWriterAsync
if hasattr(_writer, "write_preloaded_data_multithread"):  # 0.16.1 writes in processes, which report their errors
    _writer.write_preloaded_data = staticmethod(recording(_writer.write_preloaded_data, _failures))
_writer.finish = _postponing(_writer.finish)
serialization.save_config = _postponing(serialization.save_config)
# This module logs the errors of its workers before it raises them; one report is enough.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)

T = TypeVar("T")
_GO_ON = "run the same command to continue from the last checkpoint"
_PAUSE_SECONDS = 0.1
# Newer cores default to the writers of nvidia-resiliency-ext, which need processes of their own.
_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
_WRITER: dict[str, Any] = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}
_FOLDER = re.compile(r"^iter_(\d{7})$")


def _metadata() -> dict[str, Any]:
    """Return the options of the sharded state dicts."""
    return {
        # One key per layer, so that pruning only renames keys.
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        # Optimizer states have the shapes of the parameters, so that they can be resharded and renamed like them.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _strategy() -> FullyParallelSaveStrategyWrapper:
    """Return the strategy that divides the writing of what data-parallel ranks share among them."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(serialization.get_default_save_sharded_strategy(), group)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's checkpoints folder, or None."""
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if _FOLDER.match(path.name))
    return found[-1] if found else None


def save(folder: Path, iteration: int, trainer: Trainer | None, state: dict[str, Any]) -> Path:
    """Save model, optimizer and the run's state as ``iter_<iteration>``, then delete older checkpoints. Collective.

    The checkpoint is written next to its final place and renamed once every rank has written its part.

    Args:
        folder: the run's checkpoints folder.
        iteration: number of completed iterations.
        trainer: model and optimizer; None saves only the run's state.
        state: the run's state, the same on every rank.

    Returns:
        The path of the checkpoint.

    Raises:
        MegapruneError: the checkpoint cannot be written. Raised on every rank.
    """
    final = folder / f"iter_{iteration:07d}"
    with _undone_on_error(final):
        sharded, num_bytes = _begun(final, trainer, state)
        aside = aside_of(final)
        _attempt(lambda: dist_checkpointing.save(sharded, str(aside), _strategy()), aside, num_bytes)
        parallel.on_rank0(lambda: _finish(final))
    return final


class PendingSave:
    """A checkpoint that other processes write while this one trains on. It counts as soon as `finish` returns True.

    Args:
        request: what is left to do.
        final: path of the checkpoint.
        num_bytes: its size.
    """

    def __init__(self, request: AsyncRequest, final: Path, num_bytes: int) -> None:
        self._final, self._num_bytes = final, num_bytes
        self._calls = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def finish(self, wait: bool = False) -> bool:
        """Put the checkpoint in place once every rank has written its part, and delete older ones. Collective.

        Args:
            wait: wait until then; otherwise return at once.

        Returns:
            Whether the checkpoint is in place.

        Raises:
            MegapruneError: the checkpoint cannot be written. Raised on every rank.
        """
        with _undone_on_error(self._final):
            # not one long collective, which would end with the timeout of the process group
            while not _attempt(self._calls.maybe_finalize_async_calls, aside_of(self._final), self._num_bytes):
                if not wait:
                    return False
                time.sleep(_PAUSE_SECONDS)
            parallel.on_rank0(lambda: _finish(self._final))
        return True


def save_in_background(folder: Path, iteration: int, trainer: Trainer | None, state: dict[str, Any]) -> PendingSave:
    """Begin to save like `save`: copy what this rank writes to host memory, and start a process that writes it.

    One such checkpoint must be finished before the next one begins. Collective.
    """
    final = folder / f"iter_{iteration:07d}"
    with _undone_on_error(final):
        sharded, num_bytes = _begun(final, trainer, state)
        aside = aside_of(final)
        request = _attempt(
            lambda: dist_checkpointing.save(sharded, str(aside), _strategy(), async_sharded_save=True, **_WRITER),
            aside,
            num_bytes,
        )
        return PendingSave(request, final, num_bytes)


@contextmanager
def _undone_on_error(final: Path) -> Iterator[None]:
    """Remove the unfinished checkpoint if the block fails."""
    try:
        yield
    except MegapruneError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside_of(final), ignore_errors=True)
            with suppress(OSError):  # the folder holds an earlier checkpoint, or does not exist
                final.parent.rmdir()
        raise


def _begun(final: Path, trainer: Trainer | None, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Create the temporary folder of a checkpoint. Return its sharded state dict, and its size in bytes. Collective."""
    sharded = _sharded_state(trainer) if trainer else {}
    num_bytes = sum(parallel.all_gather_objects(_bytes_of(sharded)))
    parallel.on_rank0(lambda: _begin(aside_of(final), num_bytes))
    return sharded | {"state": state}, num_bytes


def _begin(aside: Path, num_bytes: int) -> None:
    """Create the temporary folder of a checkpoint after a check of the free disk space."""
    with disk.one_line(aside, _GO_ON, num_bytes):
        shutil.rmtree(aside, ignore_errors=True)
        disk.check_room(aside, num_bytes, f"and {_GO_ON}")
        aside.mkdir(parents=True)


def _attempt(action: Callable[[], T], aside: Path, num_bytes: int) -> T:
    """Return what an action of the core's writers returns; [] means that it is not due yet. Collective.

    When a writer fails, the core reports the cause only to rank 0.

    Raises:
        MegapruneError: a writer failed. Raised on every rank.
    """
    error, result = None, None
    _failures.clear()
    try:
        with disk.one_line(aside, _GO_ON, num_bytes):
            result = action()
            if _failures:
                raise _failures[0]
    except MegapruneError as met:
        error = met
    except CheckpointException as met:
        causes = "; ".join(str(cause[0] if isinstance(cause, tuple) else cause) for cause in met.failures.values())
        error = MegapruneError(f"{aside} can't be written ({causes or 'see the error of rank 0'}): {_GO_ON}")
    if error is not None or result != []:
        parallel.raise_together(error)
    return cast(T, result)


def _finish(final: Path) -> None:
    """Rename a complete checkpoint to its final name, and delete older ones."""
    with disk.one_line(final, _GO_ON):
        put_in_place(aside_of(final), final, replace=True)  # an earlier save of the same iteration may exist
    for path in final.parent.iterdir():
        if path != final and _FOLDER.match(path.name.removesuffix(".tmp")):
            shutil.rmtree(path, ignore_errors=True)


def _bytes_of(state: dict[str, Any]) -> int:
    """Return the number of bytes of a sharded state that this rank writes."""
    total = 0
    for entry in nested_values(state):
        data = getattr(entry, "data", None)
        if isinstance(entry, ShardedBase) and isinstance(data, torch.Tensor) and is_main_replica(entry.replica_id):
            total += data.numel() * data.element_size()
    return total


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the run's state from a checkpoint.

    Raises:
        MegapruneError: the checkpoint cannot be read.
    """
    if STATE_IN_A_FILE and not (checkpoint / "common.pt").is_file():
        raise MegapruneError(
            f"{checkpoint} is damaged, or was saved with megatron-core 0.17 or newer: install that version to "
            "continue, or remove the checkpoint to start again"
        )
    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint))["state"]
    except Exception as error:  # the core raises many exception types for a damaged checkpoint
        raise MegapruneError(f"{checkpoint} can't be read ({error}): remove it to start again") from error


def load(checkpoint: Path, trainer: Trainer, kept_layers: Sequence[int] | None = None) -> None:
    """Load model and optimizer; the checkpoint may have been saved with another parallel layout. Collective.

    If the trainer's model has adapters, only the adapters are loaded. Its other weights must be those of the source.

    Args:
        checkpoint: path of the checkpoint.
        trainer: model and optimizer to fill.
        kept_layers: layers of the saved model that the trainer's model consists of; None means all.
    """
    found = _FOLDER.match(checkpoint.name)
    assert found is not None, checkpoint
    wanted = _sharded_state(trainer, int(found[1]), kept_layers)
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    trainer.model.load_state_dict(loaded["model"], strict=not trainer.adapters_only)
    trainer.optimizer.load_state_dict(optimizer_state.with_empty_parts(trainer.optimizer, loaded["optimizer"]))
    if trainer.average is not None:
        trainer.average.load(loaded.get("average", {}))


def _sharded_state(
    trainer: Trainer, loaded_iterations: int | None = None, kept_layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the sharded state dict of model, optimizer and average. Collective.

    Args:
        loaded_iterations: the completed iterations of the checkpoint that is to be loaded; None to save.
    """
    model = trainer.model.sharded_state_dict(metadata=_metadata())
    if trainer.adapters_only:  # the frozen weights are imported from the source again, so they are not saved
        model = {key: entry for key, entry in model.items() if is_adapter(key)}
    if kept_layers is not None:
        for entry in nested_values(model):
            if isinstance(entry, ShardedBase):
                entry.key = source_name(entry.key, kept_layers)
    steps = optimizer_state.align_steps(trainer.optimizer)
    # The optimizer derives the keys of its states from the model's keys, so the renaming applies to them, too.
    loading = loaded_iterations is not None
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_metadata())
    average = {} if trainer.average is None else trainer.average.sharded_state(model, loaded_iterations)
    state = {"model": model, "optimizer": optimizer_state.with_common_steps(trainer.optimizer, optimizer, steps)}
    return state | ({"average": average} if average else {})
