"""What a launcher such as torchrun says of the processes it started, known before any process group exists."""

import os

from megaprune.utils.errors import MegapruneError


def rank() -> int:
    """This process's global rank."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
