"""The plots of one run: loss, layer scores over the search, kept layers over the search.

Everything is drawn from the records of `metrics.jsonl` (`megaprune.report.metrics`), so a plot can be made again from
a finished run. Figures are plain `Figure` objects: they need neither pyplot's global state nor a display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megaprune.report.run_report import measured_losses
from megaprune.utils.files import whole_file

BLUE, ORANGE, GREEN, GRAY, PALE = "#1f5fa8", "#d9822b", "#4d8f5b", "#6b7280", "#e8ecf1"
MASK_COLORS = ListedColormap([PALE, BLUE])
SMOOTHING = 1 / 30  # of a stage: the width of the loss curve's moving average
DPI = 160

Record = dict[str, Any]


def write_plots(
    records: Sequence[Record],
    plots_dir: str | Path,
    kept_layers: Sequence[int],
    valid: Mapping[str, Mapping[str, float | None]] | None = None,
) -> list[Path]:
    """Write the plots that the records allow and return their paths.

    `loss.png` if anything was trained; `layer_scores.png` and `kept_layers.png` if the search logged scores and
    masks. See the functions below for the arguments.
    """
    plots_dir = Path(plots_dir)
    written = []
    if records:
        written.append(plot_loss(records, plots_dir / "loss.png", valid))
    if _with(records, "scores"):
        written.append(plot_scores(records, plots_dir / "layer_scores.png", kept_layers))
    if _with(records, "mask"):
        written.append(plot_kept_layers(records, plots_dir / "kept_layers.png", kept_layers))
    return written


def plot_loss(
    records: Sequence[Record], path: str | Path, valid: Mapping[str, Mapping[str, float | None]] | None = None
) -> Path:
    """Plot training loss over iterations and tokens, with search and recovery in different colors.

    Args:
        records: one per iteration, at least one.
        valid: `report.json`'s mean cross-entropies on held-out text in nats. They get their own panel, because a
            training loss that is a divergence from the teacher can't be compared with them.
    """
    points = measured_losses(valid or {})
    figure = Figure(figsize=(8, 3.8), dpi=DPI, layout="constrained")
    if points:
        axes, panel = figure.subplots(1, 2, width_ratios=(3.4, 1))
        _draw_valid(panel, points)
    else:
        axes = figure.subplots()
    _draw_loss(axes, records)
    return _save(figure, path)


def plot_scores(records: Sequence[Record], path: str | Path, kept_layers: Sequence[int]) -> Path:
    """Plot every layer's score at every iteration of the search (E3-Pruner, Figure 7a).

    Args:
        records: those with `scores` are drawn, at least one; others are ignored.
        kept_layers: source indices of the layers in the pruned model, marked at the right edge.
    """
    records = _with(records, "scores")
    scores = np.array([record["scores"] for record in records], dtype=float).T  # [layers, iterations]
    figure, axes, strip = _layer_figure(len(scores))
    low, high = _color_limits(scores[np.isfinite(scores)])
    image = axes.imshow(np.ma.masked_invalid(scores), cmap="viridis", vmin=low, vmax=high, **_layer_image(records))
    axes.set_title("Layer scores over the search")
    _mark_kept(strip, len(scores), kept_layers)
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = beyond[bool((scores < low).any()), bool((scores > high).any())]
    figure.colorbar(image, ax=strip, label="score (higher = keep)", extend=extend, fraction=0.9, aspect=30, pad=0.5)
    return _save(figure, path)


def plot_kept_layers(records: Sequence[Record], path: str | Path, kept_layers: Sequence[int]) -> Path:
    """Plot the mask at every iteration of the search (E3-Pruner, Figure 7b). Arguments as in `plot_scores`."""
    records = _with(records, "mask")
    mask = np.array([record["mask"] for record in records], dtype=float).T  # [layers, iterations]
    figure, axes, strip = _layer_figure(len(mask))
    colors = MASK_COLORS if np.isin(mask, (0, 1)).all() else "Blues"
    axes.imshow(mask, cmap=colors, vmin=0, vmax=1, **_layer_image(records))
    axes.set_title("Layers in the sampled mask over the search (dark = kept)")
    _mark_kept(strip, len(mask), kept_layers)
    return _save(figure, path)


def _with(records: Sequence[Record], key: str) -> list[Record]:
    return [record for record in records if record.get(key)]


def _draw_loss(axes: Axes, records: Sequence[Record]) -> None:
    iterations = np.array([record["iteration"] for record in records])
    tokens = np.array([record["tokens"] for record in records])
    loss = np.array([record["loss"] for record in records], dtype=float)
    search = np.array([record["stage"] == "search" for record in records])
    for stage, color, of_stage in (("search", ORANGE, search), ("recovery", BLUE, ~search)):
        if of_stage.any():
            x, y = iterations[of_stage], loss[of_stage]
            axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, _smooth(y), color=color, linewidth=1.8, marker=marker, label=stage)
    if search.any() and not search.all():
        axes.axvline(iterations[search][-1] + 0.5, color=GRAY, linestyle="--", linewidth=1)
    axes.set(xlabel="iteration", ylabel="training loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=PALE)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["right"]].set_visible(False)
    per_iteration = tokens[-1] / iterations[-1]
    top = axes.secondary_xaxis("top", functions=(lambda x: x * per_iteration, lambda x: x / per_iteration))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_valid(axes: Axes, points: dict[str, float]) -> None:
    names, losses = list(points), list(points.values())
    colors = {"teacher": GRAY, "pruned": ORANGE, "stitched": GREEN, "recovered": BLUE}
    bars = axes.bar(names, losses, color=[colors[name] for name in names], width=0.65)
    axes.bar_label(bars, fmt="%.3f", padding=2)
    axes.set(title="validation (nats)", ylim=(0, max(losses) * 1.12))
    axes.set_yticks([])
    axes.tick_params(axis="x", rotation=30, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centered moving average; its window is shorter at the ends and skips missing values."""
    width = 2 * int(len(values) * SMOOTHING / 2) + 1
    there = np.isfinite(values)
    total = np.convolve(np.where(there, values, 0), np.ones(width), "same")
    count = np.convolve(there, np.ones(width), "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _color_limits(scores: np.ndarray) -> tuple[float, float]:
    """Tukey's fences, so that a protected layer's outlying score does not compress the colors of the rest."""
    if not scores.size:
        return 0.0, 1.0
    low, high = np.quantile(scores, (0.25, 0.75))
    reach = 1.5 * (high - low)
    if not reach:
        return scores.min(), scores.max()
    return max(scores.min(), low - reach), min(scores.max(), high + reach)


def _layer_figure(num_layers: int) -> tuple[Figure, Axes, Axes]:
    """A figure with one row per layer, and a thin strip at the right for the layers that are kept."""
    height = min(max(0.15 * num_layers + 1.2, 3.2), 10)
    figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained")
    axes, strip = figure.subplots(1, 2, width_ratios=(40, 1), sharey=True)
    axes.set(xlabel="iteration", ylabel="layer of the source model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes, strip


def _layer_image(records: Sequence[Record]) -> dict[str, Any]:
    """imshow's arguments for a [layers, iterations] matrix: layer 0 at the bottom, cells centered on integers."""
    num_layers = len(records[0].get("scores") or records[0]["mask"])
    first, last = records[0]["iteration"], records[-1]["iteration"]
    return {
        "aspect": "auto",
        "origin": "lower",
        "extent": (first - 0.5, last + 0.5, -0.5, num_layers - 0.5),
    }


def _mark_kept(strip: Axes, num_layers: int, kept_layers: Sequence[int]) -> None:
    kept = np.isin(np.arange(num_layers), kept_layers)[:, None]
    extent = (0, 1, -0.5, num_layers - 0.5)
    strip.imshow(kept, cmap=MASK_COLORS, vmin=0, vmax=1, aspect="auto", origin="lower", extent=extent)
    strip.set_xticks([])
    strip.tick_params(axis="y", left=False)
    strip.set_title("kept", fontsize=9)
    size = 8 if num_layers <= 40 else 6
    for layer in kept_layers:
        strip.text(1.25, layer, str(layer), va="center", fontsize=size, color=BLUE)


def _save(figure: Figure, path: str | Path) -> Path:
    with whole_file(path) as aside:
        figure.savefig(aside)
    return Path(path)


def _legend_beside(axes: Axes, size: str) -> None:
    """Put the legend right of the plot."""
    columns = 1 + (len(axes.get_legend_handles_labels()[1]) - 1) // 24
    axes.legend(frameon=False, fontsize=size, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)


def plot_comparison(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Plot recovered loss against layers pruned, one line per method.

    Args:
        rows: `megaprune.comparison.table.rows_of`; `recovered_loss` is NaN if nothing was validated.
    """
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["pruned"])
        spread = [0.0 if np.isnan(row["spread"]) else row["spread"] for row in own]
        x, y = [row["pruned"] for row in own], [row["recovered_loss"] for row in own]
        # colors repeat after ten
        marker, line = ("o", "-") if number % 20 < 10 else ("s", ":")
        axes.errorbar(
            x, y, yerr=spread, marker=marker, markersize=4, linestyle=line, linewidth=1.4, capsize=2, label=label
        )
    if rows and not np.isnan(rows[0]["teacher_loss"]):
        axes.axhline(rows[0]["teacher_loss"], color=GRAY, linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="layers pruned", ylabel="recovered loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=PALE)
    _legend_beside(axes, "small")
    return _save(figure, path)


def plot_recovery(runs: Mapping[str, Sequence[Record]], path: str | Path) -> Path:
    """Plot training loss against tokens, one line per run.

    Args:
        runs: the records of each run by its name; runs without records are ignored.
    """
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, records in runs.items():
        if records:
            loss = np.array([record["loss"] for record in records], dtype=float)
            axes.plot([record["tokens"] for record in records], _smooth(loss), linewidth=1.2, label=name)
    axes.set(xlabel="tokens", ylabel="training loss (nats)", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=PALE)
    if axes.lines:
        _legend_beside(axes, "xx-small")
    return _save(figure, path)
