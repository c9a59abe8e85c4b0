"""Writing a teacher cache: each shard gets its name when it is complete, and the manifest comes last."""

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megaprune.distillation.cache_format import (
    CHECKSUM_BYTES,
    CachePlan,
    block_checksum,
    checksums_digest,
    shard_name,
    write_manifest,
)
from megaprune.distillation.cache_reader import map_shard
from megaprune.distillation.losses import TeacherTargets
from megaprune.utils.disk import explain
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_of, put_in_place, write_json

_PLAN = "plan.json"


def check_plan(folder: Path, plan: CachePlan) -> None:
    """Check that a folder is empty or holds an unfinished cache of the same plan.

    Raises:
        MegapruneError: it holds something else.
    """
    path = folder / _PLAN
    if not is_begun(folder):
        if folder.exists() and any(entry.name != "data-cache" for entry in folder.iterdir()):
            raise MegapruneError(f"{folder}, the folder for unfinished work, holds other files: move or remove it")
        return
    try:
        begun = json.loads(path.read_bytes())
        same = begun == plan.record()
    except ValueError:
        raise MegapruneError(f"{path} is damaged: remove {folder} to start again") from None
    if not same:
        wanted = plan.record() | plan.key.__dict__
        begun = begun | begun["key"]
        name = next(name for name in wanted if name != "key" and begun.get(name) != wanted[name])
        raise MegapruneError(
            f"{folder} holds an unfinished cache of another {name.replace('_', ' ')}: remove it, or choose another "
            "--output"
        )


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds an unfinished cache."""
    return (folder / _PLAN).is_file()


def begin(folder: Path, plan: CachePlan) -> None:
    """Mark a folder as this plan's."""
    write_json(folder / _PLAN, plan.record())


def is_written(folder: Path, plan: CachePlan, shard: int) -> bool:
    """Return whether a shard is complete and its checksums match."""
    path = folder / shard_name(shard)
    if not path.is_file() or path.stat().st_size != plan.shard_bytes(shard):
        return False
    blocks, checksums = map_shard(path, plan, shard)
    windows = plan.windows_of(shard)
    return all(block_checksum(b, w) == c for b, w, c in zip(blocks, windows, checksums, strict=True))


def finish(folder: Path, final: Path, plan: CachePlan) -> None:
    """Write the manifest of a folder with all its shards, and rename the folder to `final`."""
    digests = [
        checksums_digest(map_shard(folder / shard_name(shard), plan, shard)[1].tobytes())
        for shard in range(plan.num_shards)
    ]
    write_manifest(folder, plan, digests)
    (folder / _PLAN).unlink()
    put_in_place(folder, final)


def begun_windows(folder: Path, plan: CachePlan, shard: int) -> int:
    """Return how many windows of a shard an interrupted job has kept. Damaged ones are removed."""
    path, size = _begun_file(folder, shard), plan.layout.num_bytes
    if not path.is_file():
        return 0
    windows, num_bytes = plan.windows_of(shard), path.stat().st_size
    count = num_bytes // (size + CHECKSUM_BYTES)
    if 0 < count < len(windows) and num_bytes == count * (size + CHECKSUM_BYTES):
        blocks, checksums = np.memmap(path, np.uint8, "r", shape=(count, size)), _stored_checksums(path, plan, count)
        if all(block_checksum(b, w) == c for b, w, c in zip(blocks, windows[:count], checksums, strict=True)):
            return count
    path.unlink()
    return 0


def _begun_file(folder: Path, shard: int) -> Path:
    """Return the file of the first windows of an interrupted shard: their blocks, then their checksums."""
    return (folder / shard_name(shard)).with_suffix(".begun")


def _stored_checksums(path: Path, plan: CachePlan, count: int) -> list[int]:
    return np.fromfile(path, "<u4", count, offset=count * plan.layout.num_bytes).tolist()


class ShardFile:
    """A shard that is being written. Windows are encoded and written in the background, in the order of arrival.

    Args:
        begun: number of its windows that `begun_windows` has found; they are not added again.
    """

    def __init__(self, folder: Path, plan: CachePlan, shard: int, begun: int = 0) -> None:
        self._path, self._plan, self._shard = folder / shard_name(shard), plan, shard
        self._aside, self._begun_file = aside_of(self._path), _begun_file(folder, shard)
        self._left = iter(plan.windows_of(shard)[begun:])
        self._checksums: list[int] = _stored_checksums(self._begun_file, plan, begun) if begun else []
        self._file: BinaryIO | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher-shard")
        self._pending: list[Future[None]] = []

    def add(self, windows: Iterable[int], targets: TeacherTargets) -> None:
        """Add the targets [s, b, ...] of consecutive windows, on the CPU."""
        self._pending.append(self._pool.submit(self._write, list(windows), targets))

    def close(self) -> None:
        """Wait until all windows are written, and give the shard its name.

        Raises:
            MegapruneError: it can't be written, or targets are not finite.
        """
        self._pool.shutdown()
        try:
            for written in self._pending:
                written.result()
            assert next(self._left, None) is None, "a shard was closed before it was full"
            assert self._file is not None, "a shard was closed before it was begun"
            self._file.write(np.asarray(self._checksums, "<u4").tobytes())
            self._file.close()
            put_in_place(self._aside, self._path)
        except OSError as error:
            raise MegapruneError(
                explain(error, self._aside, "run the same command to continue", self._plan.shard_bytes(self._shard))
            ) from None

    def suspend(self) -> None:
        """Wait until the added windows are written, and keep them for `begun_windows`.

        Raises:
            MegapruneError: they can't be written, or targets are not finite.
        """
        self._pool.shutdown()
        try:
            for written in self._pending:
                written.result()
            if self._file is not None:
                self._file.write(np.asarray(self._checksums, "<u4").tobytes())
                self._file.close()
                is_full = len(self._checksums) == len(self._plan.windows_of(self._shard))
                put_in_place(self._aside, self._path if is_full else self._begun_file)
        except OSError as error:
            raise MegapruneError(explain(error, self._aside, "run the same command to continue")) from None

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._file is not None:
            with suppress(OSError):  # flushing the rest may fail as well
                self._file.close()
            if error is not None:
                self._aside.unlink(missing_ok=True)

    def _write(self, windows: list[int], targets: TeacherTargets) -> None:
        if self._file is None:
            if self._checksums:
                put_in_place(self._begun_file, self._aside)
                self._file = self._aside.open("r+b")
                self._file.seek(len(self._checksums) * self._plan.layout.num_bytes)
                self._file.truncate()
            else:
                self._file = self._aside.open("wb")
        for place, window in enumerate(windows):
            assert window == next(self._left), "windows of a shard came out of order"
            try:
                block = self._plan.layout.encode(targets.window(place))
            except ValueError as error:
                raise MegapruneError(f"{error} in window {window} of --train-data: check the model") from None
            self._checksums.append(block_checksum(block, window))
            self._file.write(block)
