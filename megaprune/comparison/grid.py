"""The runs of a comparison: one per model, method, size and seed, all with the same other flags."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.config.mapping import read_yaml
from megaprune.config.schema import WHAT_TO_PRUNE, Config
from megaprune.config.sizes import pruned_layers_of
from megaprune.evaluation.harness import TaskOptions
from megaprune.evaluation.perplexity import DTYPES
from megaprune.selection.plugins import load_modules
from megaprune.selection.registry import Method, find
from megaprune.utils.errors import UsageError

_TASK_KEYS = ("tasks", "task_path", "task_limit", "task_batch_size", "num_fewshot", "task_pruned")
_KEYS = ("run", "models", "methods", "levers", "seeds", "rank_windows", "dtype", *_TASK_KEYS, *WHAT_TO_PRUNE)
# flags that differ from run to run, or would leave a comparison without results
_NOT_COMMON = ("method", "seed", "save", "dry_run", *WHAT_TO_PRUNE)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    label: str
    size: int | float
    config: Config
    model: str = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.save or "")


@dataclass(frozen=True)
class TaskSettings:
    """The benchmark tasks of a comparison.

    Args:
        pruned: whether each mask is also scored before recovery.
        dtype: of the models, as `evaluate --dtype`.
    """

    names: tuple[str, ...]
    path: str | None = None
    limit: int | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    pruned: bool = False
    dtype: str = "auto"

    def options(self, *names: str) -> TaskOptions:
        """Return the harness's options for some of the tasks."""
        return TaskOptions(names, self.path, self.limit, self.batch_size, self.num_fewshot)

    def how(self) -> dict[str, Any]:
        """Return what a stored score depends on."""
        return {"path": self.path, "limit": self.limit, "num_fewshot": self.num_fewshot, "dtype": self.dtype}


@dataclass(frozen=True)
class Comparison:
    """The runs and what is measured beside them.

    Args:
        rank_windows: number of validation windows on which the masks are ranked among all masks; 0 for no ranking.
        tasks: the tasks to score; None for none.
        dtype: of the models when the exports are evaluated, as `evaluate --dtype`.
    """

    runs: list[PlannedRun]
    rank_windows: int = 0
    tasks: TaskSettings | None = None
    dtype: str = "auto"


def read_comparison(path: Path, save: Path, overrides: Mapping[str, Any] | None = None) -> Comparison:
    """Read the runs that a YAML file asks for, each checked like a command line.

    The file has the keys `run` (flags common to all), `methods` (names, or mappings with `method`, other flags, a
    `label`, and `seeds` of its own), `levers` (labels mapped to flags; each method runs with each), `seeds`, and one of
    `num_layers_to_prune`, `prune_ratio`, `target_params`, `target_active_params`, `target_memory` (a list of sizes).
    `models`, where there are several, maps their names to the flags of each. With `rank_windows` each mask is ranked
    among all masks of its size. `tasks`, a list of names, are scored on the teacher and on every recovered model, and
    with `task_pruned` on each mask before recovery. So that all recover alike, methods such as `clp`, which train the
    layers beside the cut by default, train all layers here unless their mapping says otherwise. `manual` runs once,
    with the `prune_layers` of its mapping.

    Args:
        overrides: keys whose values replace the file's.

    Raises:
        UsageError: names the key or the run.
    """
    asked = read_yaml(path)
    if not isinstance(asked, dict) or not isinstance(asked.get("run"), dict):
        raise UsageError(f"--config {path} must have a key 'run', which maps the runs' common flags to values")
    asked |= overrides or {}
    unknown = [key for key in asked if key not in _KEYS]
    if unknown:
        raise UsageError(f"--config {path}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    own = [key for key in asked["run"] if str(key).replace("-", "_") in _NOT_COMMON]
    if own:
        raise UsageError(
            f"--config {path}: {own[0]} is not allowed under 'run', which holds the flags that all runs share"
        )
    sizes = [key for key in WHAT_TO_PRUNE if key in asked]
    if len(sizes) != 1 or sizes[0] == "prune_layers":
        raise UsageError(
            f"--config {path}: give one of num_layers_to_prune, prune_ratio, target_params, target_active_params, "
            "target_memory, as a list"
        )
    rank_windows = asked.get("rank_windows", 0)
    if not isinstance(rank_windows, int) or isinstance(rank_windows, bool) or rank_windows < 0:
        raise UsageError(f"--config {path}: rank_windows must be a number of validation windows")
    runs = list(_runs(path, asked, sizes[0], save))
    if rank_windows and not all(run.config.data.valid_data for run in runs):
        raise UsageError(f"--config {path}: rank_windows needs valid_data")
    names = [run.folder.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--config {path}: {twice[0]} appears twice; give each method a label of its own")
    dtype = str(asked.get("dtype", "auto"))
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--config {path}: dtype must be one of auto, {', '.join(DTYPES)}")
    return Comparison(runs, rank_windows, _tasks(path, asked, dtype), dtype)


def _runs(path: Path, asked: dict[str, Any], size_key: str, save: Path) -> Iterator[PlannedRun]:
    for model, flags_of_model in _models(path, asked).items():
        for label, own in _methods(path, asked):
            seeds = _listed(path, own if "seeds" in own else asked, "seeds")
            own.pop("seeds", None)
            chosen = _method(path, label, asked["run"] | flags_of_model | own)
            if chosen.recovers != "all":
                own.setdefault("recovery_layers", "all")
            sizes = _listed(path, asked, size_key)
            if chosen.names_layers:
                sizes = [len(pruned_layers_of(str(own.get("prune_layers", ""))))]
            for size, seed in itertools.product(sizes, seeds):
                of_run = {"seed": seed} if chosen.names_layers else {"seed": seed, size_key: size}
                flags = asked["run"] | flags_of_model | own | of_run
                flags["save"] = str(save / "runs" / "-".join(filter(None, [model, label, str(size), f"seed{seed}"])))
                try:
                    config = Config.from_mapping(flags)
                except UsageError as error:
                    raise UsageError(f"--config {path}, {label}: {error}") from None
                yield PlannedRun(label, size, config, model)


def _methods(path: Path, asked: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each method with each lever: the label of its runs, and its flags, among which `seeds` may be."""
    levers = asked.get("levers", {"": {}})
    if (
        not isinstance(levers, dict)
        or not levers
        or not all(isinstance(flags or {}, dict) for flags in levers.values())
    ):
        raise UsageError(f"--config {path}: levers must map labels to flags, such as long: {{train_iters: 90}}")
    for method in _listed(path, asked, "methods"):
        own = dict(method) if isinstance(method, dict) else {"method": method}
        if not isinstance(own.get("method"), str):
            raise UsageError(f"--config {path}: {method!r} is not a method: give a name, or a mapping with 'method'")
        label = _as_folder(path, "label", own.pop("label", own["method"]))
        for lever, flags in levers.items():
            wrong = [key for key in flags or {} if str(key).replace("-", "_") in _NOT_COMMON]
            if wrong:
                raise UsageError(f"--config {path}: {wrong[0]} is not allowed under 'levers'")
            name = "-".join(filter(None, [label, _as_folder(path, "lever", lever)]))
            yield name, _normalized(own) | _normalized(flags or {})


def _tasks(path: Path, asked: dict[str, Any], dtype: str) -> TaskSettings | None:
    names = asked.get("tasks")
    given = [key for key in _TASK_KEYS[1:] if key in asked]
    if names is None:
        if given:
            raise UsageError(f"--config {path}: {given[0]} needs tasks, a list of names")
        return None
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"--config {path}: tasks must be a list of names")
    for key, least in (("task_limit", 1), ("task_batch_size", 1), ("num_fewshot", 0)):
        value = asked.get(key)
        if key in asked and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UsageError(f"--config {path}: {key} must be a number of at least {least}")
    if not isinstance(asked.get("task_pruned", False), bool):
        raise UsageError(f"--config {path}: task_pruned must be true or false")
    if not isinstance(asked.get("task_path", ""), str):
        raise UsageError(f"--config {path}: task_path must be a folder")
    return TaskSettings(
        names=tuple(dict.fromkeys(names)),
        path=asked.get("task_path"),
        limit=asked.get("task_limit"),
        batch_size=asked.get("task_batch_size", 8),
        num_fewshot=asked.get("num_fewshot"),
        pruned=asked.get("task_pruned", False),
        dtype=dtype,
    )


def _normalized(flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags by their names with underscores, so that one spelling replaces the other."""
    return {str(key).replace("-", "_"): value for key, value in flags.items()}


def _method(path: Path, label: str, flags: dict[str, Any]) -> Method:
    """The method of a run, from the modules that its flags name."""
    modules = next((value for key, value in flags.items() if str(key).replace("-", "_") == "method_module"), None) or []
    try:
        load_modules([str(module) for module in (modules if isinstance(modules, list) else [modules])])
        return find(flags["method"])
    except UsageError as error:
        raise UsageError(f"--config {path}, {label}: {error}") from None


def _models(path: Path, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the flags of each model by its name; one nameless entry if the file names no models."""
    models = asked.get("models", {"": {}})
    if not isinstance(models, dict) or not models or not all(isinstance(flags, dict) for flags in models.values()):
        raise UsageError(f"--config {path}: models must map names to flags, such as small: {{hf_model: DIR}}")
    return {_as_folder(path, "model", name): flags for name, flags in models.items()}


def _as_folder(path: Path, kind: str, name: Any) -> str:
    """Return a name after checking that it can be part of a folder's name."""
    if not isinstance(name, str | int | float) or "/" in str(name) or str(name) in (".", ".."):
        raise UsageError(f"--config {path}: the {kind} {name!r} can't be part of a folder's name; give it another")
    return str(name)


def _listed(path: Path, asked: dict[str, Any], key: str) -> list[Any]:
    value = asked.get(key)
    if not isinstance(value, list) or not value:
        raise UsageError(f"--config {path}: {key} must be a list")
    return value
