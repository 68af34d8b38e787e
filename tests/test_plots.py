"""The figures of a run: what they show."""

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hand_made import BAG, FIGURES, HISTORIES, SHIRT, make_hand_made_result
from PIL import Image

from experiment import plots
from experiment.plots import BLUE, ORANGE, draw_figures, draw_learning_curves, figure_functions, png_bytes
from experiment.results import ExperimentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


def make_figures(result: ExperimentResult) -> dict[str, "Figure"]:
    return {name: draw() for name, draw in figure_functions(result).items()}


@pytest.fixture
def figures(result: ExperimentResult) -> dict[str, "Figure"]:
    return make_figures(result)


def test_figures_are_png_files_without_a_display(result: ExperimentResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    files = draw_figures(result)
    assert tuple(files) == FIGURES
    for content in files.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG" and np.asarray(image).std() > 5


def test_diverged_fits_leave_out_the_figures_that_need_them(result: ExperimentResult) -> None:
    without_final = replace(result, final=None, mistakes=[])
    assert list(make_figures(without_final)) == ["learning_curves.png"]
    assert tuple(make_figures(replace(result, folds=[]))) == FIGURES[1:]
    assert make_figures(replace(without_final, folds=[])) == {}


def test_figure_that_cannot_be_drawn_costs_one_line_and_the_others_are_drawn(
    result: ExperimentResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(plots, "_draw_confusion_matrix", fail)
    assert tuple(draw_figures(result)) == tuple(name for name in FIGURES if name != "confusion_matrix.png")
    assert capsys.readouterr().err == "Without confusion_matrix.png: MemoryError: no memory\n"


@pytest.mark.parametrize("name", ["learning_curves.png", "per_class.png"])
def test_legend_is_below_the_panels(name: str, figures: dict[str, "Figure"]) -> None:
    png_bytes(figures[name])  # computes the layout
    (legend,) = figures[name].legends
    top = legend.get_window_extent().y1
    assert all(top <= panel.get_window_extent().y0 for panel in figures[name].axes)


# The learning curves


def points(line: "Line2D") -> list[tuple[float, float]]:
    """Return a line's points, rounded."""
    return [(float(x), float(y)) for x, y in np.round(np.asarray(line.get_xydata(), dtype=float), 4)]


def curves(panel: "Axes") -> list[tuple[str, bool, list[tuple[float, float]]]]:
    """Return each line's color, whether it is thick, and its points."""
    return [(str(line.get_color()), line.get_linewidth() > 2, points(line)) for line in panel.lines]


@pytest.mark.parametrize(
    ("position", "metric", "unit", "means"),
    [
        (0, "loss", "mean cross-entropy per image", {"train": [1.1, 0.7], "validation": [0.9, 0.6]}),
        (1, "accuracy", "fraction of images", {"train": [0.45, 0.65], "validation": [0.375, 0.625]}),
    ],
)
def test_learning_curves_show_each_fold_their_mean_and_the_final_fit(
    figures: dict[str, "Figure"], position: int, metric: str, unit: str, means: dict[str, list[float]]
) -> None:
    panel = figures["learning_curves.png"].axes[position]
    expected = []
    for part, color in (("train", BLUE), ("validation", ORANGE)):
        for fold in ("fold-1", "fold-2"):
            values = [metrics[f"{part}/{metric}"] for metrics in HISTORIES[fold]]
            expected.append((color, False, list(enumerate(values, start=1))))
        expected.append((color, True, list(enumerate(means[part], start=1))))
    final = [metrics[f"train/{metric}"] for metrics in HISTORIES["final"]]
    expected.append(("k", False, list(enumerate(final, start=1))))
    assert curves(panel) == expected
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == (metric, "epoch", f"{metric} ({unit})")


def test_wide_range_of_losses_is_drawn_on_a_logarithmic_scale() -> None:
    scales = {}
    for last in (0.05, 0.04):
        metrics = {"train/loss": 0.5, "validation/loss": last, "train/accuracy": 0.5, "validation/accuracy": 0.5}
        panels = draw_learning_curves({"fold-1": [metrics | {"train/loss": 1.0}, metrics]}).axes
        scales[last] = [panel.get_yscale() for panel in panels]
    assert scales == {0.05: ["linear", "linear"], 0.04: ["log", "linear"]}
    assert panels[0].yaxis.get_major_formatter()(0.04) == "0.04"  # not a power of ten


@pytest.mark.parametrize("folds", [1, 3])
def test_legend_has_one_entry_per_kind_of_curve(folds: int) -> None:
    histories = {f"fold-{number}": HISTORIES["fold-1"] for number in range(1, folds + 1)}
    (legend,) = draw_learning_curves(histories | {"final": HISTORIES["final"]}).legends
    entries = zip(legend.texts, legend.get_lines(), strict=True)
    assert [(text.get_text(), line.get_color()) for text, line in entries] == [
        ("each fold", BLUE),
        ("mean: training (measured during the epoch)", BLUE),
        ("mean: validation (images held out)", ORANGE),
        ("final fit: training on all images", "k"),
    ]


def test_mean_ends_with_the_shortest_fold() -> None:
    histories = {"final": [], "fold-1": HISTORIES["fold-1"], "fold-2": HISTORIES["fold-2"][:1]}
    panel = draw_learning_curves(histories).axes[0]
    assert [xy for _, is_thick, xy in curves(panel) if is_thick] == [[(1, 1.1)], [(1, 0.9)]]
    assert "k" not in {color for color, *_ in curves(panel)}  # the final fit has no epoch yet


def test_learning_curves_leave_out_the_epochs_without_a_metric() -> None:
    history = [{"train/loss": 0.5, "train/accuracy": 0.5}] * 2
    history[1] = history[1] | {"validation/loss": 0.25, "validation/accuracy": 0.75}
    panel = draw_learning_curves({"fold-1": history}).axes[0]
    fold, mean = (line for line in panel.lines if line.get_color() == ORANGE)
    for line in (fold, mean):
        np.testing.assert_array_equal(np.asarray(line.get_ydata()), [np.nan, 0.25])


def test_epochs_are_integers_and_a_single_epoch_is_in_the_middle(figures: dict[str, "Figure"]) -> None:
    for panel in figures["learning_curves.png"].axes:
        assert all(float(tick).is_integer() for tick in panel.get_xticks())
    for panel in draw_learning_curves({name: history[:1] for name, history in HISTORIES.items()}).axes:
        assert list(panel.get_xticks()) == [1]
        assert panel.get_xlim() == (0.5, 1.5)


# F1 score per class


def test_f1_of_each_class_in_each_fold_and_in_the_test_the_worst_class_at_the_bottom(
    figures: dict[str, "Figure"],
) -> None:
    (panel,) = figures["per_class.png"].axes
    folds = [line for line in panel.lines if line.get_color() == BLUE]
    test = [line for line in panel.lines if line.get_color() == ORANGE]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["Coat", "Shirt", "Bag"]
    assert list(panel.get_yticks()) == [0, 1, 2]
    assert [points(line) for line in folds] == [
        [(0.6667, 0), (0.0, 0)],  # Coat in fold-1 and fold-2
        [(0.6667, 1), (0.5, 1)],
        [(1.0, 2), (1.0, 2)],
    ]
    assert [points(line) for line in test] == [[(0.5714, 0)], [(0.6667, 1)], [(1.0, 2)]]
    assert [text.get_text() for text in panel.texts] == ["0.571", "0.667", "1.000"]
    bottom, top = panel.get_ylim()
    assert bottom < 0 and top > 2


def test_labels_of_the_f1_figure(figures: dict[str, "Figure"]) -> None:
    (panel,) = figures["per_class.png"].axes
    (legend,) = figures["per_class.png"].legends
    assert [text.get_text() for text in legend.texts] == [
        "each fold, on the images held out",
        "final, on the test images",
    ]
    assert panel.get_title() == "F1 score of each class"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("F1 score (1 is best)", "class")


# The confusion matrix


def test_confusion_matrix_has_true_classes_in_rows_and_percentages_of_each(figures: dict[str, "Figure"]) -> None:
    panel, color_bar = figures["confusion_matrix.png"].axes
    (image,) = panel.images
    assert np.asarray(image.get_array()).tolist() == [[50, 50, 0], [25, 75, 0], [0, 0, 100]]
    assert image.origin == "upper" and image.get_clim() == (0, 100)
    assert sum(image.cmap(0.0)) > sum(image.cmap(1.0))  # high percentages are dark
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("true class", "predicted class")
    for labels in (panel.get_yticklabels(), panel.get_xticklabels()):
        assert [label.get_text() for label in labels] == ["Coat", "Shirt", "Bag"]
    title = panel.get_title().replace("\n", " ")
    assert title == "Confusion matrix: numbers of test images, and percentages of the true class"
    assert color_bar.get_ylabel() == "percentage of the true class"


def test_percentages_refer_to_the_row_and_a_class_without_test_images_has_zeros(result: ExperimentResult) -> None:
    assert result.final is not None
    final = replace(result.final, confusion=[[3, 1, 1], [2, 6, 2], [0, 0, 0]])
    (image,) = make_figures(replace(result, final=final))["confusion_matrix.png"].axes[0].images
    np.testing.assert_allclose(np.asarray(image.get_array()), [[60, 20, 20], [20, 60, 20], [0, 0, 0]])
    assert image.get_clim() == (0, 100)


def test_cells_show_numbers_and_percentages_in_white_on_dark_cells(figures: dict[str, "Figure"]) -> None:
    panel = figures["confusion_matrix.png"].axes[0]
    cells = {}
    for text in panel.texts:
        column, row = text.get_position()
        cells[row, column] = (text.get_text(), text.get_color())
    assert cells == {
        (0, 0): ("2\n50.0 %", "black"),
        (0, 1): ("2\n50.0 %", "black"),  # coats that are predicted as shirts
        (1, 0): ("1\n25.0 %", "black"),
        (1, 1): ("3\n75.0 %", "white"),
        (2, 2): ("2\n100.0 %", "white"),
    }


@pytest.mark.parametrize(("classes", "cells", "step"), [(40, 40, 1), (41, 0, 2), (200, 0, 5)])
def test_confusion_matrix_of_many_classes_is_no_larger_and_names_some_of_them(
    classes: int, cells: int, step: int, result: ExperimentResult
) -> None:
    assert result.final is not None
    names = [f"class-{number}" for number in range(classes)]
    report = dict.fromkeys(names, result.final.report["Coat"])
    final = replace(result.final, report=report, confusion=np.eye(classes, dtype=int).tolist())
    figure = figure_functions(replace(result, final=final))["confusion_matrix.png"]()
    panel = figure.axes[0]
    assert figure.get_size_inches().tolist() == [17, 16]
    assert len(panel.texts) == cells and ("numbers of test images" in panel.get_title()) == bool(cells)
    for labels in (panel.get_yticklabels(), panel.get_xticklabels()):
        assert [label.get_text() for label in labels] == names[::step]


# The mistakes


def test_mistakes_are_shown_with_their_images_the_most_confident_first(figures: dict[str, "Figure"]) -> None:
    panels = [panel for panel in figures["mistakes.png"].axes if panel.images]
    assert [panel.get_title() for panel in panels] == [
        "true: Coat\npredicted: Shirt (95.0 %)",
        "true: Coat\npredicted: Shirt (60.0 %)",
        "true: Shirt\npredicted: Coat (50.0 %)",
    ]
    for panel, brightness in zip(panels, (4, 3, 7), strict=True):
        (image,) = panel.images
        pixels = 255 - np.asarray(image.get_array())  # dark on light
        assert pixels.shape == (28, 28) and pixels[0, 1] == brightness == pixels.sum()
        assert image.get_clim() == (0, 255)
        assert sum(image.cmap(0.0)) < sum(image.cmap(1.0))  # high values are light
    assert figures["mistakes.png"].get_suptitle() == "Most confident mistakes on the test images"


def test_mistakes_are_shown_six_per_row() -> None:
    heights = {}
    for count in (1, 6, 7, 13):
        figure = make_figures(make_hand_made_result([(SHIRT, BAG, 0.75)] * count))["mistakes.png"]
        heights[count] = figure.get_size_inches()[1]
        assert sum(bool(panel.images) for panel in figure.axes) == count
        assert not any(panel.axison for panel in figure.axes)
    assert heights[1] == heights[6] < heights[7]
    assert heights[13] - heights[7] == pytest.approx(heights[7] - heights[6])


def test_network_without_mistakes_has_a_figure_without_images(result: ExperimentResult) -> None:
    figure = make_figures(replace(result, mistakes=[]))["mistakes.png"]
    assert figure.get_suptitle() == "No mistakes on the test images"
