"""Modules of the user's own methods, loaded before the other flags are parsed: `--help` lists their methods."""

import argparse
from collections.abc import Sequence

from megaprune.selection.plugins import load_modules


def load_given_modules(argv: Sequence[str]) -> None:
    """Import what `--method-module` names.

    Raises:
        UsageError: it can't be imported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method-module", "--method_module", nargs="*", default=[])
    load_modules(parser.parse_known_args(list(argv))[0].method_module)
