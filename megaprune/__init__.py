"""megaprune: learned layer pruning and recovery of large language models on Megatron-Core.

The functions below are the Python API. They are imported on first use, so that importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megaprune.version import __version__

if TYPE_CHECKING:
    from megaprune import selection
    from megaprune.api import evaluate, export_hf, generate_data, import_hf, prune, push, remove_layers, score_layers
    from megaprune.config.schema import Config
    from megaprune.utils.errors import MegapruneError, RunStopped, UsageError
    from megaprune.utils.stopping import StopRequest

__all__ = [
    "Config",
    "MegapruneError",
    "RunStopped",
    "StopRequest",
    "UsageError",
    "__version__",
    "evaluate",
    "export_hf",
    "generate_data",
    "import_hf",
    "prune",
    "push",
    "remove_layers",
    "score_layers",
    "selection",
]

_HOMES = dict.fromkeys(
    ("evaluate", "export_hf", "generate_data", "import_hf", "prune", "push", "remove_layers", "score_layers"),
    "megaprune.api",
) | {
    "Config": "megaprune.config.schema",
    **dict.fromkeys(("MegapruneError", "RunStopped", "UsageError"), "megaprune.utils.errors"),
    "StopRequest": "megaprune.utils.stopping",
}


def __getattr__(name: str) -> Any:
    if name == "selection":
        return importlib.import_module("megaprune.selection")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
