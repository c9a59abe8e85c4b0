"""Quadratic model of the loss without a set of layers, fitted to sets that were measured.

Plain floats and a fixed order of summation: every rank gets the same bits, whatever its processor and its libraries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

# Losses below this are as good as none; their logarithms would dominate the fit.
_FLOOR = 1e-6
# Prior variances of the intercept and of the weight of the scores, against 1 for the linear terms together.
_WIDE = 10.0
# The prior variance of all pairs together, of all pairs of neighbors, and of the noise; the evidence decides.
_PAIRS = (0.03, 0.3, 1.0)
_NEIGHBORS = (0.0, 0.3)
_NOISE = (0.003, 0.03, 0.3)
# The measured sets that enter a fit, the best ones first: its time grows with the third power of their number.
_MOST_SETS = 160


@dataclass(frozen=True)
class Quadratic:
    """Energy of a set of removed layers: `sum(linear[i]) + sum(pairs[i][j])` over its layers and its pairs i < j.

    `pairs` is symmetric with a diagonal of zeros. The energy increases with the predicted loss; `transform` says how.
    """

    linear: list[float]
    pairs: list[list[float]]
    transform: str = "none"

    def energy(self, removed: Sequence[int]) -> float:
        """Return the energy of a set of removed layers."""
        alone = sum(self.linear[i] for i in removed)
        return alone + sum(self.pairs[i][j] for place, i in enumerate(removed) for j in removed[:place])


@dataclass(frozen=True)
class _Transform:
    """Function of the loss that a quadratic model may fit, and the logarithm of its derivative."""

    name: str
    value: Callable[[float], float]
    log_slope: Callable[[float], float]


_TRANSFORMS = (
    _Transform("none", lambda x: x, lambda x: 0.0),
    _Transform("sqrt", math.sqrt, lambda x: -0.5 * math.log(x) - math.log(2)),
    _Transform("log", math.log, lambda x: -math.log(x)),
)


def fit(measured: Mapping[tuple[int, ...], float], guides: Sequence[Quadratic]) -> Quadratic:
    """Return the quadratic model with the highest posterior density, given measured losses of sets of removed layers.

    The prior expects a weighted sum of the guides' energies with unknown weights, plus independent linear terms and
    pairs of unknown size. Variances, and whether the loss itself, its square root or its logarithm is quadratic, are
    those with the highest evidence. Losses that are not finite are left out.

    Args:
        measured: at least one finite loss.
        guides: at least one rough model of the loss, such as the sum of the losses without each layer.
    """
    finite = sorted((loss, gone) for gone, loss in measured.items() if math.isfinite(loss))[:_MOST_SETS]
    sets, losses = [gone for _, gone in finite], [max(_FLOOR, loss) for loss, _ in finite]
    kernel = _Kernel(sets, guides)
    targets = [(transform, *_standardized(transform, losses)) for transform in _TRANSFORMS]
    best: tuple[float, str, list[float], tuple[float, float]] | None = None
    for pairs, neighbors, noise in product(_PAIRS, _NEIGHBORS, _NOISE):
        factor = _cholesky(kernel.matrix(pairs, neighbors, noise))
        for transform, target, log_slope in targets:
            dual = _solve(factor, target)
            misfit = sum(a * b for a, b in zip(dual, target, strict=True))
            # the scale of the variances is integrated out
            log_size = sum(math.log(row[-1]) for row in factor)
            evidence = log_slope - log_size - 0.5 * len(sets) * math.log(max(misfit, 1e-300))
            if best is None or evidence > best[0]:
                best = evidence, transform.name, dual, (pairs, neighbors)
    assert best is not None  # the grid is not empty
    _, name, dual, variances = best
    return kernel.model(dual, *variances, transform=name)


class _Kernel:
    """Covariances of the losses of sets under the prior."""

    def __init__(self, sets: Sequence[tuple[int, ...]], guides: Sequence[Quadratic]) -> None:
        self._sets, self._guides = sets, guides
        self._bits = [sum(1 << layer for layer in gone) for gone in sets]
        self._size = max(1.0, sum(map(len, sets)) / len(sets))
        self._pairs_of_a_set = max(1.0, self._size * (self._size - 1) / 2)
        self._spreads, self._expected = [], [[1.0] * len(sets)]
        for guide in guides:
            values = [guide.energy(gone) for gone in sets]
            mean = sum(values) / len(sets)
            self._spreads.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(sets)) or 1.0)
            self._expected.append([(value - mean) / self._spreads[-1] for value in values])

    def matrix(self, pairs: float, neighbors: float, noise: float) -> list[list[float]]:
        """Return the lower triangle of the covariances."""
        of_common = [
            common / self._size + pairs * common * (common - 1) / 2 / self._pairs_of_a_set
            for common in range(max(map(len, self._sets)) + 1)
        ]
        expected = list(zip(*self._expected, strict=True))
        rows = []
        for i, (bits, features) in enumerate(zip(self._bits, expected, strict=True)):
            row = []
            for other, its_features in zip(self._bits[: i + 1], expected, strict=False):
                common = bits & other
                entry = _WIDE * sum(map(_times, features, its_features)) + of_common[common.bit_count()]
                row.append(entry + neighbors * (common & common >> 1).bit_count() / self._size)
            row[-1] += noise
            rows.append(row)
        return rows

    def model(self, dual: Sequence[float], pairs: float, neighbors: float, transform: str) -> Quadratic:
        """Return the model that the solution of the dual problem stands for."""
        size = range(len(self._guides[0].linear))
        linear, matrix = [0.0 for _ in size], [[0.0 for _ in size] for _ in size]
        for guide, spread, expected in zip(self._guides, self._spreads, self._expected[1:], strict=True):
            weight = _WIDE * sum(map(_times, dual, expected)) / spread
            for i in size:
                linear[i] += weight * guide.linear[i]
                for j in size:
                    matrix[i][j] += weight * guide.pairs[i][j]
        for a, gone in zip(dual, self._sets, strict=True):
            for place, i in enumerate(gone):
                linear[i] += a / self._size
                for j in gone[:place]:
                    term = pairs * a / self._pairs_of_a_set
                    if abs(i - j) == 1:
                        term += neighbors * a / self._size
                    matrix[i][j] += term
                    matrix[j][i] += term
        return Quadratic(linear, matrix, transform)


def _standardized(transform: _Transform, losses: Sequence[float]) -> tuple[list[float], float]:
    """Return the transformed losses with mean 0 and variance 1, and the logarithm of the density's change."""
    values = [transform.value(loss) for loss in losses]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) or 1.0
    log_slope = sum(transform.log_slope(loss) for loss in losses) - len(losses) * math.log(spread)
    return [(value - mean) / spread for value in values], log_slope


def _cholesky(matrix: list[list[float]]) -> list[list[float]]:
    """Return the lower triangular factor of a positive definite matrix, given as its lower triangle."""
    factor: list[list[float]] = []
    for entries in matrix:
        row: list[float] = []
        for column, entry in enumerate(entries[:-1]):
            before = factor[column]
            row.append((entry - sum(map(_times, row, before))) / before[-1])
        rest = entries[-1] - sum(map(_times, row, row))
        row.append(math.sqrt(max(rest, 1e-12)))
        factor.append(row)
    return factor


def _solve(factor: list[list[float]], target: Sequence[float]) -> list[float]:
    """Return the solution x of L Lᵀ x = target."""
    found: list[float] = []
    for row, value in zip(factor, target, strict=True):
        found.append((value - sum(map(_times, row, found))) / row[-1])
    for i in range(len(found) - 1, -1, -1):
        found[i] /= factor[i][-1]
        for j in range(i):
            found[j] -= factor[i][j] * found[i]
    return found


def _times(a: float, b: float) -> float:
    return a * b
