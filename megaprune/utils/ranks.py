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
# Launchers by a variable that they set, each with its own variable for the number of a process on its node.
_LAUNCHERS = {
    "SLURM_PROCID": ("srun", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_RANK": ("mpirun", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI_RANK": ("mpiexec", "MPI_LOCALRANKID"),
}
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK")


def rank() -> int:
    """Return the global rank of this process."""
    return int(os.environ.get("RANK", "0")) if _is_launched() else 0


def has_rendezvous() -> bool:
    """Return whether the launcher gave the address at which the processes meet."""
    return all(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))


def world_size() -> int:
    """Return the number of processes in this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _is_launched() else 1


def forget_stale_variables(is_job: bool = True) -> None:
    """Remove the launcher's variables unless a launcher started this process: libraries read them too.

    Args:
        is_job: True for tools whose processes may be started without torchrun.

    Raises:
        UsageError: RANK and WORLD_SIZE are not a valid pair, or LOCAL_RANK is missing or wrong.
    """
    if _TORCHRUN in os.environ:
        return
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if is_job and _is_launched():
        if all(word.isdecimal() for word in given.values()) and int(given["RANK"]) < int(given["WORLD_SIZE"]):
            _check_local_rank(int(given["WORLD_SIZE"]))
            return
        _forget()
        raise UsageError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} in the environment are not a valid pair: "
            "unset them, or start the processes with torchrun"
        )
    _forget()


def _check_local_rank(size: int) -> None:
    """Refuse processes of a launcher that does not say which GPU is whose: all of a node would take the first one."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and not local.isdecimal():
        raise UsageError(f"LOCAL_RANK={local} in the environment is not the number of a process on its node: 0, 1, ...")
    if local is not None or size == 1:
        return
    for mark, (launcher, source) in _LAUNCHERS.items():
        if mark in os.environ:
            raise UsageError(
                f"LOCAL_RANK is not set, and without it all processes that {launcher} started on a node would use its "
                f"first GPU: set LOCAL_RANK=${source} in each process, or start them with torchrun"
            )


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
    if world_size() > 1 and has_rendezvous():
        import torch.distributed as dist  # imported here: a single process does not need torch

        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            met.on_all_ranks = True
            raise met
