"""Console output of a command: results on stdout, log lines and progress bars on stderr."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megaprune.utils.progress import TRAINING, show_bars


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr if record.name == TRAINING.name else sys.stdout, flush=True)


@contextmanager
def console() -> Iterator[None]:
    """Show log lines and progress bars for the duration of a block."""
    logger, handler = logging.getLogger("megaprune"), _Console()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    show_bars(True)
    try:
        yield
    finally:
        show_bars(False)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
