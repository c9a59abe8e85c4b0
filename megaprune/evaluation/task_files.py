"""Task files of lm-evaluation-harness: those that come with megaprune, a user's own, and where their data lie."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line

SHIPPED = Path(__file__).parent / "tasks"


def shipped_tasks() -> dict[str, str]:
    """Return the tasks whose files come with megaprune, with the names of their data files."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    files = [yaml.load(path.read_text(), Loader) for path in sorted(SHIPPED.glob("*.yaml"))]
    return {task["task"]: task["dataset_kwargs"]["file"] for task in files}


def find_tasks(names: Sequence[str], path: str | None = None) -> tuple[Any, list[str]]:
    """Return lm_eval's TaskManager and what it is to load for the tasks. No data are read.

    A name means the task of that name in the folder `path`, else the task that comes with megaprune if its data file
    is there, else the harness's own, whose data it fetches from the Hugging Face hub.

    Args:
        path: a folder of task files, of data files for the tasks that come with megaprune, or of both.

    Raises:
        MegapruneError: lm_eval isn't installed, or a task file can't be read.
        UsageError: there is no such folder or task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MegapruneError(
            "--tasks: lm-evaluation-harness isn't installed; run `pip install 'megaprune[eval]'`"
        ) from error
    if path is None:
        manager = TaskManager()
        return manager, [_known(manager, name) for name in names]
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise UsageError(f"--task-path {path}: no such folder")
    with quiet():  # a task that replaces the harness's own of that name is what the user asked for
        manager = TaskManager(include_path=str(folder), metadata={"data_dir": str(folder)})
    shipped = shipped_tasks()
    specs = []
    for name in names:
        entry = manager.task_index.get(name)
        own = entry is not None and entry.yaml_path is not None and entry.yaml_path.is_relative_to(folder)
        if not own and name in shipped and (folder / shipped[name]).is_file():
            specs.append(str(SHIPPED / f"{name}.yaml"))
            continue
        specs.append(_known(manager, name))
        for member in _members(manager.task_index, name):
            _locate_data(manager.task_index, member, folder)
    return manager, specs


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the harness's warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _known(manager: Any, name: str) -> str:
    if name not in manager.all_tasks and not Path(name).is_file():
        raise UsageError(f"--tasks {name}: lm_eval has no such task; `lm-eval ls tasks` lists them")
    return name


def _members(index: dict[str, Any], name: str) -> Iterator[str]:
    """Yield the names of the tasks that a task, group or tag stands for, where the index knows them."""
    entry = index.get(name)
    if entry is None:
        return
    parts = (entry.cfg or {}).get("task")
    if entry.tags and entry.yaml_path is None:
        parts = sorted(entry.tags)
    if not isinstance(parts, list):
        yield name
        return
    for part in parts:
        yield from _members(index, part if isinstance(part, str) else str(part.get("task") or part.get("group")))


def _locate_data(index: dict[str, Any], name: str, folder: Path) -> None:
    """Make the relative data files of a task in `folder` absolute, if they lie beside its task file.

    The harness would look for them in the working directory.
    """
    entry = index[name]
    if entry.yaml_path is None or not entry.yaml_path.is_relative_to(folder):
        return
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    if files is None:
        return
    found = _beside(files, entry.yaml_path.parent)
    if found == files:
        return
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(entry.yaml_path)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise MegapruneError(f"--tasks {name}: {entry.yaml_path} can't be read ({first_line(error)})") from error
    config["dataset_kwargs"] = config["dataset_kwargs"] | {"data_files": found}
    index[name] = replace(entry, yaml_path=None, cfg=config)


def _beside(files: Any, folder: Path) -> Any:
    """Return `data_files`, as the datasets library takes them, with the paths of those that lie in a folder."""
    if isinstance(files, dict):
        return {split: _beside(some, folder) for split, some in files.items()}
    if isinstance(files, list):
        return [_beside(some, folder) for some in files]
    if not isinstance(files, str) or "://" in files or Path(files).is_absolute():
        return files
    return str(folder / files) if any(folder.glob(files)) else files
