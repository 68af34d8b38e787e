"""The figures of a run, as PNG files; they need no display."""

from __future__ import annotations

import importlib
import io
import math
import textwrap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from experiment.charts import LOG_SCALE_RATIO
from experiment.errors import nonfatal
from experiment.formatting import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from experiment.results import ExperimentResult, FitResult, History

CAPTION_WIDTH = 31  # characters above a picture; longer lines would cover the next caption
MAX_NAMED_CLASSES = 40  # of the confusion matrix, which grows up to this number; more classes have smaller cells
BLUE, ORANGE = "#0072B2", "#D55E00"  # distinguishable with any type of colour vision (Okabe and Ito, 2008)


def draw_figures(result: ExperimentResult) -> dict[str, bytes]:
    """Return the figures of a run as PNG files, by file name; one that cannot be drawn costs one line."""
    importlib.import_module("matplotlib")  # if this fails, it fails once, not for each figure
    figures = {}
    for name, draw in figure_functions(result).items():
        with nonfatal(name):
            figures[name] = png_bytes(draw())
    return figures


def figure_functions(result: ExperimentResult) -> dict[str, Callable[[], Figure]]:
    """Return the functions that draw the figures of a run, by file name.

    The learning curves need at least one fold that did not diverge, the other figures need the final fit.
    """
    functions: dict[str, Callable[[], Figure]] = {}
    if result.folds:
        histories = {fold.name: fold.history for fold in result.folds}
        if result.final:
            histories["final"] = result.final.history
        functions["learning_curves.png"] = partial(draw_learning_curves, histories)
    if result.final:
        functions["per_class.png"] = partial(_draw_f1_per_class, result.folds, result.final)
        functions["confusion_matrix.png"] = partial(_draw_confusion_matrix, result.final)
        functions["mistakes.png"] = partial(_draw_mistakes, result)
    return functions


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png_bytes(figure: Figure, dpi: float = 110) -> bytes:
    """Return a figure as a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()


def draw_learning_curves(histories: dict[str, History]) -> Figure:
    """Draw loss and accuracy after each epoch: thin curves for the folds, thick ones for their mean.

    Parameters
    ----------
    histories : dict
        The history of each fold, at least one epoch long, and that of "final" if it has one. Folds may be of different
        length; the mean ends with the shortest.
    """
    figure = new_figure(11, 4.8)
    loss, accuracy = figure.subplots(1, 2)
    _draw_metric(loss, histories, "loss", "mean cross-entropy per image")
    _draw_metric(accuracy, histories, "accuracy", "fraction of images")
    _use_log_scale_if_wide(loss)
    figure.legend(*loss.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return figure


def _draw_metric(panel: Axes, histories: dict[str, History], metric: str, unit: str) -> None:
    folds = [history for name, history in histories.items() if name != "final"]
    common_epochs = min(len(history) for history in folds)
    for part, color, mean_label in (
        ("train", BLUE, "mean: training (measured during the epoch)"),
        ("validation", ORANGE, "mean: validation (images held out)"),
    ):
        curves = [[epoch.get(f"{part}/{metric}", math.nan) for epoch in history] for history in folds]
        for number, curve in enumerate(curves):
            label = "each fold" if number == 0 and part == "train" else None  # one entry in the legend
            epochs = range(1, len(curve) + 1)
            panel.plot(epochs, curve, color=color, label=label, linewidth=0.9, alpha=0.45, marker=".")
        mean = np.mean([curve[:common_epochs] for curve in curves], axis=0)
        epochs = range(1, common_epochs + 1)
        panel.plot(epochs, mean, color=color, label=mean_label, linewidth=2.5, marker="o", markersize=5)
    final = [epoch[f"train/{metric}"] for epoch in histories.get("final", [])]
    if final:
        label = "final fit: training on all images"
        panel.plot(range(1, len(final) + 1), final, "k--", label=label, linewidth=1.3, marker=".")
    panel.set(title=metric, xlabel="epoch", ylabel=f"{metric} ({unit})")
    panel.locator_params(axis="x", integer=True)
    panel.grid(alpha=0.3)
    if max(len(history) for history in histories.values()) == 1:
        panel.set(xlim=(0.5, 1.5), xticks=[1])


def _use_log_scale_if_wide(panel: Axes) -> None:
    """Use a logarithmic scale if a linear one would not show the smallest losses."""
    losses = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in panel.get_lines()])
    finite = losses[np.isfinite(losses)]
    if finite.size and 0 < LOG_SCALE_RATIO * finite.min() < finite.max():
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")


def _draw_f1_per_class(folds: list[FitResult], final: FitResult) -> Figure:
    classes = sorted(final.classes, key=lambda name: final.report[name]["f1-score"])
    figure = new_figure(8, 1.5 + 0.4 * len(classes))
    panel = figure.subplots()
    for row, name in enumerate(classes):
        fold_label = "each fold, on the images held out" if row == 0 else None  # one entry in the legend
        test_label = "final, on the test images" if row == 0 else None
        fold_scores = [fold.report[name]["f1-score"] for fold in folds]
        test_score = final.report[name]["f1-score"]
        panel.plot(fold_scores, [row] * len(folds), "o-", color=BLUE, label=fold_label, alpha=0.6, markersize=5)
        panel.plot(test_score, row, "D", color=ORANGE, label=test_label, markersize=8)
        panel.annotate(
            f"{test_score:.3f}", (test_score, row), (0, 8), textcoords="offset points", ha="center", fontsize=8
        )
    panel.set_yticks(range(len(classes)), [display_name(name) for name in classes])
    panel.set(ylim=(-0.6, len(classes) - 0.3), title="F1 score of each class")
    panel.set(xlabel="F1 score (1 is best)", ylabel="class")
    panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


def _draw_confusion_matrix(final: FitResult) -> Figure:
    """Draw the confusion matrix: with many classes without numbers in the cells, and only some classes named."""
    counts = np.array(final.confusion)
    images_per_class = counts.sum(1, keepdims=True).clip(min=1)  # 1 avoids 0/0 for a class without test images
    percentages = 100 * counts / images_per_class
    size = max(min(4 + 0.5 * len(counts), 9), 0.4 * min(len(counts), MAX_NAMED_CLASSES))
    figure = new_figure(size + 1, size)
    panel = figure.subplots()
    image = panel.imshow(percentages, cmap="Blues", vmin=0, vmax=100)
    title = "Confusion matrix: percentages of the true class"
    if len(counts) <= MAX_NAMED_CLASSES:
        title = "Confusion matrix: numbers of test images, and percentages of the true class"
        _write_cells(panel, counts, percentages)
    step = math.ceil(len(counts) / MAX_NAMED_CLASSES)
    named = range(0, len(counts), step)
    names = [display_name(final.classes[place]) for place in named]
    panel.set_xticks(named, names, rotation=45, ha="right")
    panel.set_yticks(named, names)
    wrapped = textwrap.fill(title, int(9 * size))  # about nine characters per inch
    panel.set(xlabel="predicted class", ylabel="true class", title=wrapped)
    figure.colorbar(image, label="percentage of the true class", shrink=0.8)
    return figure


def _write_cells(panel: Axes, counts: npt.NDArray[np.int64], percentages: npt.NDArray[np.float64]) -> None:
    """Write the number of images and their percentage into each cell that has images."""
    for (row, column), count in np.ndenumerate(counts):
        if count:
            percentage = percentages[row, column]
            color = "white" if percentage > 50 else "black"
            cell = f"{count}\n{percentage:.1f} %"
            panel.text(column, row, cell, color=color, ha="center", va="center", fontsize=8)


def _draw_mistakes(result: ExperimentResult) -> Figure:
    title = "Most confident mistakes on the test images" if result.mistakes else "No mistakes on the test images"
    captions = []
    for mistake in result.mistakes:
        true, predicted = display_name(mistake.true), display_name(mistake.predicted)
        lines = (f"true: {true}", f"predicted: {predicted} ({100 * mistake.probability:.1f} %)")
        captions.append("\n".join(textwrap.fill(line, CAPTION_WIDTH) for line in lines))
    images = [displayed_pixels(mistake.image, result.is_light_on_dark) for mistake in result.mistakes]
    return _draw_gallery(title, images, captions)


def displayed_pixels(image: Tensor, is_light_on_dark: bool) -> npt.NDArray[np.uint8]:
    """Return a picture of a data set as people see it: height × width × 3, or height × width and dark on light."""
    if image.dim() == 3:
        return image.permute(1, 2, 0).numpy()
    return 255 - image.numpy() if is_light_on_dark else image.numpy()


def _draw_gallery(title: str, images: list[npt.NDArray[np.uint8]], captions: list[str]) -> Figure:
    columns = 6
    rows = max(1, -(-len(images) // columns))  # rounded up
    figure = new_figure(11, 0.8 + 2.3 * rows)
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    for panel, image, caption in zip(figure.axes, images, captions, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_title(caption, fontsize=8)
    return figure
