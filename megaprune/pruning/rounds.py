"""Runs in rounds (`--rounds`): prune some layers, heal, and prune again, on the model that has healed.

Each round is a run of its own, in a folder of its own: it starts from the model that the round before has exported, and
has its own learning-rate schedule and optimizer. It removes an equal share of the layers in an equal share of the
iterations. Three things connect the rounds: the teacher is always the original model, the training data go on where the
round before has stopped, and the results are reported with the layers' numbers in the original model.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from megaprune.mcore import parallel
from megaprune.mcore.averaging import first_averaged
from megaprune.models import family_of
from megaprune.pruning import runner
from megaprune.pruning.export import GO_ON
from megaprune.pruning.models import Origin
from megaprune.pruning.options import PipelineOptions, RunOptions, SelectionOptions
from megaprune.pruning.run_dir import RunDir
from megaprune.report.front_matter import inherited
from megaprune.report.metrics import JSONL_NAME, read_metrics
from megaprune.report.model_card import CARD_NAME, model_card
from megaprune.report.performance import with_performance
from megaprune.report.plots import write_plots
from megaprune.report.run_report import Report, read_report, result_table, write_report
from megaprune.utils import stopping
from megaprune.utils.disk import one_line
from megaprune.utils.files import strict_json, whole_file
from megaprune.utils.locks import locked
from megaprune.utils.progress import say
from megaprune.utils.stopping import ShouldStop
from megaprune.weights.source import HFSource
from megaprune.weights.tensor_source import TensorSource


def run(
    options: RunOptions, source: TensorSource, command: str, should_stop: ShouldStop | None = None
) -> Report | None:
    """Start or resume a run of one or several rounds. Collective. Arguments, result and errors as of `runner.run`."""
    run_dir = options.output.run_dir
    if options.training.rounds == 1 or options.output.dry_run or run_dir.hf.exists():
        return runner.run(options, source, command, should_stop)
    with stopping.obeying(should_stop):
        return _run(options, source, command, should_stop)


def _run(options: RunOptions, source: TensorSource, command: str, should_stop: ShouldStop | None) -> Report:
    """Start or resume a run of several rounds."""
    run_dir = options.output.run_dir
    parallel.join()
    undoing = run_dir.undone_if_refused() if parallel.rank() == 0 else nullcontext()
    with locked(run_dir.lock, f"--save {run_dir.path}"), undoing, one_line(run_dir.path, GO_ON):
        parallel.on_rank0(lambda: run_dir.begin(options.output.settings))
        reports = _rounds(options, source, command, should_stop)
        parallel.on_rank0(lambda: _finish(options, source, reports, command))
    return parallel.on_rank0_for_all(lambda: read_report(run_dir.report))


def _rounds(options: RunOptions, source: TensorSource, command: str, should_stop: ShouldStop | None) -> list[Report]:
    """Run the rounds, and return their reports, with layers numbered as in the model that each one started from."""
    reports: list[Report] = []
    current = source
    for number in range(1, options.training.rounds + 1):
        kept = _kept(reports, options.model.arch.num_layers)
        part = round_options(options, number, kept, current)
        say(f"round {number} of {options.training.rounds}: {len(kept)} layers, {part.training.train_iters} iterations")
        origin = Origin(options, source, kept) if number > 1 else None
        report = runner.run(part, current, command, should_stop, origin)
        assert report is not None  # no dry run
        reports.append(report)
        current = HFSource(part.output.run_dir.hf)
    return reports


def round_options(options: RunOptions, number: int, kept: Sequence[int], source: TensorSource) -> RunOptions:
    """Return the options of a round.

    Args:
        options: those of the whole run.
        number: the round, from 1.
        kept: the original model's layers that the round starts with.
        source: the model that it starts with.
    """
    training, output, costs = options.training, options.output, options.pipeline.layer_costs
    first, iterations = _share(training.train_iters, number, training.rounds)
    searching = _share(training.search_iters, number, training.rounds)[1]
    arch = replace(family_of(source.config).architecture(source.config), num_mtp=options.model.arch.num_mtp)
    return replace(
        options,
        model=replace(options.model, name=str(source.folder), hf_config=source.config, arch=arch),
        pipeline=PipelineOptions(
            options.pipeline.original if number == 1 else tuple(options.pipeline.stages_of_layers(kept)),
            tuple(costs[layer] for layer in kept),
            options.pipeline.output_cost,
        ),
        data=replace(options.data, cache_dir=runner.cache_dir(options)),
        optimizer=replace(
            options.optimizer,
            train_iters=iterations,
            averaged_from=first_averaged(_averaged_share(options), searching, iterations),
        ),
        selection=_selection(options.selection, number, training.rounds, kept),
        training=replace(
            training,
            rounds=1,
            first_iteration=first,
            train_iters=iterations,
            search_iters=searching,
        ),
        output=replace(
            output,
            run_dir=output.run_dir.of_round(number),
            tensorboard_dir=output.tensorboard_dir and str(Path(output.tensorboard_dir) / f"round-{number}"),
        ),
    )


def _selection(selection: SelectionOptions, number: int, rounds: int, kept: Sequence[int]) -> SelectionOptions:
    """Return the selection of a round, in which layers are numbered as in the model that it starts with."""
    costs, method_options = selection.budget.costs, dict(selection.method_options)
    if "search_iters" in method_options:
        method_options["search_iters"] = max(1, _share(method_options["search_iters"], number, rounds)[1])
    return replace(
        selection,
        method_options=method_options,
        budget=replace(
            selection.budget,
            costs=tuple(costs[layer] for layer in kept),
            limit=selection.budget.limit_of_round(number, rounds),
        ),
        protected=frozenset(kept.index(layer) for layer in selection.protected),
        token_budget=max(1, selection.token_budget // rounds),
        heal_iters=_share(selection.heal_iters, number, rounds)[1],
    )


def _averaged_share(options: RunOptions) -> float:
    """Return the share of recovery whose weights are averaged. Each round averages over this share of its own."""
    training, first = options.training, options.optimizer.averaged_from
    if first is None:
        return 0.0
    return (training.train_iters - first) / (training.train_iters - training.search_iters)


def _share(total: int, number: int, rounds: int) -> tuple[int, int]:
    """Return where the share of a round begins in a total, and its size."""
    first = total * (number - 1) // rounds
    return first, total * number // rounds - first


def _kept(reports: Sequence[Report], num_layers: int) -> list[int]:
    """Return the original model's layers that are left after these rounds."""
    kept = list(range(num_layers))
    for report in reports:
        kept = [kept[layer] for layer in report.kept_layers]
    return kept


def _finish(options: RunOptions, source: TensorSource, reports: Sequence[Report], command: str) -> None:
    """Write the report, the metrics and the plots of the whole run, and move the last round's model into place."""
    run_dir = options.output.run_dir
    last, report = run_dir.of_round(len(reports)), whole_report(reports, options.model.arch.num_layers)
    with one_line(run_dir.path, GO_ON):
        records = _records(run_dir, reports)
        report = replace(report, stages=with_performance(report.stages, records))
        with whole_file(run_dir.path / JSONL_NAME) as aside:
            aside.write_text("".join(strict_json(record) + "\n" for record in records))
        write_report(run_dir.report, report)
        write_plots(records, run_dir.plots, report.kept_layers, report.valid)
        card = model_card(report, source_name=options.model.name, command=command, source_card=inherited(source.folder))
        (last.hf / CARD_NAME).write_text(card)
        for number in range(1, len(reports)):  # intermediate models are as large as the final one
            shutil.rmtree(run_dir.of_round(number).checkpoints, ignore_errors=True)
        os.replace(last.hf, run_dir.hf)
        for number in range(1, len(reports)):
            shutil.rmtree(run_dir.of_round(number).hf, ignore_errors=True)
    say(result_table(report, run_dir.path))


def whole_report(reports: Sequence[Report], num_layers: int) -> Report:
    """Return the report of a run in rounds. `valid.pruned` is that of the last round.

    Args:
        reports: those of the rounds.
        num_layers: of the original model.
    """
    first, last = reports[0], reports[-1]
    kept, stages = _kept(reports, num_layers), dict[str, dict[str, float]]()
    for report in reports:
        for stage, spent in report.stages.items():
            entry = stages.setdefault(stage, {"seconds": 0.0, "tokens": 0})
            for unit in entry:
                entry[unit] += spent[unit]
    teacher = {name: loss for name, loss in first.valid.items() if name == "teacher"}
    return replace(
        last,
        kept_layers=kept,
        pruned_layers=sorted(set(range(num_layers)) - set(kept)),
        scores=None,
        candidates=[],
        params_before=first.params_before,
        active_params_before=first.active_params_before,
        layer_kinds_before=first.layer_kinds_before,
        tokens_seen=sum(report.tokens_seen for report in reports),
        stages=stages,
        valid=teacher | last.valid,
        rounds=[
            {
                "kept_layers": _kept(reports[: number + 1], num_layers),
                "tokens_seen": report.tokens_seen,
                "valid": asdict(report)["valid"],
            }
            for number, report in enumerate(reports)
        ],
    )


def _records(run_dir: RunDir, reports: Sequence[Report]) -> list[dict]:
    """Return the rounds' metrics as those of one run. Masks and scores, of other layers in each round, stay with the
    rounds.
    """
    records: list[dict] = []
    for number in range(1, len(reports) + 1):
        iterations, tokens = (records[-1]["iteration"], records[-1]["tokens"]) if records else (0, 0)
        for record in read_metrics(run_dir.of_round(number).path):
            own = {key: value for key, value in record.items() if key not in ("mask", "scores")}
            records.append(
                own | {"round": number, "iteration": own["iteration"] + iterations, "tokens": own["tokens"] + tokens}
            )
    return records
