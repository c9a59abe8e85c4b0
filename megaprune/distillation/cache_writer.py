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


class ShardFile:
    """A shard that is being written. Windows are encoded and written in the background, in the order of arrival."""

    def __init__(self, folder: Path, plan: CachePlan, shard: int) -> None:
        self._path, self._plan, self._shard = folder / shard_name(shard), plan, shard
        self._aside = aside_of(self._path)
        self._left = iter(plan.windows_of(shard))
        self._checksums: list[int] = []
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
            self._file = self._aside.open("wb")
        for place, window in enumerate(windows):
            assert window == next(self._left), "windows of a shard came out of order"
            try:
                block = self._plan.layout.encode(targets.window(place))
            except ValueError as error:
                raise MegapruneError(f"{error} in window {window} of --train-data: check the model") from None
            self._checksums.append(block_checksum(block, window))
            self._file.write(block)
