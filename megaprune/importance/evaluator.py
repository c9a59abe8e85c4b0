"""Losses and scores of the original model's layers on calibration data, and their cost in tokens."""

import bisect
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import lru_cache

import torch

from megaprune.data.batches import Batch
from megaprune.distillation.losses import VocabShard, cross_entropy
from megaprune.importance.measures import influence_of, influence_sums, mask_gradient, mask_sums
from megaprune.importance.records import Records
from megaprune.mcore.gradients import taylor_importance
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.schedule import MicroBatch
from megaprune.selection.budget import Budget
from megaprune.selection.evaluator import LossKind
from megaprune.selection.masks import masks_of, sets_without_each, shared_cost, shared_order
from megaprune.utils.errors import MegapruneError

# A backward pass counts as two forward passes.
_PASSES_OF_A_GRADIENT = 4  # the original model's pass, the masked model's pass, and its backward pass
# windows in each step of a search by gradient
WINDOWS_OF_A_STEP = 4
_WHERE = "while it measures layers"


class LayerEvaluator:
    """Evaluator of layers, as methods receive it (see `megaprune.selection.evaluator.Evaluator`). Collective.

    `tokens` counts the cost in tokens that run forward through all layers. Layers whose outputs are shared with the
    previous pass, and layers that are left out, cost nothing. The cost does not depend on what an interrupted run has
    measured already.

    Args:
        windows: returns this replica's share of a number of calibration windows after a number of skipped ones; the
            windows are the same at every layout.
        num_windows: the number of calibration windows.
        records: measurements that are known, and that are made.
        first_window: position of the first window among all calibration windows.
    """

    def __init__(
        self,
        model: PipelineModel,
        gate: LayerGate,
        windows: Callable[[int, int], Sequence[Batch]],
        num_windows: int,
        budget: Budget,
        shard: VocabShard,
        records: Records | None = None,
        first_window: int = 0,
    ) -> None:
        self.tokens = 0
        self._records, self._first_window = Records() if records is None else records, first_window
        self._model, self._gate, self._shard, self._budget = model, gate, shard, budget
        self._windows = lru_cache(maxsize=4)(windows)
        self._num_windows = num_windows
        self._known: dict[tuple[LossKind, float], dict[tuple[int, ...], float]] = {}

    def losses(self, kept_sets: Sequence[Sequence[int]], loss: LossKind = "kl", share: float = 1.0) -> list[float]:
        """Return the loss of the model with each set of kept layers, in nats per token, on a share of the windows.
        Losses that were computed before are reused.
        """
        known = self._known.setdefault((loss, share), {})
        new = self._new(kept_sets, known)
        if new:
            masks = self._masks(new)
            new = [new[i] for i in shared_order(masks)]
            found = self._measured(new, loss, share)
            if not found.isfinite().any():
                raise MegapruneError("no loss on the calibration windows is finite: check the model and --train-data")
            known.update(zip(new, found.nan_to_num(nan=float("inf")).tolist(), strict=True))
            self._book(shared_cost(masks, loss), share)
        return [known[tuple(kept)] for kept in kept_sets]

    def affordable(self, kept_sets: Sequence[Sequence[int]], tokens: int) -> int:
        """Return how many of these sets, counted from the first, can be evaluated by KL within a number of tokens."""
        known = self._known.get(("kl", 1.0), {})

        def passes(count: int) -> float:
            new = self._new(kept_sets[:count], known)
            return shared_cost(self._masks(new), "kl") if new else 0.0

        most = tokens / self._tokens_of_a_pass(1.0)
        # the cost never falls as sets are added, so bisection finds the number
        return max(0, bisect.bisect_right(range(len(kept_sets) + 1), most, key=passes) - 1)

    def without_each(self, protected: Set[int], loss: LossKind = "kl") -> torch.Tensor:
        """Return the loss without each layer, [num_layers]; infinite for protected layers, which are not measured."""
        free = [layer for layer in range(self._budget.num_layers) if layer not in protected]
        found = torch.full((self._budget.num_layers,), float("inf"))
        if free:
            found[free] = torch.tensor(self.losses(sets_without_each(self._budget, protected), loss))
        return found

    def mask_gradient(self, mask: torch.Tensor, step: int) -> torch.Tensor:
        """Return the gradient of the KL with respect to a mask, [num_layers], on a few windows that change at each
        step.
        """
        count = min(WINDOWS_OF_A_STEP, self._num_windows)
        skip = step * count % max(1, self._num_windows - count + 1)
        self.tokens += self.tokens_of_a_gradient()

        def measure() -> list[float]:
            batches = self._windows(count, skip)
            return mask_gradient(self._model, self._gate, batches, mask, self._shard)[1].tolist()

        digest = hashlib.sha256(mask.float().numpy().tobytes()).hexdigest()[:32]
        return torch.tensor(self._records.once(f"gradient {self._named(count, skip)} {digest}", measure, _WHERE))

    def tokens_of_a_gradient(self) -> int:
        """Return the cost of `mask_gradient`, in tokens."""
        share = min(WINDOWS_OF_A_STEP, self._num_windows) / self._num_windows
        return round(_PASSES_OF_A_GRADIENT * self._tokens_of_a_pass(share))

    def block_influence(self) -> torch.Tensor:
        """Return ShortGPT's score of each layer, [num_layers], divided by the layer's cost."""
        layers = self._budget.num_layers
        sums = self._records.summed(
            [f"influence {self._named(self._num_windows)}"],
            self._taken(1.0),
            lambda batches, _: influence_sums(self._model, batches, layers).reshape(1, -1),
            _WHERE,
            self._batches_per_part,
        )
        self._book(1.0, 1.0)
        return influence_of(sums.view(2, layers)) / torch.tensor(self._budget.costs)

    def tokens_of(self, layers: int) -> int:
        """Return the cost of running a number of layers on all windows, in tokens."""
        return math.ceil(layers / self._budget.num_layers * self._tokens_of_a_pass(1.0))

    def taylor_importance(self) -> torch.Tensor:
        """Return the first-order change of the loss without each layer, [num_layers], divided by the layer's cost."""

        def measure() -> list[float]:
            return taylor_importance(
                self._model,
                self._taken(1.0),
                lambda tokens: tokens.loss_mask,
                lambda logits, tokens: cross_entropy(logits, tokens.labels, self._shard),
                self._budget.num_layers,
            ).tolist()

        found = torch.tensor(self._records.once(f"taylor {self._named(self._num_windows)}", measure, _WHERE))
        self._book(_PASSES_OF_A_GRADIENT - 1, 1.0)
        return found / torch.tensor(self._budget.costs)

    @contextmanager
    def counting(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the tokens spent since the block began."""
        before = self.tokens
        yield lambda: self.tokens - before

    def _measured(self, kept_sets: Sequence[tuple[int, ...]], loss: LossKind, share: float) -> torch.Tensor:
        """Return the losses of sets of kept layers, [number of sets]."""

        def measure(batches: Sequence[MicroBatch], chosen: Sequence[int]) -> torch.Tensor:
            masks = self._masks([kept_sets[i] for i in chosen])
            return mask_sums(self._model, self._gate, batches, masks, self._shard, loss)

        windows = self._named(self._count(share))
        keys = [f"{loss} {windows} {','.join(map(str, kept))}" for kept in kept_sets]
        sums = self._records.summed(keys, self._taken(share), measure, _WHERE, self._batches_per_part)
        return (sums[:, 0] / sums[:, 1]).float()

    def _named(self, count: int, skip: int = 0) -> str:
        """Return the name of some windows, in the keys of measurements."""
        first = self._first_window + skip
        return f"{first}:{first + count}"

    @property
    def _batches_per_part(self) -> int:
        """Micro-batches that run together; with pipeline stages, enough to keep all of them busy."""
        stages = self._model.config.pipeline_model_parallel_size
        return 1 if stages == 1 else 2 * stages

    def _new(self, kept_sets: Sequence[Sequence[int]], known: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
        return [kept for kept in dict.fromkeys(map(tuple, kept_sets)) if kept not in known]

    def _masks(self, kept_sets: Sequence[Sequence[int]]) -> torch.Tensor:
        return masks_of(kept_sets, self._budget.num_layers)

    def _taken(self, share: float) -> Sequence[Batch]:
        return self._windows(self._count(share), 0)

    def _count(self, share: float) -> int:
        return max(1, round(share * self._num_windows))

    def _tokens_of_a_pass(self, share: float) -> int:
        return self._count(share) * self._windows(self._count(share), 0)[0].tokens.shape[1]

    def _book(self, passes: float, share: float) -> None:
        self.tokens += math.ceil(passes * self._tokens_of_a_pass(share))
