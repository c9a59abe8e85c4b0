"""Command lines and recipes that come from dataclasses."""

import difflib
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser

from megaprune.utils.errors import UsageError


def flag(help: str, default: Any = None, **metadata: Any) -> Any:
    """A field with its help text."""
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Parser(HfArgumentParser):
    """argparse over the dataclasses, with errors of one line."""

    def __init__(self, groups: Sequence[type], **kwargs: Any) -> None:
        super().__init__(list(groups), allow_abbrev=False, **kwargs)
        # Both spellings are parsed; help and errors show the one with dashes.
        for action in self._actions:
            action.option_strings = [option for option in action.option_strings if "_" not in option]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> tuple:
        """All arguments must be known: transformers would report the others with a traceback."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            self.error(f"unknown argument {word!r}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        return parsed, unknown

    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[type],
    prog: str,
    description: str,
    alternatives: Sequence[Collection[str]] = (),
) -> list[Any]:
    """The dataclasses that a command line and its recipe fill.

    Args:
        alternatives: sets of flags of which one is given; one on the command line replaces another in the recipe.

    Raises:
        UsageError: a flag or a recipe is wrong; names it.
    """
    parser = Parser(groups, prog=prog, description=description)
    parser.add_argument("--config", help="YAML recipe: flags by name; a flag on the command line wins")
    argv = list(argv)
    recipe_path = _recipe_path(argv)
    if recipe_path is not None:
        argv = [*_recipe_arguments(Path(recipe_path), parser, argv, alternatives), *argv]
    *parsed, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return parsed


def read_yaml(path: Path) -> Any:
    """What the file of ``--config`` holds.

    Raises:
        UsageError: there is none, or it is no YAML.
    """
    if not path.is_file():
        raise UsageError(f"--config {path} does not exist")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None


def _recipe_path(argv: Sequence[str]) -> str | None:
    for position, word in enumerate(argv):
        if word == "--config":
            if position + 1 == len(argv):
                raise UsageError("--config needs the path of a YAML recipe")
            return argv[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def _recipe_arguments(
    path: Path, parser: Parser, argv: Sequence[str], alternatives: Sequence[Collection[str]]
) -> list[str]:
    """The recipe as arguments, so that it is checked and converted like the command line that overrides it."""
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path} must map flags to values")
    takes_many = {action.dest: action.nargs == "+" for action in parser._actions}
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    arguments: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in takes_many or name in ("help", "config"):
            raise UsageError(f"--config {path}: unknown key {key!r}; keys are the flags' names, see --help")
        overridden = any(name in names and given.intersection(names) for names in alternatives)
        if value is None or value == [] or overridden:
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) or item is None for item in items):
            raise UsageError(f"--config {path}: {key} must be a value or a list of values")
        words = [str(item) for item in items]
        # In one word, so that a value that begins with a dash is still a value.
        arguments += [f"--{name}", *words] if takes_many[name] else [f"--{name}={','.join(words)}"]
    return arguments
