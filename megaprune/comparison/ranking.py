"""The rank of a mask among all masks of its size by KL without recovery; on small models all can be measured."""

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megaprune.config.schema import Config
from megaprune.importance.measures import mask_losses
from megaprune.mcore import parallel
from megaprune.pruning.data import prepare_data, run_tokenizer
from megaprune.pruning.models import Models
from megaprune.pruning.options import SelectionOptions
from megaprune.pruning.resolve import open_run
from megaprune.pruning.runner import cache_dir
from megaprune.selection.masks import masks_of
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json

# with more masks, ranking takes longer than the runs that it ranks
MOST_MASKS = 20_000
_MASKS_AT_ONCE = 64


class Ranking:
    """The KL of every mask of one size, in nats per token."""

    def __init__(self, kl_of: dict[tuple[int, ...], float]) -> None:
        self.kl_of = kl_of
        self._sorted = sorted(kl_of.values())

    def percentile(self, kept_layers: Sequence[int]) -> float:
        """Return the share of masks that are better, in percent; NaN for a mask that was not measured."""
        kl = self.kl_of.get(tuple(kept_layers), math.nan)
        return math.nan if math.isnan(kl) else 100 * bisect.bisect_left(self._sorted, kl) / len(self._sorted)


def all_masks(selection: SelectionOptions) -> list[tuple[int, ...]]:
    """Return every set of layers that a run could have kept.

    Raises:
        UsageError: there are too many, or the budget counts parameters.
    """
    budget, protected = selection.budget, selection.protected
    free = [layer for layer in range(budget.num_layers) if layer not in protected]
    chosen = budget.limit - len(protected)
    if not budget.counts_layers:
        raise UsageError("rank_windows: masks are ranked by number of layers, not of parameters or bytes")
    if math.comb(len(free), chosen) > MOST_MASKS:
        raise UsageError(
            f"rank_windows: {math.comb(len(free), chosen):,} masks are too many to measure (at most {MOST_MASKS:,})"
        )
    return [tuple(sorted({*protected, *some})) for some in itertools.combinations(free, chosen)]


def rank_all_masks(config: Config, num_windows: int, path: Path) -> Ranking:
    """Measure every mask on the first validation windows, or read the result of an earlier call. Collective."""
    if not parallel.on_rank0_for_all(path.is_file):
        options, source = open_run(config, parallel.world_size())
        with parallel.session(options.sizes, options.timeout_minutes):
            masks, models = all_masks(options.selection), Models(options, source)
            tokenizer = run_tokenizer(options, source)
            data = prepare_data(options, source, tokenizer, cache_dir(options))
            batches = data.valid_batches(num_windows)
            model, kl = models.original(), list[float]()
            for some in masks_of(masks, options.model.arch.num_layers).split(_MASKS_AT_ONCE):
                kl += mask_losses(model, models.gate, batches, some, models.shard, "kl").tolist()
            if parallel.rank() == 0:
                write_json(path, {" ".join(map(str, kept)): value for kept, value in zip(masks, kl, strict=True)})
    read = parallel.on_rank0_for_all(lambda: json.loads(path.read_text()))
    return Ranking({tuple(map(int, kept.split())): value for kept, value in read.items()})
