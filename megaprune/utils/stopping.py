"""Requests to stop at the next safe point: by a signal, or because the time given to the process is nearly over.

A stage asks at its safe points whether to stop. There everything that it has made is saved, so that the same command
goes on from it. Points inside a stage are asked only of a `StopRequest`; a function that a caller of the API gives is
asked after each iteration, as documented.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from megaprune.utils.errors import RunStopped
from megaprune.utils.progress import say

ShouldStop = Callable[[], bool]

# SIGUSR1 is what `#SBATCH --signal` and similar settings are used with: launchers don't react to it by killing.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GO_ON = "the same command continues from here"
# The store of the process group is asked at most this often about requests to other ranks.
_ASK_SECONDS = 0.5


class StopRequest:
    """Callable that returns whether this process was asked to stop, or has to, so that saving ends in time.

    The handlers are installed while a job obeys the request. Before that there is nothing to save, and afterwards
    everything is saved: a signal terminates the process as usual.

    Args:
        signals: whether SIGTERM and SIGUSR1 ask to stop.
        minutes: time from now after which the process should have ended. The request is made earlier: by the longest
            time between two safe points of the current stage, and by the time that the last checkpoint took.
    """

    def __init__(self, signals: bool = True, minutes: float | None = None) -> None:
        self._signals, self._minutes = signals, minutes
        self._began = self._last = time.monotonic()
        self._received: signal.Signals | None = None
        self._listens = False
        self._before: dict[signal.Signals, Any] = {}
        self._stage, self._longest, self._saving = "", 0.0, 0.0

    def __call__(self) -> bool:
        return self.is_due("iteration")

    def is_due(self, stage: str) -> bool:
        """Return whether to stop at this safe point.

        Args:
            stage: points with the same name follow each other at similar intervals.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last) if stage == self._stage else 0.0
        self._stage, self._last = stage, now
        return self._received is not None or self._time_is_up(now)

    def listen(self) -> None:
        """Install the handlers of the signals."""
        if self._signals and not self._listens:
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._listens = True

    def stop_listening(self) -> None:
        """Install the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before, self._listens = {}, False

    @property
    def was_received(self) -> bool:
        """Return whether a signal has arrived."""
        return self._received is not None

    @property
    def reason(self) -> str:
        """Return what asks to stop, for a message."""
        if self._received is not None:
            return self._received.name
        if self._minutes is not None and self._time_is_up(time.monotonic()):
            return f"--exit-duration-in-mins {self._minutes:g}"
        return "a request to another process"

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long the block takes that saves the state of the run."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()  # saving does not count as a step of the stage
        self._saving = max(self._saving, self._last - start)

    def _time_is_up(self, now: float) -> bool:
        if self._minutes is None:
            return False
        return now - self._began + self._longest + self._saving >= 60 * self._minutes

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)


@dataclass
class _State:
    """State of the job of this process.

    Args:
        saves: number of times that the job has saved something new.
        elsewhere: asks whether a rank that waits for this one was asked to stop.
    """

    request: StopRequest | None = None
    saves: int = 0
    elsewhere: Callable[[], bool] | None = None
    asked_at: float = field(default=0.0)


_job = _State()


@contextmanager
def obeying(should_stop: ShouldStop | None) -> Iterator[None]:
    """Let the safe points of a block obey a request. Blocks may be nested; the outer one counts what is saved."""
    global _job
    if _job.request is not None:
        yield
        return
    _job = _State(should_stop if isinstance(should_stop, StopRequest) else None)
    if _job.request is not None:
        _job.request.listen()
    try:
        yield
    finally:
        if _job.request is not None:
            _job.request.stop_listening()
        _job = _State()


def is_obeyed() -> bool:
    """Return whether safe points inside stages may stop; the same on every rank."""
    return _job.request is not None


def is_due(stage: str) -> bool:
    """Return whether this process is to stop at a safe point inside a stage."""
    return _job.request is not None and _job.request.is_due(stage)


def was_received() -> bool:
    """Return whether a signal asks this process to stop."""
    return _job.request is not None and _job.request.was_received


def saved() -> None:
    """Note that something new was saved: a job that is stopped now goes on from there."""
    _job.saves += 1


@contextmanager
def saving() -> Iterator[None]:
    """Measure the duration of a save, for `--exit-duration-in-mins`."""
    if _job.request is None:
        yield
        return
    with _job.request.saving():
        yield


@contextmanager
def asking_elsewhere(ask: Callable[[], bool]) -> Iterator[None]:
    """Let `stop_alone` ask about requests to ranks that wait for this one."""
    before, _job.elsewhere = _job.elsewhere, ask
    try:
        yield
    finally:
        _job.elsewhere = before


def stop_alone(stage: str, where: str) -> None:
    """Stop at a safe point of work that this rank does alone, while the others wait for its result.

    Raises:
        RunStopped: this rank or one that waits for it was asked to stop.
    """
    if is_due(stage) or _is_due_elsewhere():
        raise stopped(where)


def stopped(where: str, request: Any = None) -> RunStopped:
    """Return the exception that stops the job, and say so.

    Args:
        where: the point that the job has reached, such as "at iteration 3".
        request: what asked to stop, if not a `StopRequest` of the job.
    """
    made_by = _job.request or request
    reason = made_by.reason if isinstance(made_by, StopRequest) else "the caller"
    say(f"stopped by {reason} {where}: {_GO_ON}")
    return RunStopped(f"stopped by {reason} {where}", progressed=_job.saves > 0)


def _is_due_elsewhere() -> bool:
    now = time.monotonic()
    if _job.elsewhere is None or now - _job.asked_at < _ASK_SECONDS:
        return False
    _job.asked_at = now
    return _job.elsewhere()
