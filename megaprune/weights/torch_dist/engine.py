"""Engine of a conversion: independent parts, each a file that gets its name when it is complete.

The parts depend on the input alone. Ranks and workers only share them, so the result does not depend on their number,
and parts that an interrupted conversion has finished are not written again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from megaprune.utils import failure, rank0
from megaprune.utils.disk import disk_error, explain
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.files import aside_of, put_in_place, whole_file
from megaprune.utils.locks import lock_beside, locked
from megaprune.utils.progress import bars_are_shown
from megaprune.utils.ranks import raise_together, rank, world_size
from megaprune.weights.byte_ranges import Advance

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """Output file, and its contents in order."""

    file: str
    items: tuple[T, ...]
    num_bytes: int


Write = Callable[[Part[T], Path, Advance], Any]


@dataclass(frozen=True)
class WorkOptions:
    """Number of threads per process, and whether to resume unfinished work."""

    workers: int | None = None
    resume: bool = False

    @property
    def threads(self) -> int:
        """Number of threads: 2 for a single process, so that one reads while the other writes."""
        return self.workers or (2 if world_size() == 1 else 1)


@dataclass(frozen=True)
class Conversion:
    """Finished conversion: the number of HF tensors, and the paths of input and output."""

    tensors: int
    source: Path
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"tensors": self.tensors, "source": str(self.source), "output": str(self.output)}


def cut(items: Iterable[tuple[T, int]], max_bytes: int) -> list[tuple[tuple[T, ...], int]]:
    """Divide items, each with its size in bytes, into runs of at most `max_bytes` bytes; a larger item is a run of its
    own.
    """
    runs: list[list[T]] = []
    totals: list[int] = []
    for item, num_bytes in items:
        if not runs or totals[-1] + num_bytes > max_bytes:
            runs.append([])
            totals.append(0)
        runs[-1].append(item)
        totals[-1] += num_bytes
    return [(tuple(run), total) for run, total in zip(runs, totals, strict=True)]


def convert(
    final: Path,
    flag: str,
    parts: Sequence[Part[T]],
    write: Write[T],
    finish: Callable[[Path, dict[str, Any]], None],
    plan: dict[str, Any],
    options: WorkOptions,
) -> None:
    """Create the folder `final`, completely or not at all. Collective if a launcher started several processes.

    Args:
        flag: the flag that names the folder.
        write: writes one part to a path and reports the written bytes; returns a record of the part, for JSON.
        finish: completes the folder, still under its temporary name, from the records of the parts' files.
        plan: the input of the parts, for JSON; unfinished work is resumed only if its plan is equal.

    Raises:
        MegapruneError: the input can't be read or the output can't be written; raised on every process.
        UsageError: the output exists, or there is unfinished work and `resume` is not given.
    """
    with processes(), locked(lock_beside(final), f"{flag} {final}"):
        work = _Work(aside_of(final))
        _together(lambda: _prepare(work, final, flag, plan, options.resume) if is_first() else None)
        if rank0.on_rank0_for_all(final.exists):  # an earlier process was interrupted after the last step
            return
        _together(lambda: _write_parts(work, parts, write, options.threads))
        _together(lambda: _finish(work, final, parts, finish) if is_first() else None)


@dataclass(frozen=True)
class _Work:
    """Folder of unfinished work: the incomplete result, and the records that resuming needs."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def record(self, part: Part) -> Path:
        return self.folder / f"{part.file}.json"

    def clear(self) -> None:
        """Remove the folder, the plan last, so that an interrupted removal can be detected."""
        for path in self.folder.iterdir():
            if path != self.plan:
                path.unlink()
        self.plan.unlink()
        self.folder.rmdir()

    def unfinished(self, part: Part) -> Path:
        return self.folder / part.file


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Import torch and limit it to one thread, because the parts run in parallel."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(work: _Work, final: Path, flag: str, plan: dict[str, Any], resume: bool) -> None:
    begun = work.plan.is_file()
    same = begun and json.loads(work.plan.read_text()) == plan
    if final.exists():
        if not (resume and same and not work.result.exists()):
            raise UsageError(f"{flag} {final} exists: remove it, or choose another folder")
        work.clear()
    elif begun:
        if not resume:
            raise UsageError(f"{work.folder} holds unfinished work: continue it with --resume, or remove it")
        if not same:
            raise UsageError(f"{work.folder} holds unfinished work on other input or with other flags: remove it")
    else:
        found = {path.name for path in work.folder.iterdir()} if work.folder.is_dir() else set()
        begun_only = all(name == work.result.name or name.startswith(f".{work.plan.stem}.") for name in found)
        if not begun_only or (work.result.is_dir() and any(work.result.iterdir())):
            raise UsageError(f"{work.folder}, the folder for unfinished work, holds other files: move or remove it")
        work.result.mkdir(parents=True, exist_ok=True)
        with whole_file(work.plan) as unnamed:
            unnamed.write_text(json.dumps(plan))


def _write_parts(work: _Work, parts: Sequence[Part[T]], write: Write[T], num_threads: int) -> None:
    mine = parts[rank() :: world_size()]
    left = [part for part in mine if not (work.result / part.file).exists()]
    total = sum(part.num_bytes for part in mine)
    done = total - sum(part.num_bytes for part in left)
    settings = dict(unit="B", unit_scale=True, disable=not bars_are_shown(), dynamic_ncols=True)
    with tqdm(total=total, initial=done, **settings) as bar, ThreadPoolExecutor(num_threads) as pool:
        futures: list[Future] = [pool.submit(_write_part, work, part, write, bar.update) for part in left]
        try:
            failed = [future for future in wait(futures, return_when=FIRST_EXCEPTION).done if future.exception()]
        finally:  # also on Ctrl-C
            pool.shutdown(cancel_futures=True)
    for future in failed:
        future.result()


def _write_part(work: _Work, part: Part[T], write: Write[T], advance: Advance) -> None:
    try:
        record = write(part, work.unfinished(part), advance)
        work.record(part).write_text(json.dumps(record))
    except OSError as error:
        if disk_error(error) is None:
            raise
        work.unfinished(part).unlink(missing_ok=True)  # a partial file is useless and takes space
        line = explain(error, work.unfinished(part), "continue with --resume", part.num_bytes)
        raise MegapruneError(line) from error
    work.unfinished(part).rename(work.result / part.file)  # last, so that every finished part has a record


def _finish(work: _Work, final: Path, parts: Sequence[Part[T]], finish: Callable[[Path, dict[str, Any]], None]) -> None:
    finish(work.result, {part.file: json.loads(work.record(part).read_text()) for part in parts})
    put_in_place(work.result, final)
    work.clear()


@contextmanager
def processes() -> Any:
    """A block in which the processes of a launcher are joined, if there is one. Collective."""
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    failure.watch()
    try:
        yield
    finally:
        dist.destroy_process_group()
    failure.stop()  # not if this rank fails: the others must be told first


def on_rank0(work: Callable[[], None]) -> None:
    """Run a function on rank 0 while the other ranks wait. Collective if a launcher started several processes.

    Raises:
        MegapruneError: the function failed on rank 0; raised on every process.
    """
    with processes():
        _together(lambda: work() if is_first() else None)


def _together(work: Callable[[], None]) -> None:
    """Do this process's share, then raise the error of any process on all of them."""
    error = None
    try:
        work()
    except MegapruneError as met:
        error = met
    except OSError as met:
        error = MegapruneError(explain(met, remedy="continue with --resume"))
    raise_together(error)


def is_first() -> bool:
    """Return whether this is rank 0, which prints."""
    return rank() == 0
