"""The verb `prune`: the whole run."""

from collections.abc import Sequence

from megaprune import api
from megaprune.cli.parser import parse_flags
from megaprune.cli.signals import stop_request
from megaprune.config.checks import check_run
from megaprune.config.schema import ALTERNATIVES, GROUPS, Config

_DESCRIPTION = "Prune layers of a model and recover its quality: HF folder in, pruned HF folder out."


def parse_config(argv: Sequence[str], prog: str = "prune.py") -> Config:
    """Return the config of the run that a command line describes.

    Raises:
        UsageError: a flag or a recipe is wrong; the message names it.
    """
    config = Config(*parse_flags(argv, GROUPS, prog, _DESCRIPTION, ALTERNATIVES))
    check_run(config)
    return config


def run(argv: Sequence[str], command: str = "") -> None:
    """Start or resume the run that the command line describes. Collective.

    Args:
        command: the whole command line, for the model card.
    """
    config = parse_config(argv)
    api.prune(config, should_stop=stop_request(config.run), command=command)
    from megaprune.mcore import parallel

    parallel.leave()
