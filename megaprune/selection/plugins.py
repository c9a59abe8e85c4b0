"""Modules that register methods: the built-in ones, those of installed packages, and files that the user names."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from megaprune.utils.errors import MegapruneError, UsageError

ENTRY_POINTS = "megaprune.methods"


@cache
def load_builtin() -> None:
    """Import every module in `megaprune.selection.methods`."""
    package = importlib.import_module("megaprune.selection.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


@cache
def load_installed() -> None:
    """Load the entry points `megaprune.methods` of installed packages.

    Raises:
        MegapruneError: an entry point can't be loaded.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # a foreign package may raise anything
            owner = f" of {entry.dist.name}" if entry.dist else ""
            raise MegapruneError(
                f"the plugin {entry.value}{owner} can't be loaded: {_said(error)}; fix or uninstall it"
            ) from error


def load_modules(modules: Iterable[str]) -> None:
    """Import the modules of `--method-module`, each once: Python files, or importable modules by name.

    Raises:
        UsageError: a module does not exist or can't be imported.
    """
    load_builtin()  # first, so that a name conflict is reported for the user's module
    for module in modules:
        try:
            if module.endswith(".py"):
                _import_file(Path(module))
            else:
                importlib.import_module(module)
        except MegapruneError as error:
            raise UsageError(f"--method-module {module}: {error}") from None
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"--method-module {module} can't be imported: {_said(error)}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError("there is no such file")
    path = path.resolve()
    # files of the same name in different folders are different modules
    name = f"megaprune_method_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
