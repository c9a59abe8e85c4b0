"""Checkpoints of a run: saved whole or not at all, loaded at any parallel layout, and loaded into a pruned model by
renaming layers, with dist_checkpointing as the resharding engine."""

import logging
import os
import queue
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from torch.distributed.checkpoint import CheckpointException

from megaprune.mcore import optimizer_state, parallel
from megaprune.mcore.distributed_adam import make_loadable
from megaprune.mcore.layers.lora import is_adapter
from megaprune.mcore.optimizer import Trainer
from megaprune.models.names import source_name
from megaprune.utils import disk
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_folder

# 0.16.1 has its writers report to a manager process, for saves that run on beside the training. It takes seconds and
# 400 MB a rank, and outlives a rank that is killed. Here saves are waited for: a queue within the process serves.
filesystem_async._results_queue = queue.Queue()
make_loadable()
# Where rank 0 alone writes, its failure would leave the others in the collectives that follow: it waits until these are
# over.
_failures: list[Exception] = []


def _postponing(write: Callable[..., None]) -> Callable[..., None]:
    """The writer, whose disk errors are raised by `_write` in the end."""

    def postponing(*args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except Exception as error:
            if disk.disk_error(error) is None:
                raise
            _failures.append(error)

    return postponing


TorchCommonSaveStrategy.save_common = _postponing(TorchCommonSaveStrategy.save_common)
filesystem_async.FileSystemWriterAsync.finish = _postponing(filesystem_async.FileSystemWriterAsync.finish)
serialization.save_config = _postponing(serialization.save_config)
# It logs what its workers met, and then raises it.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)

_GO_ON = "give the same command to go on from the last checkpoint"
_FOLDER = re.compile(r"^iter_(\d{7})$")


def _metadata() -> dict[str, Any]:
    return {
        # every layer under a key of its own, so that pruning is a renaming of keys
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        # optimizer states in the shape of the model's parameters: these reshard, and follow the renaming
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's checkpoints folder."""
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if _FOLDER.match(path.name))
    return found[-1] if found else None


def save(folder: Path, iteration: int, trainer: Trainer | None, state: dict[str, Any]) -> Path:
    """Saves model, optimizer and the run's own state under ``iter_<iteration>``, then drops older ones; without a
    trainer the run's state alone. Collective.

    The folder gets its name only when every rank has written its part.
    """
    final = folder / f"iter_{iteration:07d}"
    aside = aside_folder(final)
    sharded = _sharded_state(trainer) if trainer else {}
    num_bytes = sum(parallel.from_all_ranks(_bytes_of(sharded)))
    try:
        parallel.on_first_rank(lambda: _begin(aside, num_bytes))
        _write(sharded | {"state": state}, aside, num_bytes)
        parallel.on_first_rank(lambda: _finish(aside, final))
    except MegapruneError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):  # holds an earlier checkpoint, or was never made
                folder.rmdir()
        raise
    return final


def _begin(aside: Path, num_bytes: int) -> None:
    with disk.one_line(aside, _GO_ON, num_bytes):
        shutil.rmtree(aside, ignore_errors=True)
        disk.check_room(aside, num_bytes, f"and {_GO_ON}")
        aside.mkdir(parents=True)


def _write(state: dict[str, Any], aside: Path, num_bytes: int) -> None:
    """Collective. Where a worker fails, rank 0 hears of it from the core, and the others that there was something."""
    error = None
    _failures.clear()
    try:
        with disk.one_line(aside, _GO_ON, num_bytes):
            dist_checkpointing.save(state, str(aside))
            if _failures:
                raise _failures[0]
    except MegapruneError as met:
        error = met
    except CheckpointException as met:
        if met.failures or dist.get_rank() == 0:
            raise
        error = MegapruneError(f"{aside} can't be written: see what rank 0 says of it")
    parallel.raise_together(error)


def _finish(aside: Path, final: Path) -> None:
    with disk.one_line(final, _GO_ON):
        if final.exists():  # an earlier save of the same iteration: the new one takes its place
            shutil.rmtree(final)
        os.replace(aside, final)
    for path in final.parent.iterdir():
        if path != final and _FOLDER.match(path.name.removesuffix(".tmp")):
            shutil.rmtree(path, ignore_errors=True)


def _bytes_of(state: dict[str, Any]) -> int:
    """What this rank will write of a sharded state."""
    total = 0
    for entry in nested_values(state):
        data = getattr(entry, "data", None)
        if isinstance(entry, ShardedBase) and isinstance(data, torch.Tensor) and is_main_replica(entry.replica_id):
            total += data.numel() * data.element_size()
    return total


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The run's own state in a checkpoint.

    Raises:
        MegapruneError: the checkpoint can't be read.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint))["state"]
    except Exception as error:  # the core raises its own kinds, which all mean the same here
        raise MegapruneError(f"{checkpoint} can't be read ({error}): remove it to begin anew") from error


def load(checkpoint: Path, trainer: Trainer, kept_layers: Sequence[int] | None = None) -> None:
    """Loads model and optimizer, whatever the layout that saved them. Collective.

    Where the trainer's model has adapters, they are what is loaded; its other weights must be the source's.

    Args:
        kept_layers: the layers of the saved model of which this trainer's model consists; None means all.
    """
    wanted = _sharded_state(trainer, loading=True, kept_layers=kept_layers)
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    trainer.model.load_state_dict(loaded["model"], strict=not trainer.adapters_only)
    trainer.optimizer.load_state_dict(optimizer_state.completed(trainer.optimizer, loaded["optimizer"]))


def _sharded_state(trainer: Trainer, loading: bool = False, kept_layers: Sequence[int] | None = None) -> dict[str, Any]:
    model = trainer.model.sharded_state_dict(metadata=_metadata())
    if trainer.adapters_only:  # the frozen weights are the source's: they are imported, not saved
        model = {key: entry for key, entry in model.items() if is_adapter(key)}
    if kept_layers is not None:
        for entry in nested_values(model):
            if isinstance(entry, ShardedBase):
                entry.key = source_name(entry.key, kept_layers)
    steps = optimizer_state.align_steps(trainer.optimizer)
    # The optimizer names its states after the model's keys, and so follows the renaming.
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_metadata())
    return {"model": model, "optimizer": optimizer_state.shared_state(trainer.optimizer, optimizer, steps)}
