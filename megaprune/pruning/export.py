"""Results of a run: report, plots, and the HF folder, which is renamed into place last."""

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megaprune.mcore import parallel
from megaprune.mcore.adapters import export_adapter
from megaprune.mcore.hf_weights import export_weights
from megaprune.mcore.optimizer import Trainer
from megaprune.models.sizes import inventory
from megaprune.pruning.context import RunContext
from megaprune.report.front_matter import inherited
from megaprune.report.metrics import read_metrics
from megaprune.report.model_card import CARD_NAME, model_card
from megaprune.report.performance import with_performance
from megaprune.report.plots import write_plots
from megaprune.report.run_report import Report, build_report, result_table, write_report
from megaprune.utils.disk import one_line
from megaprune.utils.errors import MegapruneError, RunStopped
from megaprune.utils.files import aside_of, put_in_place
from megaprune.utils.progress import say
from megaprune.weights.surgery import write_pruned_config, write_share
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import WrittenShard, finish_shards

GO_ON = "run the same command to continue from the last checkpoint"


def export(run: RunContext, student: Trainer | None, command: str) -> None:
    """Write the pruned model, the report and the plots. Collective.

    Args:
        student: the trained model; None where nothing trained.
        command: how the run was started, for the model card.
    """
    run_dir = run.options.output.run_dir
    aside = aside_of(run_dir.hf)
    try:
        _emptied(aside)
        with run.progress.timed("export"):
            _export_weights(run, student, aside)
        parallel.on_rank0(lambda: _finish(run, aside, command))
    except (MegapruneError, RunStopped):
        if parallel.rank() == 0:  # an unfinished folder would block the next attempt
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(aside_of(run_dir.adapter), ignore_errors=True)
        raise


def _finish(run: RunContext, aside: Path, command: str) -> None:
    options, kept, run_dir = run.options, run.kept_layers, run.options.output.run_dir
    with one_line(aside, GO_ON):
        write_pruned_config(run.source, kept, aside, options.model.keep_mtp)
        records = read_metrics(run_dir.path)
        report = _report(run, records)
        write_report(run_dir.report, report)
        for path in write_plots(records, run_dir.plots, kept, report.valid):
            run.metrics.figure(path.stem, path)
        adapter = options.output.export_adapter
        card = model_card(
            report,
            source_name=options.model.name,
            command=command,
            source_card=inherited(run.source.folder),
            adapter=adapter,
        )
        (aside / CARD_NAME).write_text(card)
        run.metrics.close()
        put_in_place(aside, run_dir.hf)
    shutil.rmtree(run_dir.stitch_parts, ignore_errors=True)
    say(result_table(report, run_dir.path))


def _export_weights(run: RunContext, student: Trainer | None, folder: Path) -> None:
    """Write the pruned model's weights; with --export-adapter, the untrained weights and, separately, the adapter."""
    options, kept, whole = run.options, run.kept_layers, run.models.student_stays_whole
    size, keep_mtp = options.output.max_shard_bytes, options.model.keep_mtp
    trained = student is not None and options.training.changes_weights
    if options.output.export_adapter:
        _export_adapter(run, student)
    elif student is not None and trained:
        export_weights(student.model, run.source, kept, folder, size, whole, keep_mtp)
    if options.output.export_adapter or not trained:
        copy_weights(run.source, kept, folder, size, keep_mtp)  # no weight has changed: the stored bits are exported


def copy_weights(
    source: TensorSource, kept_layers: Sequence[int], folder: Path, max_shard_bytes: int, keep_mtp: bool
) -> None:
    """Copy the kept tensors of the source. Ranks take files in turn; rank 0 writes the index. Collective."""
    layout = source.pruned_layout(kept_layers, keep_mtp)
    place = parallel.rank(), parallel.world_size()

    def write() -> list[WrittenShard]:
        with one_line(folder, GO_ON):
            return write_share(source, kept_layers, folder, max_shard_bytes, keep_mtp, *place)

    written = parallel.together(write)
    parallel.stop_if_asked("export", "while it exports weights")
    shards = parallel.all_gather_objects(written)

    def finish() -> None:
        with one_line(folder, GO_ON):
            in_turn = [shard for turn in zip_longest(*shards) for shard in turn if shard is not None]
            finish_shards(folder, in_turn, layout, max_shard_bytes)

    parallel.on_rank0(finish)


def _export_adapter(run: RunContext, student: Trainer | None) -> None:
    options, run_dir = run.options, run.options.output.run_dir
    assert student is not None and options.lora is not None, "the configuration's checks ask for both"
    aside, whole = _emptied(aside_of(run_dir.adapter)), run.models.student_stays_whole
    export_adapter(student.model, run.source, run.kept_layers, aside, options.lora, str(run_dir.hf), whole)

    def finish() -> None:
        with one_line(run_dir.adapter, GO_ON):
            put_in_place(aside, run_dir.adapter, replace=True)

    parallel.on_rank0(finish)


def _report(run: RunContext, records: Sequence[dict[str, Any]]) -> Report:
    options, hf_config, kept = run.options, run.source.config, run.kept_layers
    return build_report(
        method=options.selection.name,
        num_source_layers=options.model.arch.num_layers,
        kept_layers=kept,
        scores=run.progress.scores,
        before=inventory(hf_config),
        after=inventory(hf_config, kept),
        tokens_seen=(run.progress.iteration + run.progress.other_iterations) * options.tokens_per_iteration,
        seed=options.training.seed,
        stages=with_performance(run.progress.stages, records),
        valid={model: dict(measured) for model, measured in run.progress.valid.items()},
        seq_length=options.data.seq_length,
        candidates=run.progress.candidates,
    )


def _emptied(folder: Path) -> Path:
    """Return the folder, created anew by rank 0. Collective."""

    def make() -> None:
        with one_line(folder, GO_ON):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    parallel.on_rank0(make)
    return folder
