"""The verb `cache-teacher`: the flags of a run, and the folder of the teacher's targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaprune.cli.parser import parse_flags
from megaprune.cli.signals import stop_request
from megaprune.config.checks import check_for_caching
from megaprune.config.fields import flag
from megaprune.config.schema import ALTERNATIVES, GROUPS, Config
from megaprune.utils.errors import UsageError

_DESCRIPTION = (
    "Caches the teacher's top-k logits, log-sum-exp and entropy of every training token, for --teacher cached. Takes "
    "the flags and the recipes of prune.py; those for pruning and training have no effect."
)


@dataclass
class OutputConfig:
    """Folder of the cache."""

    _argument_group_name = "cache"
    output: str | None = flag(
        "folder of the cache; unfinished work is stored next to it, and the same command continues it"
    )


def run(argv: Sequence[str], command: str = "") -> None:
    """Cache the teacher that the command line describes, and destroy the process group. Collective."""
    cache_from_flags(argv)
    from megaprune.mcore import parallel

    parallel.leave()


def cache_from_flags(argv: Sequence[str]) -> None:
    """Start or resume the caching that the command line describes. Collective.

    Raises:
        MegapruneError: the request can't be fulfilled.
        UsageError: a flag or a recipe is wrong.
    """
    *groups, settings = parse_flags(argv, (*GROUPS, OutputConfig), "cache_teacher.py", _DESCRIPTION, ALTERNATIVES)
    config = Config(*groups)
    check_for_caching(config)
    if not settings.output:
        raise UsageError("--output is required: the folder of the cache")
    # Imported here, so that --help and wrong flags are answered before megatron loads.
    from megaprune.mcore import parallel
    from megaprune.pruning.cache_teacher import cache_teacher
    from megaprune.pruning.resolve import open_caching

    options, source = open_caching(config, Path(settings.output), parallel.world_size())
    cache_teacher(options, source, stop_request(config.run))
