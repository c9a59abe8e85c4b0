"""A comparison as rows, CSV and Markdown."""

import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLUMNS = (
    ("label", "method"),
    ("pruned", "layers pruned"),
    ("seeds", "seeds"),
    ("pruned_loss", "pruned loss"),
    ("recovered_loss", "recovered loss"),
    ("spread", "± over seeds"),
    ("kl", "KL"),
    ("top1_agreement", "top-1"),
    ("tokens", "training tokens"),
    ("selection_tokens", "selection tokens"),
    ("seconds", "seconds"),
    ("jaccard", "Jaccard"),
    ("mask_kl", "mask KL"),
    ("percentile", "percentile"),
    ("kept", "kept layers (first seed)"),
)


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each method and size: means over its seeds, and how much they differ.

    Args:
        results: report.json's contents, with `model`, `label`, `size`, `kl`, `top1_agreement`, and `mask_kl` and
            `percentile` of the mask among all masks.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["size"], result["label"]), []).append(result)
    return [_row(found) for found in groups.values()]


def _row(results: Sequence[dict[str, Any]]) -> Row:
    recovered = [_loss(result, "recovered") for result in results]
    masks = [set(result["pruned_layers"]) for result in results]
    pairs = list(itertools.combinations(masks, 2))
    return {
        "model": results[0]["model"],
        "label": results[0]["label"],
        "size": results[0]["size"],
        "pruned": len(results[0]["pruned_layers"]),
        "seeds": len(results),
        "teacher_loss": _loss(results[0], "teacher"),
        "pruned_loss": statistics.fmean(_loss(result, "pruned") for result in results),
        "recovered_loss": statistics.fmean(recovered),
        "spread": statistics.stdev(recovered)
        if len(recovered) > 1 and all(map(math.isfinite, recovered))
        else math.nan,
        "kl": statistics.fmean(result["kl"] for result in results),
        "top1_agreement": statistics.fmean(result["top1_agreement"] for result in results),
        "tokens": results[0]["tokens_seen"],
        "selection_tokens": round(
            statistics.fmean(result["stages"].get("importance", {}).get("tokens", 0) for result in results)
        ),
        "seconds": statistics.fmean(sum(s["seconds"] for s in result["stages"].values()) for result in results),
        "jaccard": statistics.fmean(len(a & b) / len(a | b) for a, b in pairs) if pairs else math.nan,
        "mask_kl": statistics.fmean(result["mask_kl"] for result in results),
        "percentile": statistics.fmean(result["percentile"] for result in results),
        "kept": " ".join(map(str, results[0]["kept_layers"])),
    }


# shown even where no run has them
_ALWAYS = {key for key, _ in _COLUMNS} - {"mask_kl", "percentile"}


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    """`table.csv` with all digits, and `table.md`, best first within each size."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, folder / "table.csv")
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = sorted((r for r in rows if r["model"] == model), key=lambda r: (r["pruned"], r["recovered_loss"]))
        columns = [column for column in _COLUMNS if column[0] in _ALWAYS or any(_known(row[column[0]]) for row in own)]
        lines += [
            *([f"### {model}", ""] if model else []),
            f"Teacher: loss {_shown('teacher_loss', own[0]['teacher_loss'])}. Means over seeds; losses in nats per "
            "token, KL from the teacher.",
            "",
            "| " + " | ".join(title for _, title in columns) + " |",
            "|" + " --- |" * len(columns),
            *("| " + " | ".join(_shown(key, row[key]) for key, _ in columns) + " |" for row in own),
            "",
        ]
    (folder / "table.md").write_text("\n".join(lines))


def write_runs(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """`runs.csv`, a row for each run, with the layers that each kept."""
    rows = [
        {
            **{key: result[key] for key in ("model", "label", "size", "seed")},
            **{f"{model}_loss": _loss(result, model) for model in ("teacher", "pruned", "recovered")},
            **{key: result[key] for key in ("kl", "top1_agreement", "mask_kl", "percentile")},
            "tokens": result["tokens_seen"],
            "selection_tokens": result["stages"].get("importance", {}).get("tokens", 0),
            "seconds": sum(stage["seconds"] for stage in result["stages"].values()),
            "kept": " ".join(map(str, result["kept_layers"])),
        }
        for result in results
    ]
    _write_csv(rows, folder / "runs.csv")


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _loss(result: dict[str, Any], model: str) -> float:
    found = result["valid"].get(model, {}).get("loss")
    return math.nan if found is None else found


def _known(value: Any) -> bool:
    return not (isinstance(value, float) and math.isnan(value))


def _shown(key: str, value: Any) -> str:
    if not _known(value):
        return "–"
    if key == "top1_agreement":
        return f"{value:.1%}"
    if key in ("tokens", "selection_tokens"):
        return f"{value:,}"
    if key == "seconds":
        return f"{value:.0f}"
    if key == "percentile":
        return f"{value:.1f}"
    if key == "jaccard":
        return f"{value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
