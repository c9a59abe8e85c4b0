"""Progress of a run: the part of a checkpoint besides weights and optimizer."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Plain data and small tensors; the same on every rank.

    Args:
        iteration: finished training iterations. With the seed, it determines the position in the data.
        global_batch_size: windows per iteration. With the iteration, it determines the position in the data.
        kept_layers: the selected layers, once they are known.
        pruned: whether the checkpoint holds the pruned model (otherwise the whole model during the search).
        scores: the layers' scores, higher = keep, if the method has any.
        candidates: the candidates that the selection compared, if any.
        contenders: the kept layers of the candidates of which one is still to be chosen by training.
        other_iterations: training iterations that went to contenders which were not chosen.
        stitched: whether the weights contain the maps of `--stitch`.
        selector: the state of the selector of a search.
        stages: seconds and tokens of each stage so far.
        valid: the validation losses for the report so far.
    """

    iteration: int = 0
    global_batch_size: int | None = None
    kept_layers: list[int] | None = None
    pruned: bool = False
    scores: list[float] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    contenders: list[list[int]] = field(default_factory=list)
    other_iterations: int = 0
    stitched: bool = False
    selector: dict[str, Any] | None = None
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    valid: dict[str, dict[str, float]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self)

    def candidate(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the candidate with these layers; of several methods' equal ones, the first."""
        return next(candidate for candidate in self.candidates if candidate.get("kept_layers") == kept)

    def choose(self, kept: Sequence[int]) -> None:
        """Mark the candidate with these layers as the only one that is chosen."""
        for candidate in self.candidates:
            candidate["chosen"] = False
        self.candidate(kept)["chosen"] = True

    def spend(self, stage: str, seconds: float, tokens: int = 0) -> None:
        """Add time and tokens to a stage."""
        entry = self.stages.setdefault(stage, {"seconds": 0.0, "tokens": 0})
        entry["seconds"] += seconds
        entry["tokens"] += tokens

    @contextmanager
    def timed(self, stage: str, tokens: int = 0) -> Iterator[None]:
        """Add the duration of a block to a stage."""
        start = time.perf_counter()
        yield
        self.spend(stage, time.perf_counter() - start, tokens)
