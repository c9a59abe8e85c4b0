"""SIGTERM, handled as a request to save and stop at the end of the iteration."""

import signal
from types import FrameType


class StopRequest:
    """Callable that returns whether this process was asked to stop.

    The first call installs the handler. Before it there is nothing to save, and SIGTERM terminates the process as
    usual.
    """

    def __init__(self) -> None:
        self._received = self._listens = False

    def __call__(self) -> bool:
        if not self._listens:
            signal.signal(signal.SIGTERM, self._receive)
            self._listens = True
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
