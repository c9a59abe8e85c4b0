"""SIGTERM, taken as a request to save and stop at the end of the iteration."""

import signal
from types import FrameType

from megaprune.mcore import parallel


class StopRequest:
    """Remembers whether this process was asked to stop. With ``enabled=False`` SIGTERM keeps its meaning."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._received = False
        if enabled:
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether any rank was asked; the same answer on every rank. Collective where enabled."""
        return self._enabled and parallel.any_rank(self._received)
