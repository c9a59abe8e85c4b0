"""Work of rank 0, or of one rank of each node, whose result all ranks use.

A decision that depends on the file system is made by rank 0 and announced: on a network file system two nodes may see
different files for a while. The other ranks wait for the announcement in the store of the process group, which has no
time limit: a collective would end with the timeout of the process group while rank 0 tokenizes or exports.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from megaprune.utils import stopping
from megaprune.utils.errors import MegapruneError, RunStopped
from megaprune.utils.ranks import has_rendezvous, raise_together, rank, world_size

T = TypeVar("T")
_LONGEST_PAUSE_SECONDS = 0.5
# Set by a waiting rank that is asked to stop, for the rank whose work the others wait for.
_STOP_KEY = "megaprune/stop"
# The process group, and the number of announcements made in it so far: equal on every rank.
_made: dict[str, Any] = {"group": None, "number": 0}


def on_rank0(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 only, however long it takes. Collective.

    Returns:
        The action's result on rank 0; None on the other ranks.

    Raises:
        MegapruneError: the action raised it. Raised on every rank. If the action raises any other exception, the other
            ranks raise a MegapruneError that names it.
    """
    kept: list[T] = []
    on_rank0_for_all(lambda: kept.append(action()))
    return kept[0] if kept else None


def on_rank0_for_all(action: Callable[[], T]) -> T:
    """Return on every rank what the action returns on rank 0, which alone runs it. Raises as `on_rank0`.

    Where the launcher gave no address, processes can't meet, and each runs the action.
    """
    if world_size() == 1 or not has_rendezvous():
        return action()
    import torch.distributed as dist

    store, key = _announcement()
    try:
        return _announced(store, key, rank() == 0, action)
    finally:
        # Everyone has read it; and rank 0, which may host the store, leaves after the others.
        dist.barrier()
        if rank() == 0:
            store.delete_key(key)
            store.delete_key(_STOP_KEY)


def on_each_node(action: Callable[[], T]) -> T:
    """Return what the action returns on the first rank of this node to arrive, which alone runs it, however long it
    takes. Collective where a process group exists; elsewhere this process runs the action.

    Raises:
        MegapruneError: the action raised it on some node. Raised on every rank.
    """
    if world_size() == 1:
        return action()
    import torch.distributed as dist

    if not dist.is_initialized():
        return action()
    store, key = _announcement()
    node, error, result = f"{key}/{_node()}", None, None
    try:
        result = _announced(store, node, store.add(f"{node}/arrived", 1) == 1, action)
    except MegapruneError as met:
        error = met
    store.add(f"{key}/done", 1)
    _wait_until(lambda: store.add(f"{key}/done", 0) >= world_size())
    raise_together(error)
    return cast(T, result)


def together(action: Callable[[], T]) -> T:
    """Return what the action returns on this rank, once all ranks have run it, however long it takes. Collective.

    Raises:
        MegapruneError: the action raised it on some rank. Raised on every rank.
    """
    error, result = None, None
    try:
        result = action()
    except MegapruneError as met:
        error = met
    wait_for_all()
    raise_together(error)
    return cast(T, result)


def wait_for_all() -> None:
    """Wait until every rank is here, however long it takes. Collective where a process group exists."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        store, key = _announcement()
        store.add(f"{key}/here", 1)
        _wait_until(lambda: store.add(f"{key}/here", 0) >= world_size())


def _announcement() -> tuple[Any, str]:
    """Return the store, and the key of the next announcement."""
    from torch.distributed import distributed_c10d

    group = distributed_c10d._get_default_group()
    if _made["group"] is not group:
        _made.update(group=group, number=0)
    _made["number"] += 1
    return distributed_c10d._get_default_store(), f"megaprune/announcement/{_made['number']}"


def _announced(store: Any, key: str, acts: bool, action: Callable[[], T]) -> T:
    """Run the action and announce its result or error, or wait for another rank to do so."""
    if acts:
        try:
            with stopping.asking_elsewhere(lambda: bool(store.check([_STOP_KEY]))):
                result = action()
        except BaseException as error:
            shown = error if isinstance(error, (MegapruneError, RunStopped)) else _described(error)
            if isinstance(shown, MegapruneError):
                shown.on_all_ranks = True
            store.set(key, pickle.dumps((None, shown)))
            raise
        store.set(key, pickle.dumps((result, None)))
        return result
    _wait_until(lambda: store.check([key]) or _forward_request(store))
    value, raised = pickle.loads(store.get(key))
    if raised is not None:
        raise raised
    return cast(T, value)


def _forward_request(store: Any) -> bool:
    """Tell the rank that works about a request to stop this one. Return False."""
    if stopping.was_received():
        store.set(_STOP_KEY, b"")
    return False


def _described(error: BaseException) -> MegapruneError:
    return MegapruneError(f"rank {rank()} failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _wait_until(is_done: Callable[[], bool]) -> None:
    """Ask again and again, less often the longer it takes. A blocking wait would hold the lock of the store, which
    other threads of this process use.
    """
    start = time.monotonic()
    while not is_done():
        time.sleep(min(_LONGEST_PAUSE_SECONDS, 0.001 + 0.1 * (time.monotonic() - start)))


def _node() -> str:
    """Return a name that the ranks of this node, and only they, have."""
    return f"{os.environ.get('GROUP_RANK') or os.environ.get('SLURM_NODEID', '')}@{socket.gethostname()}"
