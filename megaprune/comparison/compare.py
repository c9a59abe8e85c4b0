"""Runs a comparison, and measures what came of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprune.comparison.plan import PlannedRun
from megaprune.comparison.table import rows_of, write_tables
from megaprune.errors import MegapruneError
from megaprune.mcore import parallel
from megaprune.report.files import write_json
from megaprune.report.plots import plot_comparison, plot_recovery
from megaprune.runner import run
from megaprune.training.metrics import read_metrics

_EVALUATION = "evaluation.json"


def compare(runs: Sequence[PlannedRun], save: Path) -> None:
    """Makes the runs one after the other, each resumable, then `table.csv`, `table.md` and two plots in `save`.
    Collective.

    Raises:
        MegapruneError: a run was refused; those before it are kept.
    """
    for number, planned in enumerate(runs, start=1):
        if parallel.rank() == 0:
            print(f"\n[{number}/{len(runs)}] {planned.folder.name}", flush=True)
        try:
            run(planned.config, "compare.py")
        except MegapruneError as error:
            raise type(error)(f"{planned.folder.name}: {error}") from error
    if parallel.rank() == 0:
        results = [_result(planned) for planned in runs]
        rows = rows_of(results)
        write_tables(rows, save)
        plot_comparison(rows, save / "quality.png")
        plot_recovery({result["name"]: read_metrics(result["folder"]) for result in results}, save / "recovery.png")
        print((save / "table.md").read_text(), flush=True)
        print(f"written to {save}", flush=True)
    parallel.leave()


def _result(planned: PlannedRun) -> dict[str, Any]:
    report = json.loads((planned.folder / "report.json").read_text())
    measured = _evaluation(planned)
    return report | measured | {"label": planned.label, "name": planned.folder.name, "folder": planned.folder}


def _evaluation(planned: PlannedRun) -> dict[str, float]:
    """KL and agreement of the export with the original in transformers, measured once."""
    path, config = planned.folder / _EVALUATION, planned.config
    if not path.is_file():
        found = {"kl": math.nan, "top1_agreement": math.nan}
        if config.data.valid_data and config.model.hf_model:
            from megaprune.evaluation.hf import evaluate_model

            found = evaluate_model(
                str(planned.folder / "hf"),
                config.data.valid_data,
                teacher=config.model.hf_model,
                seq_length=config.data.seq_length,
                text_key=config.data.text_key,
                messages_key=config.data.messages_key,
                trust_remote_code=config.model.trust_remote_code,
            )
        write_json(path, {name: found[name] for name in ("kl", "top1_agreement")})
    read = json.loads(path.read_text())
    return {name: math.nan if value is None else value for name, value in read.items()}
