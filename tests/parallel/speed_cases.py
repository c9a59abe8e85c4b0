"""A run of which one rank is slow."""

import time
from unittest.mock import patch

from torch import Tensor

from megaprune.mcore import parallel
from megaprune.mcore.step_times import StepTimes
from tests.helpers import tiny

SECONDS = 1.0
_forward_ends = StepTimes.forward_ends


def slow_rank(argv: list[str], rank: int) -> None:
    """Complete a run in which every forward pass of a rank takes longer."""

    def slowly(self: StepTimes, output: Tensor) -> None:
        if parallel.rank() == rank:
            time.sleep(SECONDS)
        _forward_ends(self, output)

    with patch.object(StepTimes, "forward_ends", slowly):
        tiny.run_here(argv)
