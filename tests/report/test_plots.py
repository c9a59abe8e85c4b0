"""Plots of the logged values; they are drawn for the shortest runs, too."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from megaprune.report import plots
from megaprune.report.plots import plot_loss, write_plots

KEPT = [0, 2, 3]


def run_records(search, recovery, num_layers=4):
    rng = np.random.default_rng(0)
    records = []
    for iteration in range(1, search + recovery + 1):
        searching = iteration <= search
        entry = {
            "iteration": iteration,
            "stage": "search" if searching else "recovery",
            "loss": 2 + 1 / iteration,
            "tokens": 1000 * iteration,
        }
        if searching:
            mask = np.ones(num_layers)
            mask[1] = 0
            entry |= {"scores": rng.normal(size=num_layers).tolist(), "mask": mask.tolist()}
        records.append(entry)
    return records


def assert_drawn(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1280
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


@pytest.mark.parametrize(("search", "recovery"), [(6, 20), (1, 1), (1, 0), (12, 0)])
def test_all_plots_of_a_run_with_a_search(tmp_path, search, recovery):
    valid = {"teacher": {"loss": 2.5}, "pruned": {"loss": 4.0}, "recovered": {"loss": 2.9}}
    written = write_plots(run_records(search, recovery), tmp_path / "plots", KEPT, valid)
    assert [path.name for path in written] == ["loss.png", "layer_scores.png", "kept_layers.png"]
    assert sorted(written) == sorted((tmp_path / "plots").iterdir())
    for path in written:
        assert_drawn(path)


@pytest.mark.parametrize("recovery", [1, 5])
def test_without_a_search_there_is_the_loss_alone(tmp_path, recovery):
    written = write_plots(run_records(0, recovery), tmp_path, KEPT)
    assert [path.name for path in written] == ["loss.png"]
    assert_drawn(written[0])


def test_without_training_there_is_nothing_to_plot(tmp_path):
    assert write_plots([], tmp_path / "plots", KEPT) == []
    assert not (tmp_path / "plots").exists()


def test_numbers_that_were_not_finite_are_skipped(tmp_path):
    records = run_records(4, 4)
    records[0]["loss"] = records[5]["loss"] = None
    records[1]["scores"][2] = None
    for path in write_plots(records, tmp_path, KEPT, {"teacher": {"loss": None}}):
        assert_drawn(path)


def test_many_layers_with_soft_masks(tmp_path):
    records = run_records(3, 0, num_layers=61)
    for entry in records:
        entry["mask"][5] = 0.5
    for path in write_plots(records, tmp_path, range(50)):
        assert_drawn(path)


def figures(monkeypatch):
    """The figures that the plot functions save from now on."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: saved.append(self) or save(self, *args, **kwargs)
    )
    return saved


def test_loss_marks_the_stage_boundary_and_the_tokens(tmp_path, monkeypatch):
    saved = figures(monkeypatch)
    plot_loss(run_records(4, 6), tmp_path / "loss.png")
    (axes,) = saved[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["search", "recovery"]
    boundary = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in boundary] == [4.5]
    (tokens,) = axes.child_axes
    assert tokens.get_xlim() == pytest.approx([1000 * x for x in axes.get_xlim()])


def test_layer_plots_label_the_kept_layers(tmp_path, monkeypatch):
    saved = figures(monkeypatch)
    records = run_records(5, 2)
    write_plots(records, tmp_path, KEPT)
    _, scores, mask = saved
    for figure, key in ((scores, "scores"), (mask, "mask")):
        axes, strip = figure.axes[:2]
        expected = np.array([entry[key] for entry in records[:5]]).T
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        assert axes.images[0].get_extent() == [0.5, 5.5, -0.5, 3.5]
        assert axes.images[0].origin == strip.images[0].origin == "lower"  # or layers would stand upside down
        assert [text.get_text() for text in strip.texts] == ["0", "2", "3"]
        np.testing.assert_array_equal(strip.images[0].get_array()[:, 0], [1, 0, 1, 1])


def smoothed(losses, folder, monkeypatch):
    """The smoothed line that is drawn for these losses."""
    records = run_records(0, len(losses))
    for entry, loss in zip(records, losses, strict=True):
        entry["loss"] = loss
    with monkeypatch.context() as patch:
        saved = figures(patch)
        plot_loss(records, folder / "loss.png")
    (line,) = [line for line in saved[0].axes[0].lines if line.get_label() == "recovery"]
    return np.asarray(line.get_ydata(), float)


def test_smoothing_has_no_lag_and_ignores_gaps(tmp_path, monkeypatch):
    losses = np.arange(300, dtype=float).tolist()
    np.testing.assert_allclose(smoothed(losses, tmp_path, monkeypatch)[10:-10], losses[10:-10])
    losses[100] = None
    gap = smoothed(losses, tmp_path, monkeypatch)
    assert len(gap) >= 299 and np.isfinite(gap).all()
    np.testing.assert_array_equal(smoothed([2.0, 4.0], tmp_path, monkeypatch), [2.0, 4.0])


def test_an_outlying_score_leaves_the_others_their_colors(tmp_path, monkeypatch):
    saved = figures(monkeypatch)
    records = run_records(5, 0, num_layers=9)
    for entry in records:
        entry["scores"] = [*np.linspace(-1, 1, 8), 50.0]
    plots.plot_scores(records, tmp_path / "scores.png", range(9))
    low, high = saved[0].axes[0].images[0].get_clim()
    assert low == -1 and 1 <= high < 5


def test_scores_that_are_all_the_same(tmp_path):
    records = run_records(3, 0)
    for entry in records:
        entry["scores"] = [0.0, 0.0, 0.0, 0.0]
    assert_drawn(plots.plot_scores(records, tmp_path / "scores.png", KEPT))
