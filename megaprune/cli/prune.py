"""The verb `prune`: the main job."""

from collections.abc import Sequence

from megaprune import api
from megaprune.cli.parser import parse_flags
from megaprune.cli.signals import StopRequest
from megaprune.config.checks import check_run
from megaprune.config.schema import ALTERNATIVES, GROUPS, Config

_DESCRIPTION = "Prunes and heals a model: HF folder in, pruned HF folder out."


def parse_config(argv: Sequence[str], prog: str = "prune.py") -> Config:
    """Return the run that a command line asks for.

    Raises:
        UsageError: a flag or a recipe is wrong; names it.
    """
    config = Config(*parse_flags(argv, GROUPS, prog, _DESCRIPTION, ALTERNATIVES))
    check_run(config)
    return config


def run(argv: Sequence[str], command: str = "") -> None:
    """Run what the command line asks for, or go on with it. Collective.

    Args:
        command: the whole command line, for the model card.
    """
    config = parse_config(argv)
    api.prune(config, should_stop=StopRequest() if config.run.exit_on_signal else None, command=command)
    from megaprune.mcore import parallel

    parallel.leave()
