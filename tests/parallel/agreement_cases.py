"""Ranks that see different files, and long work of rank 0."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

import megaprune
from megaprune.mcore import checkpoint
from megaprune.utils import rank0, stopping
from megaprune.utils.errors import MegapruneError, RunStopped
from megaprune.utils.stopping import StopRequest


def long_work() -> None:
    """Wait for rank 0 for longer than a collective may take; then meet its error."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    assert rank0.on_rank0_for_all(lambda: time.sleep(5) or dist.get_rank()) == 0
    assert rank0.on_rank0(dist.get_rank) == (0 if dist.get_rank() == 0 else None)
    for error, said in ((MegapruneError("no room"), "no room"), (ValueError("odd"), "odd")):
        try:
            rank0.on_rank0(lambda error=error: _raise(error))
        except (MegapruneError, ValueError) as met:
            assert said in str(met) and (dist.get_rank() == 0 or isinstance(met, MegapruneError))
            continue
        raise AssertionError("not raised")
    assert rank0.on_rank0_for_all(lambda: "after an error") == "after an error"


def signaled_elsewhere() -> None:
    """Stop the work of rank 0 by a signal to rank 1, which waits for it."""

    def endless() -> None:
        while True:
            stopping.stop_alone("work", "within endless work")
            time.sleep(0.05)

    with stopping.obeying(StopRequest()):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            rank0.on_rank0(endless)
        except RunStopped as stop:
            assert "within endless work" in str(stop) and not stop.progressed
        else:
            raise AssertionError("not stopped")
    with stopping.obeying(StopRequest(signals=False)):
        assert rank0.on_rank0_for_all(lambda: stopping.stop_alone("work", "at once") or 3) == 3


def once_a_node(out: str, nodes: list[str]) -> None:
    """Run an action once on each node, and meet the error of another node's first rank."""
    before, os.environ["GROUP_RANK"] = os.environ["GROUP_RANK"], nodes[dist.get_rank()]
    try:
        found = rank0.on_each_node(lambda: (Path(out, f"rank{dist.get_rank()}").touch(), os.environ["GROUP_RANK"])[1])
        assert found == nodes[dist.get_rank()]
        try:
            rank0.on_each_node(lambda: _raise(MegapruneError("offline")) if found == nodes[-1] else None)
        except MegapruneError as met:
            assert "offline" in str(met)
        else:
            raise AssertionError("not raised")
    finally:
        os.environ["GROUP_RANK"] = before


def finished_elsewhere(views: list[str], flags: dict[str, Any]) -> None:
    """Start a run that only rank 0 sees as finished."""
    before = Path.cwd()
    os.chdir(views[dist.get_rank()])
    try:
        report = megaprune.prune(**flags, save="run")
        assert report is not None and report.num_layers == 5
    finally:
        os.chdir(before)


def stale_checkpoints(flags: dict[str, Any], save: str) -> None:
    """Stop a run, and go on where only rank 0 sees the checkpoint."""
    asked = iter([False, False, True])
    try:
        megaprune.prune(**flags, save=save, should_stop=lambda: next(asked))
    except megaprune.RunStopped:
        assert checkpoint.latest(Path(save) / "checkpoints") is not None
    else:
        raise AssertionError("not stopped")
    latest = checkpoint.latest
    checkpoint.latest = latest if dist.get_rank() == 0 else lambda folder: None
    try:
        report = megaprune.prune(**flags, save=save)
    finally:
        checkpoint.latest = latest
    assert report is not None and set(report.stages) >= {"recovery"}


def _raise(error: Exception) -> None:
    raise error
