"""Command lines from configuration dataclasses: argparse reads the words, `megaprune.config.mapping` checks them."""

import argparse
import difflib
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from megaprune.config.fields import flag_name
from megaprune.config.mapping import Setting, fill, overridden, read_recipe, settings_of
from megaprune.utils.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    # argparse overloads by namespace, which no caller here gives.
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse words that must all be known; suggest the flag that an unknown one resembles."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            self.error(f"unknown argument {word!r}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_flags(
    argv: Sequence[str],
    groups: Sequence[type],
    prog: str,
    description: str,
    alternatives: Sequence[Collection[str]] = (),
    recipes: bool = True,
) -> list[Any]:
    """Return dataclasses with the values of a command line and of its recipe, if it names one.

    Args:
        alternatives: sets of flags of which one is given; one on the command line replaces another in the recipe.
        recipes: whether ``--config`` names a recipe.

    Raises:
        UsageError: a flag or a recipe is wrong; names it.
    """
    _load_first(argv, groups)
    given = vars(_parser(groups, prog, description, recipes).parse_args(list(argv)))
    path = given.pop("config", None) if recipes else None
    if path is None:
        return fill(groups, given)
    recipe = read_recipe(Path(path))
    fill(groups, _placeholders(groups, recipe) | recipe, f"--config {path}: ")  # refuses what a flag replaces too
    return fill(groups, overridden(recipe, given, alternatives))


def _load_first(argv: Sequence[str], groups: Sequence[type]) -> None:
    """Load modules that flags name and that other flags' choices, and so `--help`, depend on."""
    parser = Parser(add_help=False, allow_abbrev=False)
    loaders = {name: setting.loads for name, setting in settings_of(groups).items() if setting.loads is not None}
    for name in loaders:
        parser.add_argument(flag_name(name), f"--{name}", dest=name, nargs="*", default=[])
    given, _ = parser.parse_known_args(list(argv))
    for name, load in loaders.items():
        load(getattr(given, name))


def _placeholders(groups: Sequence[type], given: Collection[str]) -> dict[str, Any]:
    """Return placeholders for required settings that are not given, so that the given ones can be checked alone."""
    required = (setting for setting in settings_of(groups).values() if setting.required)
    return {setting.name: setting.kind(1) for setting in required if setting.name not in given}


def _parser(groups: Sequence[type], prog: str, description: str, recipes: bool) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    sections: dict[type, Any] = {}
    for setting in settings_of(groups).values():
        if setting.group not in sections:
            title = getattr(setting.group, "_argument_group_name", None)
            sections[setting.group] = parser.add_argument_group(title) if title else parser
        _add(sections[setting.group], setting)
    if recipes:
        parser.add_argument(
            "--config",
            default=argparse.SUPPRESS,
            help="YAML recipe: flags by name; a flag on the command line wins",
        )
    # Both spellings are parsed; help and errors show the one with dashes.
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if "_" not in option]
    return parser


def _add(section: Any, setting: Setting) -> None:
    options = list(dict.fromkeys([flag_name(setting.name), f"--{setting.name}"]))
    common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": _help(setting)}
    if setting.kind is bool:
        section.add_argument(*options, nargs="?", const=True, metavar="BOOL", **common)
        if setting.field.default is True:
            off = [f"--no-{setting.name.replace('_', '-')}", f"--no_{setting.name}"]
            section.add_argument(*dict.fromkeys(off), action="store_false", **(common | {"help": argparse.SUPPRESS}))
        return
    metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.name.upper()
    if setting.takes_many:
        section.add_argument(*options, nargs="+", metavar=metavar, **common)
    else:
        section.add_argument(*options, metavar=metavar, **common)


def _help(setting: Setting) -> str:
    text, default = setting.help.replace("%", "%%"), setting.field.default
    if default in (None, MISSING, "") or "(default" in text:
        return text
    return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"
