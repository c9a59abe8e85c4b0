"""prune.py with a fault on one rank while the other ranks do something that they cannot end themselves."""

import os
import sys
import time
from pathlib import Path

from megaprune.cli import main as cli
from megaprune.pruning import resolve, train
from megaprune.utils.errors import MegapruneError

_FAULTS = {
    "unforeseen": KeyError("state"),
    "refused": MegapruneError("the disk is full"),
}


def failing(kind: str, failing_rank: int, log: Path):
    def step(*args):
        if int(os.environ["RANK"]) == failing_rank:
            log.write_text(str(time.time()))
            raise _FAULTS[kind]
        time.sleep(600)

    return step


if __name__ == "__main__":
    kind, failing_rank, log, *words = sys.argv[1:]
    if kind == "early":
        # before any process group: rank 0 goes on to wait for the others to join
        def open_run(*args, open_run=resolve.open_run):
            opened = open_run(*args)
            if int(os.environ["RANK"]) == int(failing_rank):
                Path(log).write_text(str(time.time()))
                raise MegapruneError("the disk is full")
            return opened

        resolve.open_run = open_run
    else:
        train.train_step = failing(kind, int(failing_rank), Path(log))
    cli.main("prune", words)
