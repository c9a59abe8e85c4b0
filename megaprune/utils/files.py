"""Files that appear whole or not at all, and JSON without NaN."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def aside_folder(final: Path) -> Path:
    """The folder in which the parts of the folder `final` are gathered until it is whole; it then takes its name."""
    return final.with_name(final.name + ".tmp")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which takes `path`'s place when the block ends well.

    A reader sees the old file or the new one, never half of it; a block that raises leaves no trace.
    The folder is made where it is missing. The suffix stays last, since matplotlib reads the format from it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def strict_json(value: Any, indent: int | None = None) -> str:
    """`value` as standard JSON. NaN and infinities, which JSON has no word for, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all (see `strict_json`)."""
    with whole_file(path) as aside:
        aside.write_text(strict_json(value, indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
