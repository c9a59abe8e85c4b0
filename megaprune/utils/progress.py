"""Progress messages. They go to the logger `megaprune`, which the command line or a user has to enable."""

import logging

from megaprune.utils.ranks import rank

_LOGGER = logging.getLogger("megaprune")
# Lines about training iterations; the console shows these on stderr.
TRAINING = logging.getLogger("megaprune.training")
_shown = {"bars": False}


def say(text: str) -> None:
    """Log a message on rank 0."""
    if rank() == 0:
        _LOGGER.info(text)


def show_bars(shown: bool) -> None:
    """Enable or disable progress bars on stderr. The command line enables them; library calls draw none."""
    _shown["bars"] = shown


def bars_are_shown() -> bool:
    """Return True if this process draws progress bars."""
    return _shown["bars"] and rank() == 0
