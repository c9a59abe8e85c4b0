"""Errors of disks that are full, over quota, read-only or failing, as one line instead of a traceback."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaprune.utils.errors import MegapruneError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_DISKS = (*_NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)
_OF_PATHS = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
# The forms in which writers in other languages and processes report an error number.
_NUMBER = re.compile(r"\[Errno (\d+)\]|\bcode: (\d+)|\bos error (\d+)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container")
_AGAIN = "run the same command again"


def disk_error(error: BaseException) -> OSError | None:
    """Return the disk error that an exception is, wraps or reports in its message; None for other exceptions."""
    for met in _chain(error):
        found = met if isinstance(met, OSError) else _told(met)
        if found is not None and found.errno in (*_OF_DISKS, *_OF_PATHS):
            return found
    return None


@contextmanager
def one_line(path: Path, remedy: str = _AGAIN, num_bytes: int | None = None) -> Iterator[None]:
    """Raise the disk errors of a block as a MegapruneError of one line.

    Args:
        path: the output, named if the error itself names no file.
        remedy: the action that helps when the disk works again.
        num_bytes: the space that is needed, if known.

    Raises:
        MegapruneError: a disk error occurred.
    """
    try:
        yield
    except MegapruneError:
        raise
    except BaseException as error:  # torch's checkpoint writer raises a BaseException
        met = disk_error(error)
        if met is None:
            raise
        raise MegapruneError(explain(met, path, remedy, num_bytes)) from error


def explain(error: OSError, path: Path | None = None, remedy: str = _AGAIN, num_bytes: int | None = None) -> str:
    """Return one line about a disk error; if the disk is full, with the needed and the available space."""
    where = Path(error.filename or path or ".")
    reason = error.strerror or str(error)
    if error.errno not in _NO_ROOM:
        return f"{where} can't be written ({reason}): fix this, and {remedy}"
    left = room_left(where)
    needs = f" and {size_text(num_bytes)} are needed" if num_bytes else ""
    limits = "make room" if left < (num_bytes or 0) else "make room, quotas and limits on files included"
    return f"{where} can't be written ({reason}, where {size_text(left)} are left{needs}): {limits}, and {remedy}"


def check_room(folder: Path, num_bytes: int, remedy: str = "or choose another disk") -> None:
    """Check that the disk of a folder has enough space. The folder need not exist.

    Raises:
        MegapruneError: it has not.
    """
    free = room_left(folder)
    if free < num_bytes:
        raise MegapruneError(
            f"{folder} needs {size_text(num_bytes)}, and {_existing(folder)} has {size_text(free)} left: make room, "
            f"{remedy}"
        )


def room_left(path: Path) -> int:
    """Return the bytes that this user may still write to the disk of a path. The path need not exist."""
    found = os.statvfs(_existing(path))
    return (found.f_bavail if os.geteuid() else found.f_bfree) * found.f_frsize


def size_text(num_bytes: int) -> str:
    """Return a size as text, such as `1.23 GB` (decimal units)."""
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    size, units = num_bytes / 1000, ["KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.2f} {units[0]}"


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes, and the exceptions of other processes that it contains."""
    left, met = [error], set()
    while left:
        one = left.pop(0)
        if id(one) in met:
            continue
        met.add(id(one))
        yield one
        left += _exceptions_in([one.__cause__, *one.args, *getattr(one, "failures", {}).values()])


def _exceptions_in(values: Iterable[Any]) -> list[BaseException]:
    """Return the exceptions among the values. The checkpoint writer pairs each one with its traceback."""
    flat = [value[0] if isinstance(value, tuple) and value else value for value in values]
    return [value for value in flat if isinstance(value, BaseException)]


def _told(error: BaseException) -> OSError | None:
    text = str(error)
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
        return OSError(errno.ENOSPC, "the file takes no more")  # torch.save loses the number
    if (found := _NUMBER.search(text)) is None:
        return None
    number = int(next(filter(None, found.groups())))
    return OSError(number, os.strerror(number))
