"""The end of all ranks when one fails: it says so in the launcher's store, where every rank looks each second.

Without it a rank that waits for the failed one in a collective goes on waiting until the process group's timeout, or
until the launcher loses patience: a rank that takes SIGTERM for a request to stop can't be asked twice.
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
# of the launcher's try, for its store outlives the processes that it restarts
_KEY = "megaprune/failure"

_watch: _Watch | None = None
_ends_together = False


def end_together() -> None:
    """Has this process end when another rank fails, from `watch` on: as commands do, and a library must not."""
    global _ends_together
    _ends_together = True


def watch() -> None:
    """Begins to look for other ranks' failures, where a launcher started several processes; once."""
    global _watch
    if _ends_together and _watch is None and world_size() > 1 and "MASTER_PORT" in os.environ:
        _watch = _Watch()
        atexit.register(stop)


def stop() -> None:
    """Looks no more. To be called before this process leaves the others."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def claim(status: int, line: str) -> bool | None:
    """Announces this rank's failure, which ends the others.

    Args:
        status: that they exit with.
        line: what is said of it on other nodes, whose logs may be kept apart.

    Returns:
        Whether this rank is the first to fail, and has to say why; None where nobody could be told.
    """
    return None if _watch is None else _watch.claim(status, line)


class _Watch:
    def __init__(self) -> None:
        from torch.distributed import TCPStore  # here: who runs alone need not wait for torch

        self._key = f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # A connection of its own: the process group's waits in it.
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
        # The launcher ends all processes by SIGTERM when one is gone: not this one while it says why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stop()
        try:
            if self._store.add(f"{self._key}/count", 1) > 1:
                return False
            self._store.set(self._key, json.dumps({"status": status, "line": line, "node": _node()}))
        except Exception:  # the store is gone with the rank that kept it, which has failed first
            return None
        return True

    def _look(self) -> None:
        while not self._stopped.wait(_INTERVAL_SECONDS):
            try:
                if not self._store.check([self._key]):
                    continue
                failure = json.loads(self._store.get(self._key))
            except Exception:  # the store is gone: with its rank, or because the run is over
                return
            if not self._stopped.is_set():
                _end(failure)


def _end(failure: dict) -> None:
    if failure["node"] != _node() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(failure["line"], file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(failure["status"])  # the main thread may wait in a collective for ever


def _node() -> str:
    return os.environ.get("GROUP_RANK", "0")
