"""Scores of a model's layers on calibration data, without a run folder."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

from megaprune.mcore import parallel
from megaprune.mcore.builder import in_half_precision
from megaprune.pruning.data import prepare_data, run_tokenizer
from megaprune.pruning.models import Models
from megaprune.pruning.options import RunOptions
from megaprune.pruning.select import Calibration
from megaprune.report.run_report import LayerScores
from megaprune.utils.errors import UsageError
from megaprune.weights.tensor_source import TensorSource


def score(options: RunOptions, source: TensorSource, chooses: bool) -> LayerScores:
    """Return the scores that a calibrated method gives the layers. Collective; the process group stays usable.

    Args:
        chooses: whether the kept layers are requested too; otherwise the scores must not depend on the budget.

    Raises:
        MegapruneError: the data can't be used.
        UsageError: the method does not score single layers, and no budget is given.
    """
    with parallel.session(options.sizes, options.timeout_minutes), _scratch(options) as cache:
        tokenizer = run_tokenizer(options, source)
        folder = parallel.on_rank0_for_all(lambda: str(cache))
        data, models = prepare_data(options, source, tokenizer, Path(folder)), Models(options, source)
        model = in_half_precision(models.original(), options.engine)
        choice, tokens = Calibration(options, data, models, model).choose()
        found = parallel.on_rank0_for_all(lambda: (choice.kept_layers, choice.scores, choice.candidates))
        parallel.barrier()
    kept, scores, candidates = found
    if not chooses and scores is None:
        raise UsageError(
            f"score_layers: method {options.selection.name} selects layers together and gives no scores of single "
            "layers: say how many to remove, such as num_layers_to_prune=2"
        )
    num_layers = options.model.arch.num_layers
    return LayerScores(
        method=options.selection.name,
        num_layers=num_layers,
        scores=None if scores is None else list(scores),
        kept_layers=kept if chooses else None,
        pruned_layers=sorted(set(range(num_layers)) - set(kept)) if chooses else None,
        candidates=candidates if chooses else [],
        tokens=tokens,
    )


def _scratch(options: RunOptions) -> tempfile.TemporaryDirectory | nullcontext:
    """Provide the folder of the tokenized data: the user's own, or a temporary one of rank 0."""
    if options.data.cache_dir is not None or parallel.rank() != 0:
        return nullcontext(options.data.cache_dir)
    return tempfile.TemporaryDirectory(prefix="megaprune-scores-")
