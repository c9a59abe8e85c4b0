"""The verb `compare`: several methods on one or more models, at equal budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaprune.cli.parser import parse_flags
from megaprune.cli.signals import StopRequest
from megaprune.config.fields import flag
from megaprune.utils.errors import UsageError


@dataclass
class CompareConfig:
    """Flags of `compare`."""

    config: str | None = flag("YAML file with the common flags of all runs and the values to compare")
    save: str | None = flag("folder for the runs, the tables and the plots; finished runs in it are not repeated")
    tasks: str | None = flag("benchmark tasks to score, separated by commas, instead of the file's")
    task_path: str | None = flag("folder with task files or their data, instead of the file's")
    task_limit: int | None = flag("number of items of each task, instead of the file's", least=1)
    task_pruned: bool | None = flag("score the pruned models before recovery, too (default: as in the file)")


def run(argv: Sequence[str], command: str = "") -> None:
    """Execute all runs that are not finished, then write the tables and plots. Collective.

    Raises:
        MegapruneError: a run was refused.
        UsageError: the file is wrong.
    """
    description = "Compare several methods at equal budgets."
    [settings] = parse_flags(argv, [CompareConfig], "compare.py", description, recipes=False)
    for name in ("config", "save"):
        if not getattr(settings, name):
            raise UsageError(f"--{name} is required")
    from megaprune.comparison.grid import read_comparison

    given = {key: getattr(settings, key) for key in ("task_path", "task_limit", "task_pruned")}
    given["tasks"] = settings.tasks.split(",") if settings.tasks else None
    overrides = {key: value for key, value in given.items() if value is not None}
    comparison = read_comparison(Path(settings.config), Path(settings.save), overrides)
    # Imported here, so that a wrong file is reported before megatron loads.
    from megaprune.comparison.compare import compare
    from megaprune.mcore import parallel

    compare(comparison, Path(settings.save), StopRequest())
    parallel.leave()
