"""Rank and world size from the launcher's environment; available before a process group exists.

Containers and batch scripts may set RANK and WORLD_SIZE for processes that were not launched together. The variables
are therefore used only

- under torchrun, which sets TORCHELASTIC_RUN_ID, by every tool;
- by jobs (prune, cache-teacher, compare) also if RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all set. A process
  group needs all four; srun, mpirun and Kubernetes operators start processes this way.

In all other cases the process is the only one, whatever its environment contains.
"""

import os

from megaprune.utils.errors import MegapruneError, UsageError

_TORCHRUN = "TORCHELASTIC_RUN_ID"
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK")


def rank() -> int:
    """Return the global rank of this process."""
    return int(os.environ.get("RANK", "0")) if _is_launched() else 0


def world_size() -> int:
    """Return the number of processes in this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _is_launched() else 1


def forget_stale_variables(is_job: bool = True) -> None:
    """Remove the launcher's variables unless a launcher started this process: libraries read them too.

    Args:
        is_job: True for tools whose processes may be started without torchrun.

    Raises:
        UsageError: RANK and WORLD_SIZE are not a valid pair.
    """
    if _TORCHRUN in os.environ:
        return
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if is_job and _is_launched():
        if all(word.isdecimal() for word in given.values()) and int(given["RANK"]) < int(given["WORLD_SIZE"]):
            return
        _forget()
        raise UsageError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} in the environment are not a valid pair: "
            "unset them, or start the processes with torchrun"
        )
    _forget()


def _forget() -> None:
    for name in _PLACE:
        os.environ.pop(name, None)


def _is_launched() -> bool:
    return _TORCHRUN in os.environ or all(os.environ.get(name) for name in _RENDEZVOUS)


def raise_together(error: MegapruneError | None) -> None:
    """Raise the first error of any rank on every rank, so that no rank waits in a collective. Collective.

    Args:
        error: this rank's error, if there is one.
    """
    errors: list[MegapruneError | None] = [error]
    if world_size() > 1:
        import torch.distributed as dist  # imported here: a single process does not need torch

        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            met.on_all_ranks = True
            raise met
