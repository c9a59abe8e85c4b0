"""The runs of a comparison: one per model, method, size and seed, all with the same other flags."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.config.mapping import read_yaml
from megaprune.config.schema import WHAT_TO_PRUNE, Config, pruned_layers_of
from megaprune.selection.plugins import load_modules
from megaprune.selection.registry import Method, find
from megaprune.utils.errors import UsageError

_KEYS = ("run", "models", "methods", "seeds", "rank_windows", *WHAT_TO_PRUNE)
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
        assert self.config.run.save is not None  # `read_comparison` sets it
        return Path(self.config.run.save)


@dataclass(frozen=True)
class Comparison:
    """The runs, and the number of validation windows on which their masks are ranked among all masks (0: none)."""

    runs: list[PlannedRun]
    rank_windows: int = 0


def read_comparison(path: Path, save: Path) -> Comparison:
    """Read the runs that a YAML file asks for, each checked like a command line.

    The file has the keys `run` (flags common to all), `methods` (names, or mappings with `method`, other flags, a
    `label`, and `seeds` of its own), `seeds`, and one of `num_layers_to_prune`, `prune_ratio`, `target_params` (a list
    of sizes). `models`, where there are several, maps their names to the flags of each. With `rank_windows` each mask
    is ranked among all masks of its size. So that all recover alike, methods such as `clp`, which train the layers
    beside the cut by default, train all layers here unless their mapping says otherwise. `manual` runs once, with the
    `prune_layers` of its mapping.

    Raises:
        UsageError: names the key or the run.
    """
    asked = read_yaml(path)
    if not isinstance(asked, dict) or not isinstance(asked.get("run"), dict):
        raise UsageError(f"--config {path} must have a key 'run', which maps the runs' common flags to values")
    unknown = [key for key in asked if key not in _KEYS]
    if unknown:
        raise UsageError(f"--config {path}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    own = [key for key in asked["run"] if str(key).replace("-", "_") in _NOT_COMMON]
    if own:
        raise UsageError(f"--config {path}: {own[0]} has no place under 'run', whose flags all runs share")
    sizes = [key for key in WHAT_TO_PRUNE if key in asked]
    if len(sizes) != 1 or sizes[0] == "prune_layers":
        raise UsageError(f"--config {path}: give one of num_layers_to_prune, prune_ratio, target_params, as a list")
    rank_windows = asked.get("rank_windows", 0)
    if not isinstance(rank_windows, int) or isinstance(rank_windows, bool) or rank_windows < 0:
        raise UsageError(f"--config {path}: rank_windows must be a number of validation windows")
    runs = list(_runs(path, asked, sizes[0], save))
    if rank_windows and not all(run.config.data.valid_data for run in runs):
        raise UsageError(f"--config {path}: rank_windows needs valid_data")
    names = [run.folder.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--config {path}: {twice[0]} is asked for twice; give the methods labels of their own")
    return Comparison(runs, rank_windows)


def _runs(path: Path, asked: dict[str, Any], size_key: str, save: Path) -> Iterator[PlannedRun]:
    for model, flags_of_model in _models(path, asked).items():
        for method in _listed(path, asked, "methods"):
            own = dict(method) if isinstance(method, dict) else {"method": method}
            if not isinstance(own.get("method"), str):
                raise UsageError(f"--config {path}: {method!r} is no method: give a name, or a mapping with 'method'")
            label = _as_folder(path, "label", own.pop("label", own["method"]))
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
