"""Measurements of a run, stored as they are made: a run that was stopped or killed measures nothing twice.

The file has a line for each part of a measurement. Parts are sums over a few micro-batches; when all parts of a
measurement are known, their sum is stored, which holds at every parallel layout.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megaprune.mcore import parallel, schedule
from megaprune.utils import stopping
from megaprune.utils.disk import one_line
from megaprune.utils.errors import MegapruneError

# A power failure costs at most the measurements of this time; the end of the process costs none.
_SYNC_SECONDS = 10.0
# Keys of a measurement that run together in one part, so that a part does not take long.
_AT_ONCE = 32

# Takes this replica's micro-batches and the positions of keys; returns their sums [keys, values], the same on all ranks
Measure = Callable[[Sequence[schedule.MicroBatch], Sequence[int]], Tensor]


class Records:
    """Measurements by their keys, the same on every rank. Collective, as are its methods except `close`.

    Args:
        path: the file, which rank 0 reads and writes; None keeps the measurements in memory.
        scope: plain data that determines the measurements besides their keys; those of other scopes are not used.

    Raises:
        MegapruneError: the file is damaged.
    """

    def __init__(self, path: Path | None = None, scope: Any = None) -> None:
        self._path = path
        self.scope = hashlib.sha256(json.dumps(scope, sort_keys=True).encode()).hexdigest()[:16]
        self._known: dict[str, list[float]] = {}
        self._whole_bytes = 0
        self._file: IO[bytes] | None = None
        self._synced_at = 0.0
        if path is not None:
            self._known = parallel.on_rank0_for_all(self._read)

    def once(self, key: str, measure: Callable[[], Sequence[float]], where: str) -> list[float]:
        """Return a measurement, which is made unless it is known.

        Args:
            where: the point that the job has reached, for the message of a run that stops here.
        """
        if key not in self._known:
            self.add({key: measure()})
            parallel.stop_if_asked(key.split()[0], where)
        return self._known[key]

    def forget(self, key: str) -> None:
        """Make a measurement again when it is next asked for, because something that belongs to it is missing."""
        self._known.pop(key, None)

    def summed(
        self,
        keys: Sequence[str],
        batches: Sequence[schedule.MicroBatch],
        measure: Measure,
        where: str,
        batches_per_part: int = 1,
    ) -> Tensor:
        """Return the sums over micro-batches, fp64 [keys, values] on the CPU; unknown ones are measured in parts.

        Args:
            keys: names of the sums; similar ones next to each other run faster.
            batches: this replica's micro-batches.
            where: as of `once`.
            batches_per_part: micro-batches of a replica in one part.
        """
        left = [number for number, key in enumerate(keys) if key not in self._known]
        starts = range(0, len(batches), batches_per_part)
        windows = batches[0].tokens.shape[0] * parallel.data_parallel_size() * batches_per_part if left else 0
        parts = [f"part {number} of {len(starts)} with {windows} windows" for number in range(len(starts))]
        for start, part in zip(starts, parts, strict=True):
            missing = [number for number in left if f"{keys[number]} {part}" not in self._known]
            for first in range(0, len(missing), _AT_ONCE):
                chosen = missing[first : first + _AT_ONCE]
                found = measure(batches[start : start + batches_per_part], chosen).double().tolist()
                self.add({f"{keys[number]} {part}": sums for number, sums in zip(chosen, found, strict=True)})
                parallel.stop_if_asked(keys[0].split()[0], where)
        if left:
            self.add({keys[number]: self._total(keys[number], parts) for number in left})
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float64)

    def add(self, found: Mapping[str, Sequence[float]]) -> None:
        """Store measurements; on return, they survive the end of the process."""
        values = {key: [float(value) for value in measured] for key, measured in found.items()}
        self._known |= values
        if self._path is not None and parallel.rank() == 0:
            self._write(values)
        stopping.saved()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _total(self, key: str, parts: Iterable[str]) -> list[float]:
        sums = [torch.tensor(self._known[f"{key} {part}"], dtype=torch.float64) for part in parts]
        return torch.stack(sums).sum(0).tolist()

    def _read(self) -> dict[str, list[float]]:
        assert self._path is not None
        whole, end, _ = self._path.read_bytes().rpartition(b"\n") if self._path.is_file() else (b"", b"", b"")
        self._whole_bytes = len(whole + end)  # a line that was cut by the end of the process is measured again
        known: dict[str, list[float]] = {}
        try:
            for line in whole.split(b"\n") if whole else []:
                record = json.loads(line)
                if record["scope"] == self.scope:
                    known |= record["values"]
        except (ValueError, KeyError, TypeError):
            raise MegapruneError(f"{self._path} is damaged: remove it to measure the layers again") from None
        return known

    def _write(self, values: Mapping[str, Sequence[float]]) -> None:
        assert self._path is not None
        with one_line(self._path):
            if self._file is None:
                self._file = self._path.open("r+b" if self._whole_bytes else "wb", buffering=0)
                self._file.truncate(self._whole_bytes)
                self._file.seek(self._whole_bytes)
            self._file.write(json.dumps({"scope": self.scope, "values": values}).encode() + b"\n")
            if time.monotonic() - self._synced_at > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced_at = time.monotonic()
