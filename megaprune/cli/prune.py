"""The verb `prune`: the main job."""

from collections.abc import Sequence

from megaprune.cli.parser import parse_flags
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
    # Imported here, so that --help and wrong flags don't wait for megatron.
    from megaprune.mcore import parallel
    from megaprune.pruning import runner

    runner.run(config, command)
    parallel.leave()
