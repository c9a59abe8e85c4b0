"""Termination of all ranks when one fails. The failed rank sets a key in the launcher's store, which all ranks poll.

Otherwise a rank that waits for the failed one in a collective would wait until the timeout of the process group, or
until the launcher kills it: SIGTERM alone does not end a rank, because it requests a checkpoint and an orderly stop.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

from megaprune.utils.ranks import world_size

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_INTERVAL_SECONDS, _CONNECT_SECONDS = 1.0, 20
# Followed by the number of the launcher's restart: the store outlives the processes that it restarts.
_KEY = "megaprune/failure"

_watch: _Watch | None = None
_ends_together = False


def end_together() -> None:
    """Has this process end when another rank fails, from `watch` on: as commands do, and a library must not."""
    global _ends_together
    _ends_together = True


def watch() -> None:
    """Start to watch for failures of other ranks, once, if a launcher started several processes."""
    global _watch
    if _ends_together and _watch is None and world_size() > 1 and "MASTER_PORT" in os.environ:
        _watch = _Watch()
        atexit.register(stop)


def stop() -> None:
    """Stop watching. Call this before the process leaves the process group."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def claim(status: int, line: str) -> bool | None:
    """Announce the failure of this rank, which terminates the others.

    Args:
        status: the exit status of the other ranks.
        line: the message that other nodes print, because their logs may be separate.

    Returns:
        True if this rank failed first and must print the reason; None if the other ranks could not be notified.
    """
    return None if _watch is None else _watch.claim(status, line)


class _Watch:
    def __init__(self) -> None:
        from torch.distributed import TCPStore  # imported here: a single process does not need torch

        self._key = f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # A separate connection: that of the process group blocks during collectives.
        self._store: TCPStore = TCPStore(
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="failure-watch")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * _INTERVAL_SECONDS)

    def claim(self, status: int, line: str) -> bool | None:
        # When a process ends, the launcher sends SIGTERM to all others. Ignore it while this one reports its failure.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stop()
        try:
            if self._store.add(f"{self._key}/count", 1) > 1:
                return False
            self._store.set(self._key, json.dumps({"status": status, "line": line, "node": _node()}))
        except Exception:  # the store ended with the rank that hosted it, which failed first
            return None
        return True

    def _look(self) -> None:
        while not self._stopped.wait(_INTERVAL_SECONDS):
            try:
                if not self._store.check([self._key]):
                    continue
                failure = json.loads(self._store.get(self._key))
            except Exception:  # the store ended with its rank, or the run is over
                return
            if not self._stopped.is_set():
                _end(failure)


def _end(failure: dict) -> None:
    if failure["node"] != _node() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(failure["line"], file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(failure["status"])  # the main thread may wait in a collective forever


def _node() -> str:
    return os.environ.get("GROUP_RANK", "0")
