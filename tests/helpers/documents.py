"""Shell commands of the documentation, and a check that everything they name exists."""

import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.run import get_args_parser

from megaprune.cli import main as cli
from megaprune.cli.prune import parse_config

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/README.md")
    for path in ROOT.glob(pattern)
)
_BLOCK = re.compile(r"^( *)```(?:bash|sh|shell|console)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`((?:python|torchrun|make|megaprune|pip|sbatch|\.venv/bin/\w+) [^`\n]+)`(?!`)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_ASSIGNMENT = re.compile(r"\w+=")
_ELLIPSIS = "..."
_NOT_A_FLAG = "--this-is-no-flag"


class Wrong(Exception):
    """Error of a documented command that names something nonexistent."""


@dataclass(frozen=True)
class Command:
    """Command on a page, as words."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Return whether the command is complete: no ellipsis and, if prose names a verb, flags."""
        return _ELLIPSIS not in self.words and (self.verb is None or self.verb[1] != [])

    @property
    def verb(self) -> tuple[str, list[str]] | None:
        """Return the verb of the project that the command runs, and the verb's words."""
        words = list(self.words)
        if words[0] == "torchrun":
            words = _script_of_torchrun(words[1:])
        if Path(words[0]).name in ("python", "python3"):
            words = words[1:]
        elif words[0] == "megaprune":
            return words[1], words[2:]
        path = Path(words[0])
        return (path.stem.replace("_", "-"), words[1:]) if path.parent.name == "tools" else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands_of(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of a page: all in shell blocks and, in prose, those that begin with a known program."""
    for block in _BLOCK.finditer(text):
        yield from _commands_of_block(page, text.count("\n", 0, block.start(2)) + 1, block[2])
    prose = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for found in _INLINE.finditer(prose):
        yield Command(page, prose.count("\n", 0, found.start()) + 1, tuple(shlex.split(found[1])))


def flags_of(text: str) -> set[str]:
    """Return the flags in a page's code, in blocks or inline."""
    code = [block[2] for block in _BLOCK.finditer(text)] + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _BLOCK.sub("", text))
    return {flag for part in code for flag in _FLAG.findall(part)}


def _commands_of_block(page: str, first: int, block: str) -> Iterator[Command]:
    lines = block.split("\n")
    while lines:
        line, number = lines.pop(0), first
        first += 1
        while line.endswith("\\"):
            line = line[:-1] + lines.pop(0)
            first += 1
        words = shlex.split(line, comments=True)
        while words and (_ASSIGNMENT.match(words[0]) or words[0] in ("export", "do")):
            words.pop(0)
        # A loop's body is checked with its variable as it stands. Lines of flags alone show how to write them.
        if words and words[0] not in ("for", "done") and not words[0].startswith("-"):
            yield Command(page, number, tuple(words))


def check(command: Command) -> None:
    """Check that the program, files, targets and flags of a command exist.

    Raises:
        Wrong: one of them does not exist.
    """
    words = list(command.words)
    program = Path(words[0]).name
    if program == "make":
        _check_make(words[1:])
    elif program == "pip":
        _check_extras(words[1:])
    elif program == "sbatch":
        _check_batch_job(words[1:])
    elif program == "pre-commit":
        _exists(".pre-commit-config.yaml")
    elif command.verb is not None:
        _check_verb(*command.verb, whole=command.whole)
    elif program in ("python", "python3"):
        _check_script(words[1:])
    else:
        raise Wrong(f"nothing is known about the program {words[0]!r}")


def _script_of_torchrun(words: Sequence[str]) -> list[str]:
    """Return the script and its words, after torchrun's own parser has read those before it."""
    parser = get_args_parser()
    parser.exit_on_error = False
    parser.error = _raise
    parsed = parser.parse_args([word for word in words if word != _ELLIPSIS])
    rest = [parsed.training_script, *parsed.training_script_args]
    return rest + [_ELLIPSIS] * (_ELLIPSIS in words)


def _raise(message: str) -> None:
    raise Wrong(message)


def _check_make(words: Sequence[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *\?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        name, is_variable, _ = word.partition("=")
        if name not in (variables if is_variable else targets):
            raise Wrong(f"the Makefile has no {name}")


def _check_extras(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        found = re.fullmatch(r"(?:megaprune|\.)\[([\w,]+)\]", word)
        for extra in found[1].split(",") if found else ():
            if extra not in extras:
                raise Wrong(f"megaprune has no extra {extra}")


def _check_batch_job(words: Sequence[str]) -> None:
    at = next((at for at, word in enumerate(words) if word.endswith(".sbatch")), None)
    if at is None:
        raise Wrong("sbatch is given no script")
    _exists(words[at])
    _check_verb("prune", ["--config", *words[at + 1 :]], whole=True)


def _check_script(words: Sequence[str]) -> None:
    """Check a script outside of tools/ by its text, because what it imports may not be installed."""
    if words[0] == "-m":
        if words[1] != "pytest":
            raise Wrong(f"nothing is known about the module {words[1]}")
        for word in words[2:]:
            if not word.startswith("-"):
                _exists(word)
        return
    _exists(words[0])
    text = (ROOT / words[0]).read_text()
    for word in words[1:]:
        if word.startswith("--") and f'"{word}"' not in text:
            raise Wrong(f"{words[0]} has no flag {word}")


def _check_verb(verb: str, words: Sequence[str], whole: bool) -> None:
    if verb not in cli.VERBS:
        raise Wrong(f"unknown verb {verb}")
    if "--config" in words:
        _exists(words[words.index("--config") + 1])
    if not whole:
        unknown = set(_FLAG.findall(" ".join(words))) - help_flags(verb, *_sub_verb(verb, words))
        if unknown:
            raise Wrong(f"{verb} has no flag {min(unknown)}")
        return
    # The verb's own parser names the first flag that it does not know: of correct flags, the one added here.
    status, line = cli.attempt(verb, [*words, _NOT_A_FLAG])
    if status != 2 or _NOT_A_FLAG not in str(line):
        raise Wrong(str(line))
    if verb == "prune":
        parse_config(words)


def _sub_verb(verb: str, words: Sequence[str]) -> Sequence[str]:
    return words[:1] if verb in ("benchmark", "convert") else ()


def _exists(path: str) -> None:
    if not (ROOT / path).exists():
        raise Wrong(f"there is no {path}")


def help_flags(verb: str, *sub_verb: str) -> set[str]:
    """Return the flags that the --help of a verb shows."""
    with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
        cli.attempt(verb, [*sub_verb, "--help"])
    return set(_FLAG.findall(out.getvalue()))


def known_flags() -> set[str]:
    """Return the flags of all verbs."""
    calls = [(verb,) for verb in cli.VERBS if verb not in ("benchmark", "convert")]
    calls += [("convert", name) for name in ("import", "export", "verify")]
    calls += [("benchmark", name) for name in ("train-step", "convert", "inference", "teacher-cache")]
    return set().union(*(help_flags(*call) for call in calls))
