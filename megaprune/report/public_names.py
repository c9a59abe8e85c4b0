"""Names that may be published: hub ids as they are, and of local paths the last part alone."""

import ast
import os
import re
import shlex
from pathlib import PurePath, PurePosixPath, PureWindowsPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# The folder of a revision in the hub's cache: .../models--OWNER--NAME/snapshots/COMMIT
_CACHED = re.compile(r"(?:.*[/\\])?models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# Scripts of this repository, whose place everyone knows.
_SCRIPT = re.compile(r"(?:tools|examples/\w+)/\w+\.py")
# What is left of a text that is neither a command line nor a call.
_PATH_IN_TEXT = re.compile(r"(?<![\w:/.])(?:~|\.{1,2})?/[^\s'\"`,;()\[\]{}]+")


def public_name(name: str) -> str:
    """Return a hub id unchanged, also that of a folder in the hub's cache, and only the last part of a local path."""
    if cached := _CACHED.fullmatch(name):
        return f"{cached[1]}/{cached[2]}"
    return name if is_hub_id(name) else _last_part(name)


def is_hub_id(name: str) -> bool:
    """Return whether a name is owner/name and not a path that exists here."""
    return _reads_as_hub_id(name) and not os.path.lexists(name)


def without_paths(command: str) -> str:
    """Return a command line, or a call in Python, with every local path reduced to its last part."""
    try:
        call = ast.parse(command, mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    if isinstance(call, ast.Call):
        return ast.unparse(_PublicStrings().visit(call))
    try:
        words = shlex.split(command)
    except ValueError:
        return _PATH_IN_TEXT.sub(lambda found: _last_part(found[0]), command)
    shown = [_public_word(word) for word in words]
    return command if shown == words else shlex.join(shown)


class _PublicStrings(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(_public_word(node.value)) if isinstance(node.value, str) else node


def _public_word(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and not re.search(r"[/\\~]", flag):
        return f"{flag}={_public_word(value)}"
    if _SCRIPT.fullmatch(word) or not _is_path(word):
        return word
    return public_name(word)


def _is_path(word: str) -> bool:
    if "://" in word:
        return word.startswith("file:")
    if word.startswith(("~", "/")) or _WINDOWS.match(word):
        return True
    return "/" in word and (os.path.lexists(word) or not any(char in word for char in " \n{}"))


def _reads_as_hub_id(name: str) -> bool:
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _last_part(name: str) -> str:
    path: PurePath = PureWindowsPath(name) if _WINDOWS.match(name) else PurePosixPath(os.path.normpath(name))
    if path.name in ("", ".", ".."):
        path = PurePosixPath(os.path.abspath(name))
    return path.name or "model"
