"""Locks on outputs: only one process at a time writes an output. A lock ends with its process, however that ends.

The lock is a file next to or in the output. Its holder locks it with flock, writes its own identity into it, and
touches it every few seconds. A killed process loses its flock at once. If hosts do not see each other's flocks, or a
host crashed while holding one, the modification time shows whether the holder still runs. No clocks are compared: the
file is watched for a while.
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
from megaprune.utils.progress import say
from megaprune.utils.ranks import raise_together, rank

LOCK_NAME = ".lock"  # in an output folder that exists during the work
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # several beats: a busy holder may miss one
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set["_Lock"] = set()


def lock_beside(output: Path) -> Path:
    """Return the path of the lock of an output that appears only when it is complete."""
    return output.with_name(f".{output.name}{LOCK_NAME}")


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock during a block. Collective if a launcher started several processes: rank 0 locks for all.

    Args:
        path: the lock file. Missing folders are created, and removed again if they stay empty.
        what: the output as named by the user, with its flag.

    Raises:
        MegapruneError: another run holds the lock, or the file can't be written; on every rank.
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
    """A lock file, and the thread that touches it while it is held."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._file: int | None = None
        self._made: list[Path] = []
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        try:
            # Try until the locked file is also the one at this path: another process may have removed it meanwhile.
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
        if self._beating is not None:
            self._beating.join(1.0)
        _held.discard(self)
        with suppress(OSError):
            if self._is_named(self._file):
                os.unlink(self._path)
        os.close(self._file)
        self._file = None
        self._remove_folders()

    def forget(self) -> None:
        """Close the inherited file in a forked child, which must not hold the lock after its parent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self) -> None:
        kept, file = False, os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            mine = try_flock(file)
            holder = _read(file)
            if mine is False and holder is None:
                holder = self._await_record(file)
            if holder is not None and not self._is_over(holder, mine):
                raise MegapruneError(self._refusal(holder))
            if mine is False or (mine is None and holder is not None):
                # The holder's host crashed and its flock is still there, or there are no flocks: start with a new file.
                if self._is_named(file):
                    os.unlink(self._path)
                return
            _write(file)
            if mine is None:
                time.sleep(0.2)  # for one that began in the same moment: the last to write has it
            if self._is_named(file) and (mine or (_read(file) or {}).get("pid") == os.getpid()):
                self._file, kept = file, True
        finally:
            if not kept:
                os.close(file)

    def _is_over(self, holder: dict[str, Any], mine: bool | None) -> bool:
        """Return True if the process that a lock file describes has ended."""
        if holder.get("boot") == _boot_id():
            if mine is not None:
                return mine  # flocks work within one kernel, including its containers
            if holder.get("namespace") == _namespace():
                return holder.get("started") != _start_of(holder.get("pid"))
        say(f"{self._what}: watching for {WATCH_SECONDS:.0f} s whether {_who(holder)} still runs")
        return not self._beats()

    def _beats(self) -> bool:
        """Watch the file and return True if it is touched. It is opened again each time to bypass NFS caches."""
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
        """Wait for the identity that a new holder is about to write."""
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
            with suppress(OSError):  # released meanwhile, or a file server that does not answer for a moment
                if (file := self._file) is not None:
                    os.utime(file)

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
        with suppress(OSError):  # never created, or no longer empty
            for folder in self._made:
                folder.rmdir()


def _forget_all() -> None:
    for lock in _held:
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def try_flock(file: int) -> bool | None:
    """Try to lock a file. Return False if another process holds it, None if the file system has no locks."""
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
    """Return the holder that a lock file describes; None if the file is empty or damaged."""
    try:
        return dict(json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def identity() -> dict[str, Any]:
    """Return the identity of this process that it writes into a lock file."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "boot": _boot_id(),
        "namespace": _namespace(),
        "started": _start_of(os.getpid()),
    }


def _write(file: int) -> None:
    encoded = json.dumps(identity()).encode()
    os.pwrite(file, encoded, 0)
    os.ftruncate(file, len(encoded))
    os.fsync(file)


def _who(holder: dict[str, Any]) -> str:
    job = f" (SLURM job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}"


def _boot_id() -> str:
    """Return an id of the running kernel that changes with every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """Return the id of the namespace in which process ids are unique."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: Any) -> str | None:
    """Return the start time of a process in clock ticks, or None if it does not run. Process ids are reused."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state[0] == "Z" else state[19]
    except (OSError, IndexError):
        return None
