"""Where a mask stands among all masks of its size, by KL without recovery: small models let one measure them all."""

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megaprune.config.schema import Config
from megaprune.importance.measures import mask_losses
from megaprune.mcore import parallel
from megaprune.pruning.models import Models
from megaprune.pruning.prepare import Setup, load_tokenizer, prepare, prepare_data
from megaprune.selection.masks import masks_of
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json

# beyond this many masks, ranking takes longer than the runs that it is to rank
MOST_MASKS = 20_000
_MASKS_AT_ONCE = 64


class Ranking:
    """The KL of every mask of one size, in nats per token."""

    def __init__(self, kl_of: dict[tuple[int, ...], float]) -> None:
        self.kl_of = kl_of
        self._sorted = sorted(kl_of.values())

    def percentile(self, kept_layers: Sequence[int]) -> float:
        """The share of masks that are better, in percent; NaN for one that was not among them."""
        kl = self.kl_of.get(tuple(kept_layers), math.nan)
        return math.nan if math.isnan(kl) else 100 * bisect.bisect_left(self._sorted, kl) / len(self._sorted)


def all_masks(setup: Setup) -> list[tuple[int, ...]]:
    """Every set of layers that a run could have kept.

    Raises:
        UsageError: they are too many, or layers are not what is counted.
    """
    budget, free = setup.budget, [i for i in range(setup.arch.num_layers) if i not in setup.protected]
    chosen = budget.limit - len(setup.protected)
    if not budget.counts_layers:
        raise UsageError("rank_windows: masks are ranked by number of layers, not with target_params")
    if math.comb(len(free), chosen) > MOST_MASKS:
        raise UsageError(
            f"rank_windows: {math.comb(len(free), chosen):,} masks are too many to measure, the most is {MOST_MASKS:,}"
        )
    return [tuple(sorted({*setup.protected, *some})) for some in itertools.combinations(free, chosen)]


def rank_all_masks(config: Config, num_windows: int, path: Path) -> Ranking:
    """Measures every mask on the first validation windows, or reads what was measured before. Collective."""
    if not path.is_file():
        setup = prepare(config)
        parallel.initialize(setup.sizes)
        masks, models = all_masks(setup), Models(setup)
        data = prepare_data(setup, load_tokenizer(setup))
        batches = data.valid_batches(num_windows)
        model, kl = models.original(), list[float]()
        for some in masks_of(masks, setup.arch.num_layers).split(_MASKS_AT_ONCE):
            kl += mask_losses(model, models.gate, batches, some, models.shard, "kl").tolist()
        if parallel.rank() == 0:
            write_json(path, {" ".join(map(str, kept)): value for kept, value in zip(masks, kl, strict=True)})
        parallel.finish()
    read = json.loads(path.read_text())
    return Ranking({tuple(map(int, kept.split())): value for kept, value in read.items()})
