"""Maps that stand in for removed layers, fitted by least squares on calibration text (ReplaceMe, arXiv 2505.02819).

A contiguous cut removes the layers behind layer a. With M the output of a's MLP, X = Y + M the output of a, and L the
output of the last layer that is removed, T minimizes the weighted sum over tokens of |Y + M T - L|^2 plus
ridge * |T - 1|^2. With T = 1 + C this is ridge regression of L - X on M. T can be folded into the weights of a's MLP,
so that the model keeps its shape.

Not in the paper (ours): each token is weighted by 1 / |L|, so that a few tokens with very large hidden states, whose
magnitude the norms behind the cut remove, do not decide everything. The ridge is the best of a grid on held-out
windows; if none of them helps there, the map is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaprune import device
from megaprune.importance.measures import own_share
from megaprune.mcore import fold, parallel, schedule
from megaprune.mcore.pipeline_model import PipelineModel

# relative to the mean of the diagonal of M^T M
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens, in fp64: M^T M and M^T (L - X), [h, h] each, and of |L - X|^2, [1]."""

    gram: Tensor
    cross: Tensor
    rest: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram + other.gram, self.cross + other.cross, self.rest + other.rest)

    def error(self, change: Tensor) -> float:
        """Return the sum of |M C - (L - X)|^2 for C = `change`."""
        return float((change * (self.gram @ change)).sum() - 2 * (change * self.cross).sum() + self.rest)


class Unfinished(Protocol):
    """This rank's sums of a pass that may be interrupted between its steps."""

    def load(self) -> tuple[int, list[Tensor]] | None:
        """Return the finished steps of an interrupted pass and its sums; None to begin. Collective."""

    def save_if_asked(self, steps: int, sums: Sequence[Tensor]) -> None:
        """Save the sums after a number of steps, and stop, if the run was asked to stop. Collective."""


def moments(
    model: PipelineModel,
    batches: Sequence[schedule.MicroBatch],
    before: int,
    last: int,
    hidden_size: int,
    unfinished: Unfinished | None = None,
) -> Moments:
    """Return the moments for a cut, on the CPU. Collective; the result has the same bits on every rank.

    Tokens without loss are not counted.

    Args:
        batches: this replica's share of the windows.
        before: the layer before the cut; last: the last layer of the cut.
        unfinished: storage for a pass that is interrupted.
    """
    sums = [torch.zeros(shape, dtype=torch.float64, device=device.torch_device()) for shape in _shapes(hidden_size)]
    done, saved = (unfinished.load() if unfinished else None) or (0, [])
    for total, part in zip(sums, saved, strict=False):
        total.copy_(part)
    # A stage's activations are sent to others only between the passes of the pipeline, so few batches run at a time.
    size = model.config.pipeline_model_parallel_size
    for step in range(done, -(-len(batches) // size)):
        _add(sums, model, batches[step * size : (step + 1) * size], before, last)
        if unfinished is not None:
            unfinished.save_if_asked(step + 1, sums)
    return Moments(*(parallel.sum_over_all(total) for total in sums))


def fitted(fit: Moments, held_out: Moments) -> tuple[Tensor, float]:
    """Return C = T - 1 in fp32, [h, h], and the share of the held-out error that it leaves: 1, with C = 0, if no ridge
    of the grid lowers the error.

    The ridge is chosen on the held-out sums; C is then fitted to all sums.
    """
    values, vectors = torch.linalg.eigh(fit.gram)
    turned, mean = vectors.t() @ fit.cross, fit.gram.diagonal().mean()
    error = {ridge: held_out.error(vectors @ (turned / (values + ridge * mean)[:, None])) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: error[ridge])
    if not error[best] < float(held_out.rest):
        return torch.zeros_like(fit.gram).float(), 1.0
    total = fit + held_out
    ridge = best * total.gram.diagonal().mean()
    change = torch.linalg.solve(total.gram + ridge * torch.eye(len(total.gram), dtype=torch.float64), total.cross)
    return change.float(), error[best] / float(held_out.rest)


def _shapes(hidden_size: int) -> list[tuple[int, ...]]:
    return [(hidden_size, hidden_size), (hidden_size, hidden_size), (1,)]


def _add(
    sums: list[Tensor], model: PipelineModel, batches: Sequence[schedule.MicroBatch], before: int, last: int
) -> None:
    """Add the sums over some micro-batches, on the pipeline stage of the layer before the cut."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    weights: list[Tensor] = []

    def keep(layer: int, _: Tensor, leaving: Tensor) -> None:
        if layer == before:
            entered.append(leaving.detach().clone())  # the schedule frees what it has sent
        if layer == last:
            left.append(leaving.detach().clone())

    def note(tokens: schedule.LossTokens) -> None:
        weights.append(own_share(tokens.loss_mask, model))

    with model.watched_layers(keep), fold.watched_mlp(model, before) as outputs:
        schedule.forward(model, batches, lambda logits, tokens: None, note)
    shapes = [(*weight.shape, model.config.hidden_size) for weight in weights]
    left = fold.sent_to_all_stages(left, fold.holds(model, last), shapes, model.config.params_dtype)
    for entering, target, output, weight in zip(entered, left, outputs, weights, strict=False):
        _add_tokens(sums, output, entering, target, weight)


def _add_tokens(sums: list[Tensor], output: Tensor, entering: Tensor, target: Tensor, weight: Tensor) -> None:
    """Add the tokens of a micro-batch: M, X and L are [s, b, h], `weight` is [s, b]; or with s / tp."""
    m, target = output.float().flatten(0, 1), target.float().flatten(0, 1)
    rest = target - entering.float().flatten(0, 1)
    scale = (weight.flatten() / target.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(
        -1
    )
    weighted = (m * scale).t()
    for total, part in zip(sums, (weighted @ m, weighted @ rest, (scale * rest.square()).sum(0).sum()), strict=True):
        total += part
