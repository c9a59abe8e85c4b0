"""Reading a teacher cache: memory-mapped, read ahead, every block checked."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from megaprune.distillation.cache_format import (
    CHECKSUM_BYTES,
    CacheKey,
    CachePlan,
    block_checksum,
    checksums_digest,
    read_manifest,
    shard_name,
)
from megaprune.distillation.losses import TeacherTargets
from megaprune.utils.errors import MegapruneError, UsageError

_FLAG = "--teacher-logits"
_REMEDY = "give the right one, or create one with cache_teacher.py"
_OPEN_SHARDS = 64  # each takes a file descriptor; the usual limit of a process is 1,024
_THREADS = 2


class TeacherCache:
    """The targets of every window of a data set. Opening it reads the manifest and checks the files' sizes.

    Args:
        wanted: the inputs that the targets must have been made from.
        top_k: logits that are read per token; at most as many as are stored.

    Raises:
        MegapruneError: there is no cache, it was made from other inputs, or it is damaged.
        UsageError: it holds fewer logits per token.
    """

    def __init__(self, folder: Path, wanted: CacheKey, top_k: int) -> None:
        self.folder = folder
        self.plan, self._digests = read_manifest(folder, _FLAG)
        self.plan.key.check(wanted, f"{_FLAG} {folder}", _REMEDY)
        if top_k > self.plan.top_k:
            raise UsageError(
                f"--distill-top-k {top_k}: {_FLAG} {folder} holds {self.plan.top_k} logits per token; lower it, or "
                "create a cache with more"
            )
        self._top_k = top_k
        self._check_sizes()
        self._open = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="teacher-cache")
        self._ahead: dict[int, Future[TeacherTargets]] = {}

    def check_shards(self) -> None:
        """Check the table of checksums at the end of every shard; blocks are checked when they are read.

        Raises:
            MegapruneError: a table is damaged.
        """
        for shard in range(self.plan.num_shards):
            self._open(shard)

    def window(self, window: int) -> TeacherTargets:
        """Return the targets of one window, [s, ...].

        Raises:
            MegapruneError: the stored bytes differ from those that were written.
        """
        shard = window // self.plan.windows_per_shard
        blocks, checksums = self._open(shard)
        place = window - self.plan.windows_of(shard).start
        block = np.array(blocks[place])  # a copy, so that the checked bytes are the ones used
        if block_checksum(block, window) != checksums[place]:
            raise self._damaged(shard)
        return self.plan.layout.decode(block, self._top_k)

    def windows(self, windows: Sequence[int]) -> TeacherTargets:
        """Return the targets of a micro-batch's windows, [s, b, ...], on the CPU. Raises as `window`."""
        found = []
        for window in windows:
            ahead = self._ahead.pop(window, None)
            found.append(self.window(window) if ahead is None else ahead.result())
        return TeacherTargets.stack(found)

    def prefetch(self, windows: Sequence[int]) -> None:
        """Start to read these windows in the background; a later call of `windows` must take them."""
        for window in windows:
            if window not in self._ahead:
                self._ahead[window] = self._pool.submit(self.window, window)

    def _check_sizes(self) -> None:
        if len(self._digests) != self.plan.num_shards:
            raise MegapruneError(
                f"{_FLAG} {self.folder}: the manifest does not list the shards that the data needs; {_REMEDY}"
            )
        for shard in range(self.plan.num_shards):
            path = self.folder / shard_name(shard)
            if not path.is_file():
                raise MegapruneError(f"{path} is missing: download it again, or create it again with cache_teacher.py")
            if path.stat().st_size != self.plan.shard_bytes(shard):
                raise self._damaged(shard)

    def _open_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a shard's mapped blocks, uint8 [windows, bytes], and their checksums."""
        blocks, checksums = map_shard(self.folder / shard_name(shard), self.plan, shard)
        if checksums_digest(checksums.tobytes()) != self._digests[shard]:
            raise self._damaged(shard)
        return blocks, checksums

    def _damaged(self, shard: int) -> MegapruneError:
        return MegapruneError(
            f"{self.folder / shard_name(shard)} is damaged: its bytes are not those that were written; download it "
            "again, "
            "or create it again with cache_teacher.py"
        )


def map_shard(path: Path, plan: CachePlan, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard's mapped blocks, uint8 [windows, bytes of a block], and their checksums, uint32 [windows].

    The caller has checked the file's size.
    """
    whole = np.memmap(path, np.uint8, mode="r")
    count = len(plan.windows_of(shard))
    blocks = whole[: -count * CHECKSUM_BYTES].reshape(count, plan.layout.num_bytes)
    return blocks, np.array(whole[-count * CHECKSUM_BYTES :]).view("<u4")
