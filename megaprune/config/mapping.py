"""Conversion of settings to checked dataclasses. Recipes, keyword arguments and flags all go through `fill`."""

import difflib
import json
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megaprune.config.fields import bounds_of, flag_name
from megaprune.utils.errors import UsageError

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclass(frozen=True)
class Setting:
    """One field of a configuration dataclass, with its type resolved."""

    group: type
    field: Field
    hint: Any

    @property
    def name(self) -> str:
        """The name of the field."""
        return self.field.name

    @cached_property
    def kind(self) -> type:
        """The type of the value, or of each item of a list: str, int, float or bool."""
        hint = self._without_none
        if get_origin(hint) is Literal:
            return str
        return get_args(hint)[0] if self.takes_many else hint

    @property
    def takes_many(self) -> bool:
        """True if the value is a list."""
        return get_origin(self._without_none) is list

    @property
    def choices(self) -> tuple[str, ...]:
        """The permitted values; empty if any value is permitted."""
        if "choices" in self.field.metadata:
            return tuple(self.field.metadata["choices"]())
        return get_args(self._without_none) if get_origin(self._without_none) is Literal else ()

    @property
    def help(self) -> str:
        """The help text."""
        text = self.field.metadata["help"]
        return text() if callable(text) else text

    @property
    def loads(self) -> Callable[[list[str]], None] | None:
        """A function that is called with the values before other settings are converted."""
        return self.field.metadata.get("loads")

    @property
    def required(self) -> bool:
        """True if the setting has no default."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @cached_property
    def _without_none(self) -> Any:
        if get_origin(self.hint) in (Union, types.UnionType):
            return next(part for part in get_args(self.hint) if part is not type(None))
        return self.hint


def settings_of(groups: Iterable[type]) -> dict[str, Setting]:
    """Return the settings of all groups by name."""
    settings: dict[str, Setting] = {}
    for group in groups:
        hints = get_type_hints(group)
        settings |= {field.name: Setting(group, field, hints[field.name]) for field in fields(group)}
    return settings


def fill(groups: Sequence[type], values: Mapping[str, Any], origin: str = "") -> list[Any]:
    """Return the groups with these values, each checked and converted as on a command line.

    Args:
        groups: dataclasses whose fields come from `flag`.
        values: settings by their flags' names, with dashes or underscores; None means the default.
        origin: prefix of errors, such as the file of a recipe.

    Raises:
        UsageError: a setting is unknown, of a wrong type or out of range; names it.
    """
    settings = settings_of(groups)
    given: dict[type, dict[str, Any]] = {group: {} for group in groups}
    named = normalized(values, settings, origin)
    for name, value in named.items():
        if (load := settings[name].loads) is not None:
            load(_converted(settings[name], value, origin))
    for name, value in named.items():
        setting = settings[name]
        given[setting.group][name] = _converted(setting, value, origin)
    missing = [flag_name(name) for name, setting in settings.items() if setting.required and name not in values]
    if missing:
        raise UsageError(f"{origin}the following arguments are required: {', '.join(missing)}")
    return [group(**given[group]) for group in groups]


def normalized(values: Mapping[str, Any], settings: Mapping[str, Setting], origin: str = "") -> dict[str, Any]:
    """Return the given values by the names of their settings, without those that mean the default.

    Raises:
        UsageError: a name is unknown, or a value is neither a scalar nor a list of scalars.
    """
    found: dict[str, Any] = {}
    for key, value in _without_sections(values, settings, origin).items():
        name = str(key).replace("-", "_")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1)
            hint = f"did you mean {near[0]}?" if near else "keys are the flags' names, see --help"
            raise UsageError(f"{origin}unknown key {key!r}; {hint}")
        items = list(value) if isinstance(value, list | tuple) else [value]
        if value is None or not items:
            continue
        if any(isinstance(item, dict | list | tuple | set) or item is None for item in items):
            raise UsageError(f"{origin}{key} must be a value or a list of values")
        found[name] = value
    return found


def _without_sections(values: Mapping[str, Any], settings: Mapping[str, Setting], origin: str) -> dict[str, Any]:
    """Return the values with each section, such as `ddp: {bucket_size: 1}`, as items of the list that it belongs to.

    The items of the list itself come last, so that they win.

    Raises:
        UsageError: a section is no mapping of names to scalars or lists of scalars.
    """
    plain = dict(values)
    for name, setting in settings.items():
        sections = [key for key in setting.field.metadata.get("sections", ()) if plain.get(key) is not None]
        items: list[str] = []
        for key in sections:
            section = plain.pop(key)
            if not isinstance(section, Mapping):
                raise UsageError(f"{origin}{key} must map fields to values")
            for inner, value in section.items():
                if isinstance(value, Mapping):
                    raise UsageError(f"{origin}{key}.{inner} must be a value or a list of values")
                items.append(f"{key}.{inner}={json.dumps(value)}")
        given = plain.get(name) or []
        if sections:
            plain[name] = [*items, *(given if isinstance(given, list | tuple) else [given])]
    return plain


def overridden(
    base: Mapping[str, Any], changes: Mapping[str, Any], alternatives: Sequence[Collection[str]]
) -> dict[str, Any]:
    """Return the settings of `base`, replaced by those of `changes`.

    Args:
        alternatives: sets of settings of which only one is given. A setting among the changes removes all others of its
            set from the base.
    """
    names = {str(name).replace("-", "_") for name, value in changes.items() if value is not None}
    replaced = set(names).union(*(set(group) for group in alternatives if names.intersection(group)))
    kept = {key: value for key, value in base.items() if str(key).replace("-", "_") not in replaced}
    return kept | dict(changes)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UsageError: the file does not exist or is not YAML.
    """
    if not path.is_file():
        raise UsageError(f"--config {path} does not exist")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a YAML recipe: settings by their flags' names.

    Raises:
        UsageError: the file does not exist or is not a mapping.
    """
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path} must map flags to values")
    return recipe


def _converted(setting: Setting, value: Any, origin: str) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    if setting.takes_many:
        return [_scalar(setting, item, origin) for item in items]
    # A recipe may give a list for a flag that takes words separated by commas, such as `prune_layers: [3, 7]`.
    return _scalar(setting, value if len(items) == 1 and items[0] is value else ",".join(map(str, items)), origin)


def _scalar(setting: Setting, value: Any, origin: str) -> Any:
    flag, kind = flag_name(setting.name), setting.kind
    if kind is bool:
        return _boolean(flag, value, origin)
    try:
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError
        # Convert the text: YAML reads 1e-5 as a string, and 1.5 must not become an int.
        converted = value if type(value) is kind else kind(str(value))
    except ValueError:
        raise UsageError(f"{origin}argument {flag}: invalid {kind.__name__} value: {str(value)!r}") from None
    if setting.choices and converted not in setting.choices:
        known = ", ".join(map(repr, setting.choices))
        raise UsageError(f"{origin}argument {flag}: invalid choice: {converted!r} (choose from {known})")
    if isinstance(converted, int | float):
        _check_bounds(setting, converted)
    return converted


def _boolean(flag: str, value: Any, origin: str) -> bool:
    word = str(value).lower()
    if word not in _TRUE + _FALSE:
        raise UsageError(f"{origin}argument {flag}: invalid bool value: {str(value)!r} (choose from true, false)")
    return word in _TRUE


def _check_bounds(setting: Setting, value: float) -> None:
    flag, bounds = flag_name(setting.name), bounds_of(setting.field)
    if bounds.between is not None and not bounds.between[0] < value < bounds.between[1]:
        raise UsageError(f"{flag} {value} is not between {bounds.between[0]} and {bounds.between[1]}")
    if not math.isfinite(value):
        raise UsageError(f"{flag} {value} is not a finite number")
    for limit, broken, words in (
        (bounds.least, bounds.least is not None and value < bounds.least, "is less than"),
        (bounds.above, bounds.above is not None and value <= bounds.above, "is not above"),
        (bounds.most, bounds.most is not None and value > bounds.most, "is above"),
        (bounds.below, bounds.below is not None and value >= bounds.below, "is not below"),
    ):
        if broken:
            raise UsageError(f"{flag} {value} {words} {limit}")
