"""What is compared: one run for each method, size and seed, all with the same other flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.config import WHAT_TO_PRUNE, Config, parse_config
from megaprune.errors import UsageError
from megaprune.flags import read_yaml

_KEYS = ("run", "methods", "seeds", *WHAT_TO_PRUNE)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    label: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.save)


def read_comparison(path: Path, save: Path) -> list[PlannedRun]:
    """The runs that a YAML file asks for, each checked like a command line.

    The file has the keys `run` (flags common to all), `methods` (names, or mappings with `method`, other flags and a
    `label`), `seeds`, and one of `num_layers_to_prune`, `prune_ratio`, `target_params` (a list of sizes). So that all
    recover alike, `clp` trains all layers here unless its mapping says otherwise.

    Raises:
        UsageError: names the key or the run.
    """
    asked = read_yaml(path)
    if not isinstance(asked, dict) or not isinstance(asked.get("run"), dict):
        raise UsageError(f"--config {path} must have a key 'run', which maps the runs' common flags to values")
    unknown = [key for key in asked if key not in _KEYS]
    if unknown:
        raise UsageError(f"--config {path}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    sizes = [key for key in WHAT_TO_PRUNE if key in asked]
    if len(sizes) != 1 or sizes[0] == "prune_layers":
        raise UsageError(f"--config {path}: give one of num_layers_to_prune, prune_ratio, target_params, as a list")
    runs = list(_runs(path, asked, sizes[0], save))
    names = [run.folder.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--config {path}: {twice[0]} is asked for twice; give the methods labels of their own")
    return runs


def _runs(path: Path, asked: dict[str, Any], size_key: str, save: Path) -> Iterator[PlannedRun]:
    for method in _listed(path, asked, "methods"):
        own = dict(method) if isinstance(method, dict) else {"method": method}
        label = str(own.pop("label", own.get("method")))
        if own.get("method") == "clp":
            own.setdefault("recovery_layers", "all")
        for size in _listed(path, asked, size_key):
            for seed in _listed(path, asked, "seeds"):
                flags = asked["run"] | own | {size_key: size, "seed": seed}
                flags["save"] = str(save / "runs" / f"{label}-{size}-seed{seed}")
                try:
                    config = parse_config(_argv(flags), "compare.py")
                except UsageError as error:
                    raise UsageError(f"--config {path}, {label}: {error}") from None
                yield PlannedRun(label, config.recovery.seed, config)


def _listed(path: Path, asked: dict[str, Any], key: str) -> list[Any]:
    value = asked.get(key)
    if not isinstance(value, list) or not value:
        raise UsageError(f"--config {path}: {key} must be a list")
    return value


def _argv(flags: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in flags.items():
        name = "--" + str(key).replace("_", "-")
        if value is None:
            continue
        if isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words.append(f"{name}={value}")
    return words
