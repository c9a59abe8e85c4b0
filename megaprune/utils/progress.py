"""Progress messages. They go to the logger `megaprune`, which is silent until the command line, or a user, shows it."""

import logging

from megaprune.utils.ranks import rank

_LOGGER = logging.getLogger("megaprune")
# One line for each few iterations of training: the console shows these on stderr.
TRAINING = logging.getLogger("megaprune.training")
_shown = {"bars": False}


def say(text: str) -> None:
    """Log a message on rank 0."""
    if rank() == 0:
        _LOGGER.info(text)


def show_bars(shown: bool) -> None:
    """Set whether progress bars may be drawn on stderr, as the command line does; a library call draws none."""
    _shown["bars"] = shown


def bars_are_shown() -> bool:
    """Return whether this process draws progress bars."""
    return _shown["bars"] and rank() == 0
