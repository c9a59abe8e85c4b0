"""tools/prune.py on a failing machine: it kills itself without a message at a moment that the first two arguments name:
``training N``, when iteration N is done, ``saving N``, when its checkpoint is written but not yet in place, or
``writing N``, when a process in the background has begun to write it. With
``holding N`` it stops there instead, prints a line, and waits to be killed.
"""

import os
import signal
import sys
import time

from megaprune.cli.main import main
from megaprune.report.metrics import MetricsLogger


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when(moment: str, iteration: int) -> None:
    log, replace = MetricsLogger.log, os.replace

    def logged(self, record):
        log(self, record)
        if record["iteration"] == iteration:
            if moment == "holding":
                print("holding", flush=True)
                time.sleep(600)
            die()

    def replaced(source, target):
        if str(target).endswith(f"iter_{iteration:07d}"):
            die()
        replace(source, target)

    def begun(folder, number, *args):
        pending = save(folder, number, *args)
        if number == iteration:
            die()
        return pending

    if moment == "saving":
        os.replace = replaced
    elif moment == "writing":
        from megaprune.mcore import checkpoint

        save, checkpoint.save_in_background = checkpoint.save_in_background, begun
    else:
        MetricsLogger.log = logged


if __name__ == "__main__":
    die_when(sys.argv[1], int(sys.argv[2]))
    main("prune", sys.argv[3:])
