"""The scores of benchmark tasks as columns of a comparison's tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from megaprune.evaluation.harness import headline, mean_score
from megaprune.report.run_report import share_recovered

PREFIX = "task "
SCORED = ("teacher", "pruned", "recovered")  # the models whose tasks may be scored
_MEAN = "mean"


def of_result(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Return the columns of one run: the score of each task and their mean, of each model that was scored.

    Args:
        tasks: {"teacher" | "pruned" | "recovered": {task: metrics}}.
    """
    columns = {}
    for model, of_model in tasks.items():
        scores = {task: headline(metrics) for task, metrics in of_model.items()}
        mean = mean_score(of_model)
        scores[_MEAN] = (mean["score"], mean["stderr"]) if mean else None
        for task, score in scores.items():
            if score is not None:
                columns[f"{PREFIX}{task} {model}"], columns[f"{PREFIX}{task} {model} stderr"] = score
    return columns


def with_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Add to a table the share of each score's loss that recovery regained; NaN where it was not measured."""
    shares = {
        f"{PREFIX}{task} share": [_share(row, task) for row in table.to_dict("records")]
        for task in _tasks(table.columns)
        if f"{PREFIX}{task} pruned" in table
    }
    return table.assign(**shares)


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the scores of one model's runs, if there are any: recovered, and where measured also pruned and
    the share recovered."""
    tasks = [task for task in _tasks(rows[0]) if not math.isnan(_value(rows[0], task, "teacher"))] if rows else []
    if not tasks:
        return []
    before = any(not math.isnan(_value(row, _MEAN, "pruned")) for row in rows)
    teacher = [f"{_value(rows[0], task, 'teacher'):.4f}" for task in tasks]
    how = "before recovery → after it (share of the lost score recovered)" if before else "after recovery"
    return [
        f"Scores of tasks {how}. A score is the accuracy, normalized by length where the task has that; ± is the "
        "standard error of the mean.",
        "",
        "| " + " | ".join(["method", "layers pruned", *tasks, "±"]) + " |",
        "|" + " --- |" * (len(tasks) + 3),
        "| " + " | ".join(["teacher", "0", *teacher, _shown(_value(rows[0], _MEAN, "teacher stderr"))]) + " |",
        *(_line(row, tasks) for row in rows),
        "",
    ]


def _line(row: Mapping[str, Any], tasks: Sequence[str]) -> str:
    cells = [_cell(row, task) for task in tasks]
    return (
        "| "
        + " | ".join([row["label"], str(row["pruned"]), *cells, _shown(_value(row, _MEAN, "recovered stderr"))])
        + " |"
    )


def _cell(row: Mapping[str, Any], task: str) -> str:
    before, share = _value(row, task, "pruned"), _value(row, task, "share")
    after = _shown(_value(row, task, "recovered"))
    if math.isnan(before):
        return after
    return f"{before:.4f} → {after}" + ("" if math.isnan(share) else f" ({share:.0%})")


def _share(row: Mapping[str, Any], task: str) -> float:
    teacher, pruned, recovered = (_value(row, task, model) for model in SCORED)
    share = share_recovered(teacher, pruned, recovered, is_loss=False)
    return math.nan if share is None else share


def _tasks(columns: Any) -> list[str]:
    """Return the names of the tasks among columns, in order, the mean last."""
    ending = " recovered"
    found = [column[len(PREFIX) : -len(ending)] for column in columns if _is_of(column, ending)]
    return [*(task for task in found if task != _MEAN), *(task for task in found if task == _MEAN)]


def _is_of(column: str, ending: str) -> bool:
    return column.startswith(PREFIX) and column.endswith(ending)


def _value(row: Mapping[str, Any], task: str, what: str) -> float:
    return row.get(f"{PREFIX}{task} {what}", math.nan)


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
