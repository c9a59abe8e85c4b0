"""Times of the parts of a training step on this rank, measured without making the host wait."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaprune import device


class StepTimes:
    """Stopwatches of a step.

    Attributes:
        compute: the student's forward and backward passes. Collectives within layers count, since they run with them;
            waiting for other pipeline stages, the reduction of gradients and the optimizer do not.
        teacher: the teacher's pass, with its waiting for other stages.
    """

    def __init__(self) -> None:
        self.compute, self.teacher = device.Stopwatch(), device.Stopwatch()

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Count a block as the teacher's."""
        self.teacher.start()
        yield
        self.teacher.stop()

    def forward_begins(self) -> None:
        """Count from here to `forward_ends`."""
        self.compute.start()

    def forward_ends(self, output: Tensor) -> None:
        """Count to here, and later from the gradient of the output to the end of its backward pass."""
        self.compute.stop()
        if output.requires_grad:
            output.register_hook(self._backward_begins)

    def _backward_begins(self, _: Tensor) -> None:
        self.compute.start()
        # runs when this pass through the graph ends
        torch.autograd.Variable._execution_engine.queue_callback(self.compute.stop)
