"""Forest plots: folds, means, intervals, and rows that are cut off."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from scipy.stats import t
from synthetic_runs import BASE, BETTER, NOISE

from comparison.forest_plot import add_title, draw_panel
from comparison.statistics import compare_metric, correct_together
from experiment.plots import BLUE, ORANGE, png_bytes


def draw(*runs: Any, metric: str = "accuracy", p: float | None = None) -> Any:
    """Return a panel with one row per run, each compared with BASE; `p` replaces their corrected p values."""
    lower = metric == "loss"
    differences = [
        compare_metric(metric, BASE.tolist(), np.asarray(run).tolist(), 5, lower_is_better=lower) for run in runs
    ]
    if p is not None:
        differences = [replace(difference, corrected_p=p) for difference in differences]
    panel = Figure(figsize=(6, 4)).subplots()
    draw_panel(panel, metric, differences, [f"row {number}" for number in range(len(runs))])
    return panel


def drawn_rows(panel: Any) -> list[tuple[list[float], float, float, float]]:
    """Return the folds' differences, their mean and the ends of the interval (NaN without one) of each row."""
    folds = [line.get_xdata().tolist() for line in panel.lines if line.get_marker() == "o"]
    intervals, means = panel.collections
    rows = []
    for points, interval, (mean, _) in zip(folds, intervals.get_segments(), means.get_offsets(), strict=True):
        low, high = interval[:, 0] if len(interval) else (np.nan, np.nan)
        rows.append((points, mean, low, high))
    return rows


def cut_off(panel: Any, number: str = "±") -> list[tuple[str, float]]:
    """Return the text and the row of each arrow at the edge of a panel."""
    return [(text.get_text(), text.get_position()[1]) for text in panel.texts if number in text.get_text()]


def test_row_shows_each_fold_their_mean_and_the_corrected_interval() -> None:
    rows = drawn_rows(draw(BETTER, NOISE))
    for (points, mean, low, high), gains in zip(rows, (BETTER - BASE, NOISE - BASE), strict=True):
        half_width = t.isf(0.025, 4) * gains.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
        np.testing.assert_allclose(points, gains)
        np.testing.assert_allclose([low, mean, high], gains.mean() + np.array([-half_width, 0, half_width]))


def test_marker_is_filled_exactly_where_the_interval_does_not_contain_zero() -> None:
    gains = np.random.default_rng(3).normal(0, 0.01, (12, 5)) + np.linspace(0, 0.05, 12)[:, None]
    differences = correct_together([compare_metric("Coat", BASE.tolist(), list(BASE + gain), 5) for gain in gains])
    panel = Figure().subplots()
    draw_panel(panel, "F1", differences, [""] * 12)
    colours: Any = panel.collections[1].get_facecolor()
    filled = [same_color(colour, ORANGE) for colour in colours]
    assert filled == [low > 0 or high < 0 for _, _, low, high in drawn_rows(panel)]
    assert 0 < sum(filled) < 12


def test_row_whose_folds_differ_by_the_same_amount_has_no_interval() -> None:
    panel = draw(BETTER, BASE + 0.01)
    (_, mean, *interval) = drawn_rows(panel)[1]
    assert mean == pytest.approx(0.01) and np.isnan(interval).all()
    assert cut_off(draw(NOISE, BETTER, BASE - 0.8), "0.8") == [("← −0.8", 1.85)]


@pytest.mark.parametrize(("p", "colour"), [(0.04, ORANGE), (0.05, "white"), (float("nan"), "white")])
def test_marker_of_the_mean_is_filled_where_it_is_significant(p: float, colour: str) -> None:
    _, means = draw(BETTER, p=p).collections
    assert same_color(means.get_facecolor()[0], colour)


def test_first_row_is_at_the_top() -> None:
    panel = draw(BETTER, NOISE, BASE)
    assert panel.get_ylim() == (2.5, -0.5)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("after", [NOISE, BASE, BASE + [0.0, 0.0, 0.0, 0.0, 0.1]])
def test_zero_is_in_the_middle_and_everything_within_the_panel(after: np.ndarray) -> None:
    panel = draw(after)
    left, right = panel.get_xlim()
    assert -left == right > np.nanmax(np.abs(np.hstack(drawn_rows(panel)[0])))


@pytest.mark.parametrize(("metric", "sides"), [("accuracy", "← worse|better →"), ("loss", "← better|worse →")])
def test_panel_says_which_side_is_better(metric: str, sides: str) -> None:
    panel = draw(BETTER, metric=metric)
    assert [text.get_text() for text in panel.texts] == sides.split("|")


def test_row_far_beyond_the_others_is_cut_off_with_an_arrow_and_its_mean() -> None:
    panel = draw(NOISE, BETTER, NOISE - 0.8)
    alone = draw(NOISE, BETTER)
    assert panel.get_xlim() == alone.get_xlim()
    assert cut_off(panel) == [("← −0.8 ± 0.005", 1.85)]
    assert cut_off(draw(NOISE, BETTER, NOISE + 0.8)) == [("+0.8 ± 0.005 →", 1.85)]


def test_arrow_and_mean_are_within_the_panel() -> None:
    panel = draw(NOISE, BETTER, NOISE - 0.8)
    png_bytes(panel.figure)  # computes the layout
    box = panel.get_window_extent()
    (arrow,) = [text.get_window_extent() for text in panel.texts if "±" in text.get_text()]
    assert box.x0 <= arrow.x0 < arrow.x1 < (box.x0 + box.x1) / 2


def test_row_that_hardly_differs_cuts_off_no_other() -> None:
    assert cut_off(draw(BASE + (NOISE - BASE) / 1000, NOISE, BETTER)) == []


def test_legend_explains_points_intervals_and_empty_markers() -> None:
    figure = Figure()
    add_title(figure, "title")
    (legend,) = figure.legends
    lines = dict(zip([text.get_text() for text in legend.texts], legend.get_lines(), strict=True))
    assert [
        (name, line.get_marker(), line.get_color(), line.get_markerfacecolor()) for name, line in lines.items()
    ] == [
        ("difference in a fold", "o", BLUE, BLUE),
        ("mean and 95 % interval, corrected (Holm)", "D", ORANGE, ORANGE),
        ("not significant: the interval contains 0", "D", ORANGE, "white"),
    ]
