"""Rank and world size from the launcher's environment; available before a process group exists.

Containers and batch scripts leave RANK and WORLD_SIZE in the environment of processes that nobody launched together,
so these count only

- under torchrun, known by TORCHELASTIC_RUN_ID, for every tool;
- for jobs (prune, cache-teacher, compare) also where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all set, which
  is what a process group can be made from: srun, mpirun and Kubernetes operators start processes so.

Everywhere else a process is alone, whatever its environment says.
"""

import os

from megaprune.utils.errors import MegapruneError, UsageError

_TORCHRUN = "TORCHELASTIC_RUN_ID"
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK")


def rank() -> int:
    """This process's global rank."""
    return int(os.environ.get("RANK", "0")) if _is_launched() else 0


def world_size() -> int:
    """Processes in this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _is_launched() else 1


def forget_stale_variables(is_job: bool = True) -> None:
    """Removes what says that this process is one of several, unless it is: libraries read these variables too.

    Args:
        is_job: whether the tool is one whose processes may have been started without torchrun.

    Raises:
        UsageError: the variables name no place among processes.
    """
    if _TORCHRUN in os.environ:
        return
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if is_job and _is_launched():
        if all(word.isdecimal() for word in given.values()) and int(given["RANK"]) < int(given["WORLD_SIZE"]):
            return
        _forget()
        raise UsageError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} in the environment name no place among "
            "processes: unset them, or start the processes by torchrun"
        )
    _forget()


def _forget() -> None:
    for name in _PLACE:
        os.environ.pop(name, None)


def _is_launched() -> bool:
    return _TORCHRUN in os.environ or all(os.environ.get(name) for name in _RENDEZVOUS)


def raise_together(error: MegapruneError | None) -> None:
    """Raises on every rank the first error that any rank met, so that none is left waiting in a collective."""
    errors: list[MegapruneError | None] = [error]
    if world_size() > 1:
        import torch.distributed as dist  # here: who runs alone need not wait for torch

        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met
