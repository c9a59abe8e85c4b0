"""Files that are written completely or not at all, and JSON without NaN."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def aside_of(final: Path, owner: str = "") -> Path:
    """Return the temporary path of a file or folder that is written first and then renamed to `final`.

    Args:
        owner: distinguishes the temporary paths of processes that may write `final` at the same time.
    """
    return final.with_name(f"{final.name}.{owner}.tmp" if owner else f"{final.name}.tmp")


def put_in_place(aside: Path, final: Path, replace: bool = False) -> None:
    """Rename a complete file or folder to its final path. An existing file or empty folder is replaced.

    Args:
        replace: replace a folder that is not empty, too.
    """
    if replace and final.is_dir():
        shutil.rmtree(final)
    os.replace(aside, final)


def put_in_place_once(aside: Path, final: Path) -> None:
    """Rename a complete folder to its final path, unless another process has created the same folder meanwhile."""
    try:
        os.replace(aside, final)
    except OSError:
        if not final.is_dir():
            raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` if the block succeeds.

    A reader sees either the old file or the complete new one. If the block raises, no file is left. A missing folder
    is created. The temporary path keeps the suffix, because matplotlib derives the format from it.
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
    """Return `value` as standard JSON. NaN and infinities, which JSON cannot represent, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, completely or not at all (see `strict_json`)."""
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
