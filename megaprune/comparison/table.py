"""The results of a comparison as rows, CSV and Markdown."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from megaprune.comparison import task_columns
from megaprune.report.run_report import share_recovered

Row = dict[str, Any]
_COLUMNS = {
    "label": "method",
    "pruned": "layers pruned",
    "seeds": "seeds",
    "pruned_loss": "pruned loss",
    "recovered_loss": "recovered loss",
    "spread": "± over seeds",
    "loss_share": "loss recovered",
    "kl": "KL",
    "top1_agreement": "top-1",
    "tokens": "training tokens",
    "selection_tokens": "selection tokens",
    "seconds": "seconds",
    "selection_share": "time in selection",
    "jaccard": "Jaccard",
    "mask_kl": "mask KL",
    "percentile": "percentile",
    "kept": "kept layers (first seed)",
}
_WHERE_KNOWN = ("mask_kl", "percentile")  # shown only if a run has them
_SELECTION = ("importance", "search")  # the stages that choose the layers
_FORMATS = {
    "top1_agreement": "{:.1%}",
    "loss_share": "{:.1%}",
    "selection_share": "{:.1%}",
    "tokens": "{:,}",
    "selection_tokens": "{:,}",
    "seconds": "{:.0f}",
    "percentile": "{:.1f}",
    "jaccard": "{:.2f}",
}


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Return one row per method and size: means over its seeds, and how much they differ.

    Args:
        results: report.json's contents, with `model`, `label`, `size`, `kl`, `top1_agreement`, and `mask_kl` and
            `percentile` of the mask among all masks; with `tasks`, the harness's metrics of each model by task.
    """
    runs = _runs(results)
    scores = [column for column in runs if column.startswith(task_columns.PREFIX)]
    mean = statistics.fmean  # NaN where a run has no value
    groups = runs.groupby(["model", "size", "label"], sort=False)
    table = groups.agg(
        pruned=("pruned_layers", lambda masks: len(masks.iloc[0])),
        seeds=("kept", "size"),
        teacher_loss=("teacher_loss", _first),
        pruned_loss=("pruned_loss", mean),
        recovered_loss=("recovered_loss", mean),
        spread=("recovered_loss", lambda losses: losses.std(skipna=False)),
        kl=("kl", mean),
        top1_agreement=("top1_agreement", mean),
        tokens=("tokens", _first),
        selection_tokens=("selection_tokens", lambda tokens: round(mean(tokens))),
        seconds=("seconds", mean),
        jaccard=("pruned_layers", _jaccard),
        mask_kl=("mask_kl", mean),
        selection_share=("selection_share", mean),
        percentile=("percentile", mean),
        kept=("kept", _first),
        **{column: (column, mean) for column in scores},
    )
    table["loss_share"] = [_share(row) for row in table.to_dict("records")]
    table = task_columns.with_shares(table)
    keys = [{key: own[key].iloc[0] for key in ("model", "label", "size")} for _, own in groups]
    return [of_group | row for of_group, row in zip(keys, table.to_dict("records"), strict=True)]


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    """Write `table.csv` with all digits, and `table.md`, best first within each size."""
    folder.mkdir(parents=True, exist_ok=True)
    table = _frame(rows)
    _write_csv(table, folder / "table.csv")
    parts = [_markdown(model, own) for model, own in table.groupby("model", sort=False)]
    (folder / "table.md").write_text("\n".join(itertools.chain.from_iterable(parts)))


def write_runs(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `runs.csv`, a row per run, with the layers that each kept."""
    runs = _runs(results).drop(columns="pruned_layers")
    runs.insert(3, "seed", [result["seed"] for result in results])
    _write_csv(runs, folder / "runs.csv")


def _runs(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {
            **{key: result[key] for key in ("model", "label", "size")},
            **{f"{model}_loss": _loss(result, model) for model in ("teacher", "pruned", "recovered")},
            **{key: result[key] for key in ("kl", "top1_agreement", "mask_kl", "percentile")},
            "tokens": result["tokens_seen"],
            "selection_tokens": result["stages"].get("importance", {}).get("tokens", 0),
            "seconds": _seconds(result["stages"], result["stages"]),
            "selection_share": _selection_share(result["stages"]),
            **task_columns.of_result(result.get("tasks", {})),
            "kept": " ".join(map(str, result["kept_layers"])),
            "pruned_layers": frozenset(result["pruned_layers"]),
        }
        for result in results
    ]
    return _frame(rows)


def _share(row: Row) -> float:
    share = share_recovered(row["teacher_loss"], row["pruned_loss"], row["recovered_loss"])
    return math.nan if share is None else share


def _selection_share(stages: dict[str, dict[str, float]]) -> float:
    """Return the share of a run's time that was spent on choosing layers."""
    whole = _seconds(stages, stages)
    return _seconds(stages, _SELECTION) / whole if whole else math.nan


def _seconds(stages: dict[str, dict[str, float]], names: Iterable[str]) -> float:
    return sum(stages[name]["seconds"] for name in names if name in stages)


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    # Ratios, and the number of layers of a manual choice, are sizes side by side: neither takes the other's type.
    return pd.DataFrame(rows).assign(size=pd.Series([row["size"] for row in rows], dtype=object))


def _loss(result: dict[str, Any], model: str) -> float:
    found = result["valid"].get(model, {}).get("loss")
    return math.nan if found is None else found


def _first(values: pd.Series) -> Any:
    return values.iloc[0]


def _jaccard(masks: pd.Series) -> float:
    """The mean similarity of the masks of two seeds; NaN for one seed."""
    pairs = list(itertools.combinations(masks, 2))
    return statistics.fmean(len(a & b) / len(a | b) for a, b in pairs) if pairs else math.nan


def _markdown(model: str, table: pd.DataFrame) -> list[str]:
    columns = [key for key in _COLUMNS if key not in _WHERE_KNOWN or table[key].notna().any()]
    rows = table.sort_values(["pruned", "recovered_loss"], kind="stable").to_dict("records")
    return [
        *([f"### {model}", ""] if model else []),
        f"Teacher: loss {_shown('teacher_loss', rows[0]['teacher_loss'])}. Means over seeds; losses in nats per "
        "token, KL from the teacher.",
        "",
        "| " + " | ".join(_COLUMNS[key] for key in columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(_shown(key, row[key]) for key in columns) + " |" for row in rows),
        "",
        *task_columns.markdown(rows),
    ]


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, na_rep="nan", lineterminator="\r\n")  # RFC 4180's line ends


def _shown(key: str, value: Any) -> str:
    if pd.isna(value):
        return "–"
    return _FORMATS.get(key, "{:.4f}" if isinstance(value, float) else "{}").format(value)
