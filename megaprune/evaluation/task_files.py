"""Task files of lm-evaluation-harness, those that come with megaprune and a user's own, and where their data are."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line

SHIPPED = Path(__file__).parent / "tasks"


def shipped_tasks() -> dict[str, str]:
    """Return the tasks whose files come with megaprune, with the names of their data files."""
    files = [yaml.load(path.read_text(), _TaskFile) for path in sorted(SHIPPED.glob("*.yaml"))]
    return {task["task"]: task["dataset_kwargs"]["file"] for task in files}


def load_tasks(names: Sequence[str], path: str | None = None) -> list[Any]:
    """Return tasks and groups of tasks with their data, as lm_eval.simple_evaluate takes them.

    A name means the task of that name in the folder `path`, else the task that comes with megaprune if its data file
    is there, else the harness's own, whose data it fetches from the Hugging Face hub.

    Args:
        names: names of tasks, groups or tags, or paths of task files.
        path: a folder of task files, of data files for the tasks that come with megaprune, or of both.

    Raises:
        MegapruneError: lm_eval isn't installed, or a task or its data can't be read.
        UsageError: there is no such folder or task, or one is asked for twice.
    """
    index = _TaskIndex(path)
    tasks = [task for name in dict.fromkeys(names) for task in index.load(name)]
    parts = [part for task in tasks for part in _names_in(task)]
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise UsageError(f"--tasks {','.join(names)}: {twice[0]} is named twice")
    return tasks


@contextmanager
def quiet(logger_name: str = "lm_eval") -> Iterator[None]:
    """Hold back warnings of the harness."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _TaskFile(yaml.SafeLoader):
    """YAML whose functions stay names."""


_TaskFile.add_constructor("!function", lambda loader, node: str(node.value))


class _TaskIndex:
    """The tasks that names stand for, here and in the harness."""

    def __init__(self, path: str | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MegapruneError(
                "--tasks: lm-evaluation-harness isn't installed; run `pip install 'megaprune[eval]'`"
            ) from error
        if not hasattr(TaskManager, "load"):
            raise MegapruneError("--tasks needs lm-evaluation-harness 0.4.12 or newer; run `pip install -U lm-eval`")
        if path is not None and not Path(path).is_dir():
            raise UsageError(f"--task-path {path}: no such folder")
        self.path = path
        self.folder = Path(path).resolve() if path else None
        self._make = TaskManager
        self._data_of = shipped_tasks()

    def load(self, name: str) -> list[Any]:
        """Return the task or the group of a name, or the tasks of a tag."""
        manager, spec = self._find(name)
        try:
            with quiet():
                found = manager.load([spec])
        except Exception as error:  # a task file may name functions, which raise what they like
            hub = "" if manager is self._local else "; its data come from the Hugging Face hub when first used"
            raise MegapruneError(f"--tasks {name}: it or its data can't be read ({first_line(error)}){hub}") from error
        groups = found.get("groups", {})
        inner = {child for children in found.get("group_map", {}).values() for child in children}
        return [item for own, item in (groups | found["tasks"]).items() if own not in inner]

    def _find(self, name: str) -> tuple[Any, str | dict[str, Any]]:
        """Return a TaskManager and what it is to load for a name: a name that it knows, or a task file."""
        if Path(name).is_file():
            found = _with_data(Path(name).resolve()) or name
            return self._local if isinstance(found, dict) and isinstance(found.get("task"), str) else self._all, found
        if self.folder:
            members = list(_members(self._local.task_index, name))
            if name in self._local.all_tasks and None not in members:
                for member in members:
                    _locate_data(self._local.task_index, member)
                return self._local, name
            if name in self._data_of and (self.folder / self._data_of[name]).is_file():
                return self._local, str(SHIPPED / f"{name}.yaml")
        if name in self._all.all_tasks:
            return self._all, name
        absent = f", and {self.path} has neither a task file nor {self._data_of.get(name, 'data')} for it"
        raise UsageError(
            f"--tasks {name}: lm_eval has no such task{absent if self.path else ''}; `lm-eval ls tasks` lists its tasks"
        )

    @cached_property
    def _local(self) -> Any:
        """The tasks of the folder alone: reading the harness's own takes seconds."""
        with quiet():
            folder = str(self.folder) if self.folder else None
            return self._make(include_path=folder, include_defaults=False, metadata=self._metadata)

    @cached_property
    def _all(self) -> Any:
        with quiet():  # a task of the folder that replaces the harness's own is what the user asked for
            return self._make(include_path=str(self.folder) if self.folder else None, metadata=self._metadata)

    @property
    def _metadata(self) -> dict[str, Any] | None:
        """Return the arguments that the harness passes to functions that read data."""
        return {"data_dir": str(self.folder)} if self.folder else None


def _names_in(task: Any) -> list[str]:
    """Return the names of a task, or of all tasks of a group."""
    return [one.task_name for one in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [task.task_name]


def _members(index: dict[str, Any], name: str) -> Iterator[str | None]:
    """Yield the names of the tasks that a task, group or tag contains; None for one that the index doesn't know."""
    entry = index.get(name)
    if entry is None:
        yield None
        return
    is_tag = entry.yaml_path is None and entry.tags
    parts = sorted(entry.tags) if is_tag else (entry.cfg or {}).get("task")
    if not isinstance(parts, list):
        yield name
        return
    for part in parts:
        yield from _members(index, part if isinstance(part, str) else str(part.get("task") or part.get("group")))


def _locate_data(index: dict[str, Any], name: str | None) -> None:
    """Let a task of the index find the data next to its task file."""
    entry = index[name or ""]
    config = _with_data(entry.yaml_path) if entry.yaml_path else None
    if config is not None:
        index[entry.name] = replace(entry, yaml_path=None, cfg=config)


def _with_data(path: Path) -> dict[str, Any] | None:
    """Return a task file's contents with absolute paths of the data files beside it; None if it names none.

    The harness would look for them in the working directory.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    def data_files(config: dict[str, Any]) -> Any:
        return (config.get("dataset_kwargs") or {}).get("data_files")

    try:
        files = data_files(load_yaml(path, resolve_func=False))
        found = _beside(files, path.parent)
        if found == files:
            return None
        config = load_yaml(path)
    except Exception as error:  # it imports the functions that the file names
        raise MegapruneError(f"--tasks: {path} can't be read ({first_line(error)})") from error
    return config | {"dataset_kwargs": config["dataset_kwargs"] | {"data_files": found}}


def _beside(files: Any, folder: Path) -> Any:
    """Return `data_files`, as the datasets library takes them, with the paths of those that are in a folder."""
    if isinstance(files, dict):
        return {split: _beside(some, folder) for split, some in files.items()}
    if isinstance(files, list):
        return [_beside(some, folder) for some in files]
    if not isinstance(files, str) or "://" in files or Path(files).is_absolute():
        return files
    return str(folder / files) if any(folder.glob(files)) else files
