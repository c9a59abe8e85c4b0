"""How far a run has come: what a checkpoint says beside weights and optimizer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Plain data and small tensors; the same on every rank.

    Args:
        iteration: training iterations done; with the seed it is the position in the data.
        global_batch_size: windows of an iteration, which with the iteration are the position in the data.
        kept_layers: what the selection chose, once it has.
        pruned: the checkpoint holds the pruned model (otherwise the whole one, under search).
        scores: the layers' scores, higher = keep, where the method has any.
        candidates: what the selection chose among, where it did.
        stitch: the scale of LinearPatch, where there is one.
        selector: the searching selector's state.
        stages: seconds and tokens of each stage so far.
        valid: the report's validation losses so far.
    """

    iteration: int = 0
    global_batch_size: int | None = None
    kept_layers: list[int] | None = None
    pruned: bool = False
    scores: list[float] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    stitch: list[float] | None = None
    selector: dict[str, Any] | None = None
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    valid: dict[str, dict[str, float]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def spend(self, stage: str, seconds: float, tokens: int = 0) -> None:
        """Books time and tokens on a stage."""
        entry = self.stages.setdefault(stage, {"seconds": 0.0, "tokens": 0})
        entry["seconds"] += seconds
        entry["tokens"] += tokens

    @contextmanager
    def timed(self, stage: str, tokens: int = 0) -> Iterator[None]:
        """Books a block's time on a stage."""
        start = time.perf_counter()
        yield
        self.spend(stage, time.perf_counter() - start, tokens)
