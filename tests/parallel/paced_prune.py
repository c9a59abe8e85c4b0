"""tools/prune.py with a pause after each iteration, so that a test can interrupt it between two of them."""

import sys
import time

from megaprune.cli.main import main
from megaprune.report.metrics import MetricsLogger


def pace() -> None:
    log = MetricsLogger.log

    def logged(self, record):
        log(self, record)
        time.sleep(0.5)

    MetricsLogger.log = logged


if __name__ == "__main__":
    pace()
    main("prune", sys.argv[1:])
