"""Locks on outputs: what one process writes, a second one leaves alone until the first has ended, however it ended.

The lock is a file beside or in the output, which its holder locks with flock, describes itself in and touches every few
seconds. A killed process loses its flock at once. Where hosts don't see each other's flocks, or a host went down with
one, the touching says whether the holder lives: no clock is compared, the file is watched for a while.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megaprune.utils.errors import MegapruneError
from megaprune.utils.ranks import raise_together, rank

LOCK_NAME = ".lock"  # in a folder that exists while it is worked on
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # several beats: a busy holder may miss one
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set["_Lock"] = set()


def lock_beside(output: Path) -> Path:
    """The lock of an output that is not there before it is whole."""
    return output.with_name(f".{output.name}{LOCK_NAME}")


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """A block that no other run is in. Collective where a launcher started several processes: rank 0 locks for all.

    Args:
        path: the lock file; folders that are missing are made, and go again if they are left empty.
        what: the output as the user named it, with its flag.

    Raises:
        MegapruneError: another run holds it, or the file can't be written; on every rank.
    """
    lock, error = _Lock(path, what), None
    try:
        if rank() == 0:
            try:
                lock.acquire()
            except MegapruneError as met:
                error = met
        raise_together(error)
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._file: int | None = None
        self._made: list[Path] = []
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        try:
            # one look at a time, until the file that is locked is also the one of that name
            while self._file is None:
                self._make_folders()
                self._try()
        except OSError as error:
            self._remove_folders()
            raise MegapruneError(f"{self._what} can't be written ({error.strerror}): choose another") from None
        except MegapruneError:
            self._remove_folders()
            raise
        _held.add(self)
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        if self._file is None:
            return
        self._released.set()
        self._beating.join(1.0)
        _held.discard(self)
        with suppress(OSError):
            if self._is_named(self._file):
                os.unlink(self._path)
        os.close(self._file)
        self._file = None
        self._remove_folders()

    def forget(self) -> None:
        """Gives up a lock that the parent of this process holds: a child that outlives it is not to hold it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            mine = _flock(file)
            holder = _read(file)
            if mine is False and holder is None:
                holder = self._await_record(file)
            if holder is not None and not self._is_over(holder, mine):
                raise MegapruneError(self._refusal(holder))
            if mine is False or (mine is None and holder is not None):
                # It died with a host whose flock is still there, or there are no flocks: begin with a file of our own.
                if self._is_named(file):
                    os.unlink(self._path)
                return
            _write(file)
            if mine is None:
                time.sleep(0.2)  # for one that began in the same moment: the last to write has it
            if self._is_named(file) and (mine or _read(file).get("pid") == os.getpid()):
                self._file, file = file, None
        finally:
            if file is not None:
                os.close(file)

    def _is_over(self, holder: dict[str, Any], mine: bool | None) -> bool:
        """Whether the process that a lock file describes has ended."""
        if holder.get("boot") == _boot_id():
            if mine is not None:
                return mine  # flocks hold within one kernel, containers included
            if holder.get("namespace") == _namespace():
                return holder.get("started") != _start_of(holder.get("pid"))
        print(f"{self._what}: watching for {WATCH_SECONDS:.0f} s whether {_who(holder)} still runs", flush=True)
        return not self._beats()

    def _beats(self) -> bool:
        """Whether the file is touched while it is watched. Opened anew each time, which asks a file server."""
        first, until = self._touched(), time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            if (now := self._touched()) != first:
                return now is not None  # None: released
        return False

    def _touched(self) -> int | None:
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def _await_record(self, file: int) -> dict[str, Any] | None:
        """What a holder writes that has only just taken the lock."""
        for _ in range(20):
            time.sleep(0.05)
            if (holder := _read(file)) is not None or not self._is_named(file):
                return holder
        raise MegapruneError(f"{self._what} is in use by another process: wait for it to end, or choose another")

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self._what} is in use by {_who(holder)} since {holder.get('since', '?')}: wait for it to end, end it, "
            "or choose another"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError, TypeError):  # released meanwhile, or a file server that hangs for a moment
                os.utime(self._file)

    def _is_named(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _make_folders(self) -> None:
        folder = self._path.parent
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        self._made = self._made or missing
        folder.mkdir(parents=True, exist_ok=True)

    def _remove_folders(self) -> None:
        with suppress(OSError):  # never made, or by now there is something in it
            for folder in self._made:
                folder.rmdir()


def _forget_all() -> None:
    for lock in _held:
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def _flock(file: int) -> bool | None:
    """Whether the file is locked for this process now; None where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _read(file: int) -> dict[str, Any] | None:
    """Whom a lock file describes; None where it is empty or damaged."""
    try:
        return dict(json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(file: int) -> None:
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "boot": _boot_id(),
        "namespace": _namespace(),
        "started": _start_of(os.getpid()),
    }
    encoded = json.dumps(record).encode()
    os.pwrite(file, encoded, 0)
    os.ftruncate(file, len(encoded))
    os.fsync(file)


def _who(holder: dict[str, Any]) -> str:
    job = f" (SLURM job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}"


def _boot_id() -> str:
    """This kernel, since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """In which process ids mean the same."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: Any) -> str | None:
    """When a process was started, in the kernel's own count: process ids are used again. None where there is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state[0] == "Z" else state[19]
    except (OSError, IndexError):
        return None
