"""Choice among masks that are nearly equal by KL: the one of the lowest loss with its stitch goes on.

A stitch replaces each cut by a map, and a long cut is replaced nearly as well as a short one. What heals best is
therefore often the mask with fewer cuts (docs/results.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megaprune.importance.evaluator import LayerEvaluator
from megaprune.mcore.fold import folded
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.context import RunContext
from megaprune.pruning.stitch import Cut, fit_cut, read_numbered
from megaprune.selection.segments import cuts
from megaprune.utils.progress import say

# Candidates whose KL is higher than the best by more than this factor are left out, and so are those behind the first.
CLOSE = 1.1
MOST = 3


def choose_stitched(run: RunContext, model: PipelineModel, evaluator: Callable[[], LayerEvaluator]) -> frozenset[Cut]:
    """Measure the loss of the best candidates with their stitch, and let the run go on with the lowest. Collective.

    Args:
        model: the original model, whose weights are the same afterwards.
        evaluator: returns a new evaluator on the windows of the comparison.

    Returns:
        The cuts whose maps were fitted.

    Raises:
        RunStopped: the run was asked to stop.
    """
    progress, close = run.progress, _close(run.progress.candidates)
    if len(close) < 2:
        return frozenset()
    compared: set[Cut] = set()
    losses = []
    for kept in close:
        maps: dict[int, Tensor] = {}
        for cut in cuts(kept, run.options.model.arch.num_layers):
            if cut[0] > 0:
                path, _ = fit_cut(run, model, cut, "importance", counted=cut not in compared)
                compared.add(cut)
                maps |= read_numbered(path)
        measuring = evaluator()

        def measure() -> list[float]:
            with folded(model, maps):  # noqa: B023
                return measuring.losses([kept], "ce")  # noqa: B023

        with progress.timed("importance", measuring.tokens_of(len(kept))):
            key = f"stitched {','.join(map(str, kept))}"
            [loss] = run.records.once(key, measure, "while it compares stitched layers")
        losses.append(loss)
    for candidate in progress.candidates:
        if candidate.get("kept_layers") in close:
            candidate["stitched_loss"] = losses[close.index(candidate["kept_layers"])]
    progress.kept_layers = close[losses.index(min(losses))]
    progress.choose(progress.kept_layers)
    say(f"stitched: {', '.join(f'{loss:.4f}' for loss in losses)} for the best {len(close)} masks by KL")
    return frozenset(compared)


def _close(candidates: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the kept layers of the candidates to compare, the best by KL first."""
    measured = [candidate for candidate in candidates if candidate.keys() >= {"kl", "kept_layers", "chosen"}]
    ranked = sorted(measured, key=lambda candidate: (candidate["kl"], not candidate["chosen"]))
    found: list[list[int]] = []
    for candidate in ranked:
        if candidate["kl"] <= CLOSE * ranked[0]["kl"] and candidate["kept_layers"] not in found:
            found.append(candidate["kept_layers"])
    return found[:MOST]
