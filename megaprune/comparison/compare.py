"""A comparison: its runs, and the measurement of their results."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megaprune.comparison.grid import Comparison, PlannedRun
from megaprune.comparison.ranking import Ranking, all_masks, rank_all_masks
from megaprune.comparison.table import rows_of, write_runs, write_tables
from megaprune.comparison.tasks import TaskScorer
from megaprune.evaluation.task_files import load_tasks
from megaprune.mcore import parallel
from megaprune.pruning.resolve import open_run
from megaprune.pruning.rounds import run
from megaprune.report.metrics import read_metrics
from megaprune.report.plots import plot_comparison, plot_recovery
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import write_json
from megaprune.utils.locks import LOCK_NAME, locked
from megaprune.utils.progress import say
from megaprune.utils.stopping import ShouldStop
from megaprune.utils.text import call_text

_EVALUATION = "evaluation.json"


def compare(comparison: Comparison, save: Path, should_stop: ShouldStop | None = None) -> None:
    """Make the runs one after the other, each resumable, then write `table.csv`, `table.md`, `runs.csv` and plots to
    `save`. Collective.

    Args:
        should_stop: asked on every rank after each iteration of the runs that `--exit-on-signal` lets stop.

    Raises:
        MegapruneError: a run was refused; those before it are kept.
        RunStopped: `should_stop` said so.
    """
    _check(comparison)
    parallel.join()
    with locked(save / LOCK_NAME, f"--save {save}"):
        _compare(comparison, save, should_stop)


def _compare(comparison: Comparison, save: Path, should_stop: ShouldStop | None) -> None:
    runs = comparison.runs
    for number, planned in enumerate(runs, start=1):
        say(f"\n[{number}/{len(runs)}] {planned.folder.name}")
        with _naming(planned):
            options, source = open_run(planned.config, parallel.world_size())
            call = call_text("prune", planned.config.changed())
            run(options, source, call, should_stop if planned.config.run.exit_on_signal else None)
    rankings = _rankings(comparison, save)
    if parallel.rank() == 0:
        results = [_result(planned, comparison.dtype) | _rank(planned, rankings) for planned in runs]
        if comparison.tasks:
            scorer = TaskScorer(comparison.tasks, save)
            results = [r | {"tasks": scorer.scores(planned)} for r, planned in zip(results, runs, strict=True)]
        rows = rows_of(results)
        write_tables(rows, save)
        write_runs(results, save)
        for model in dict.fromkeys(planned.model for planned in runs):
            ending = f"-{model}.png" if model else ".png"
            plot_comparison([row for row in rows if row["model"] == model], save / f"quality{ending}")
            records = {r["name"]: read_metrics(r["folder"]) for r in results if r["model"] == model}
            plot_recovery(records, save / f"recovery{ending}")
        say((save / "table.md").read_text())
        say(f"written to {save}")


@contextmanager
def _naming(planned: PlannedRun) -> Iterator[None]:
    try:
        yield
    except MegapruneError as error:
        raise type(error)(f"{planned.folder.name}: {error}") from error


def _check(comparison: Comparison) -> None:
    """Check the tasks and all runs before the first one starts."""
    if comparison.tasks:
        load_tasks(comparison.tasks.names, comparison.tasks.path)
    met = set()
    for planned in comparison.runs:
        what = (planned.model, planned.label, planned.size)
        if what in met:
            continue
        met.add(what)
        with _naming(planned):
            options, _ = open_run(planned.config, parallel.world_size())
            if comparison.rank_windows and options.selection.manual is None:
                all_masks(options.selection)


def _masks_of(planned: PlannedRun) -> tuple[str, int, str]:
    """The key of the masks that a finished run's mask is ranked among: model, number of pruned layers, protection."""
    pruned = json.loads((planned.folder / "report.json").read_text())["pruned_layers"]
    return planned.model, len(pruned), planned.config.search.protect_layers


def _rankings(comparison: Comparison, save: Path) -> dict[tuple[str, int, str], Ranking]:
    """Return the rankings that the file asks for; each is measured once and then read."""
    found: dict[tuple[str, int, str], Ranking] = {}
    for planned in comparison.runs if comparison.rank_windows else []:
        key = parallel.on_rank0_for_all(partial(_masks_of, planned))
        if key not in found and not planned.config.method.names_layers:
            model, pruned, protected = key
            name = ["masks", model, str(pruned), protected.replace(",", "+"), f"{comparison.rank_windows}windows"]
            path = save / ("-".join(filter(None, name)) + ".json")
            if not parallel.on_rank0_for_all(path.is_file):
                say(f"measuring all masks for {path}")
            found[key] = rank_all_masks(planned.config, comparison.rank_windows, path)
    return found


def _rank(planned: PlannedRun, rankings: dict[tuple[str, int, str], Ranking]) -> dict[str, float]:
    ranking = rankings.get(_masks_of(planned))
    if ranking is None:
        return {"mask_kl": math.nan, "percentile": math.nan}
    kept = json.loads((planned.folder / "report.json").read_text())["kept_layers"]
    return {"mask_kl": ranking.kl_of.get(tuple(kept), math.nan), "percentile": ranking.percentile(kept)}


def _result(planned: PlannedRun, dtype: str) -> dict[str, Any]:
    report = json.loads((planned.folder / "report.json").read_text())
    named = {"label": planned.label, "name": planned.folder.name, "folder": planned.folder}
    return report | _evaluation(planned, dtype) | named | {"model": planned.model, "size": planned.size}


def _evaluation(planned: PlannedRun, dtype: str) -> dict[str, float]:
    """Return KL and agreement of the export with the original in transformers; measured once and then read."""
    path, config = planned.folder / _EVALUATION, planned.config
    if not path.is_file():
        found = {"kl": math.nan, "top1_agreement": math.nan}
        if config.data.valid_data and config.model.hf_model:
            from megaprune.evaluation.perplexity import evaluate_model

            found = evaluate_model(
                str(planned.folder / "hf"),
                config.data.valid_data,
                teacher=config.model.hf_model,
                seq_length=config.data.seq_length,
                dtype=dtype,
                text_key=config.data.text_key,
                messages_key=config.data.messages_key,
                trust_remote_code=config.model.trust_remote_code,
            )
        write_json(path, {name: found[name] for name in ("kl", "top1_agreement")})
    read = json.loads(path.read_text())
    return {name: math.nan if value is None else value for name, value in read.items()}
