"""The file of unfinished work: a line of settings, then a line for each row that was written."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import whole_file


class Progress:
    """Rows by their index, stored as they are made. A line that was cut by the end of a process is made again.

    Args:
        output: the file that is complete at the end; unfinished work is stored beside it.
        settings: everything that determines the rows, as plain data.

    Raises:
        MegapruneError: the work was begun with other settings, or the file is none of this tool.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self._output, self._settings = output, dict(settings)
        self.path = output.with_name(output.name + ".tmp")
        self.done: dict[int, dict[str, Any]] = {}
        self._whole_bytes = self._read() if self.path.exists() else 0
        self._file: IO[bytes] | None = None

    def add(self, rows: Mapping[int, dict[str, Any]]) -> None:
        """Store rows; when this returns, they are on the disk."""
        if self._file is None:
            self._file = self._open()
        self._file.write(b"".join(_line({"index": index, **row}) for index, row in rows.items()))
        self._sync(self._file)
        self.done |= rows

    def finish(self) -> None:
        """Write the rows to the output in the order of their indices, and remove the unfinished work."""
        self.close()
        with whole_file(self._output) as aside, aside.open("wb") as file:
            file.writelines(_line(self.done[index]["row"]) for index in sorted(self.done))
            self._sync(file)
        with suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("r+b" if self._whole_bytes else "wb")
        file.truncate(self._whole_bytes)
        file.seek(self._whole_bytes)
        if not self._whole_bytes:
            file.write(_line(self._settings))
        return file

    def _read(self) -> int:
        """Read the stored rows and return the bytes of all whole lines."""
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        if not lines:
            return 0  # ended before the first line
        try:
            settings, *rows = map(json.loads, lines)
            self.done = {row.pop("index"): row for row in rows}
            changed = sorted(
                name
                for name in self._settings.keys() | settings.keys()
                if settings.get(name) != self._settings.get(name)
            )
        except (ValueError, KeyError, AttributeError):
            raise MegapruneError(f"{self.path} is not unfinished work of this command: remove it") from None
        if changed:
            raise MegapruneError(
                f"{self.path} was begun with other settings ({', '.join(changed)}): run the same command again, or "
                "remove this file to start over"
            )
        return len(whole) + 1

    @staticmethod
    def _sync(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
