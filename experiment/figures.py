"""The pictures and report.md of a run, as the bytes of files."""

import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from experiment.console import summary_text
from experiment.results import ExperimentResult, FitResult, Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with any colour vision (Okabe and Ito, 2008)


def draw_figures(result: ExperimentResult) -> dict[str, bytes]:
    """Return the figures of a run as PNG files, by name; they need no display.

    Without a final result only the learning curves are drawn, without any nothing is.
    """
    figures = {"learning_curves.png": _draw_learning_curves(result)} if result.folds else {}
    if result.final:
        figures["per_class.png"] = _draw_per_class(result.folds, result.final)
        figures["confusion_matrix.png"] = _draw_confusion_matrix(result.final)
        figures["mistakes.png"] = _draw_mistakes(result.mistakes)
    return {name: png_of(figure) for name, figure in figures.items()}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that size in inches."""
    from matplotlib.figure import Figure  # not above, where it would end the run: it raises for a strange MPLBACKEND

    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: "Figure", dpi: float = 110) -> bytes:
    """Return a figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def report_text(result: ExperimentResult, comparison: str, figures: Iterable[str]) -> str:
    """Return report.md, which says how the run compares with an earlier one and shows the figures of these names."""
    compared = f"\n```\n{comparison}\n```\n" if comparison else ""
    pictures = "".join(f"![{name}]({name})\n\n" for name in figures)
    model = "\n- `model.pt`: the weights of the final network, for `load_state_dict`." if result.final else ""
    environment = json.dumps(result.environment, indent=2, ensure_ascii=False)
    return f"""# {result.run_dir.name}

```
{summary_text(result)}
```
{compared}
{pictures}## Environment

```json
{environment}
```

## More

- `results.json`: every figure at full precision; `config.json`: what was asked.{model}
- In Weights & Biases: the runs of the group `{result.run_dir.name}`; offline, `wandb leet` shows them in the terminal.
"""


def _draw_learning_curves(result: ExperimentResult) -> "Figure":
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (quantity, unit) in enumerate((("loss", "mean cross-entropy per image"), ("accuracy", "share right"))):
        for column, (part, colour) in enumerate((("train", BLUE), ("validation", ORANGE))):
            plot = axes[row, column]
            curves = np.array([[epoch[f"{part}/{quantity}"] for epoch in fold.history] for fold in result.folds])
            epochs = [epoch["epoch"] for epoch in result.folds[0].history]
            mean, std = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(epochs))
            for number, curve in enumerate(curves):
                plot.plot(epochs, curve, color=colour, alpha=0.4, linewidth=0.8, label=None if number else "each fold")
            plot.plot(epochs, mean, color=colour, linewidth=2.5, marker=".", label="mean of the folds")
            plot.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.2, label="± standard deviation")
            if part == "train" and result.final:
                final = [epoch[f"train/{quantity}"] for epoch in result.final.history]
                plot.plot(epochs, final, color="black", linestyle="--", linewidth=1.2, label="final, on all images")
            title = "on the images trained on" if part == "train" else "on the fold held out (validation)"
            plot.set(title=title, ylabel=f"{quantity} ({unit})")
            plot.tick_params(labelleft=True)
            plot.grid(alpha=0.3)
            plot.legend()
    for plot in axes[1]:
        plot.set_xlabel("epoch")
        plot.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"Learning curves: {result.run_dir.name}")
    return figure


def _draw_per_class(folds: list[FitResult], final: FitResult) -> "Figure":
    classes = sorted(final.classes, key=lambda name: final.report[name]["f1-score"])
    figure = new_figure(8, 1.5 + 0.4 * len(classes))
    plot = figure.subplots()
    for place, name in enumerate(classes):
        scores = [fold.report[name]["f1-score"] for fold in folds]
        label = None if place else "each fold, on its own part"
        plot.plot(scores, [place] * len(scores), "o-", color=BLUE, alpha=0.6, markersize=5, label=label)
        test = final.report[name]["f1-score"]
        plot.plot(test, place, "D", color=ORANGE, markersize=8, label=None if place else "final, on the test images")
        plot.annotate(f"{test:.3f}", (test, place), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
    plot.set_yticks(range(len(classes)), classes)
    plot.set(ylim=(-0.6, len(classes) - 0.3), title="How well each class is recognised")
    plot.set(xlabel="F1 score (1 is best)", ylabel="class")
    plot.grid(alpha=0.3)
    plot.legend(loc="upper left")
    return figure


def _draw_confusion_matrix(final: FitResult) -> "Figure":
    counts = np.array(final.confusion)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    figure = new_figure(10, 9)
    plot = figure.subplots()
    image = plot.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            share = shares[row, column]
            colour = "white" if share > 50 else "black"
            plot.text(column, row, f"{count}\n{share:.1f} %", ha="center", va="center", color=colour, fontsize=8)
    plot.set_xticks(range(len(counts)), final.classes, rotation=45, ha="right")
    plot.set_yticks(range(len(counts)), final.classes)
    plot.set(xlabel="predicted class", ylabel="true class")
    plot.set_title("What is taken for what: test images, and their share of the true class")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure


def _draw_mistakes(mistakes: list[Mistake]) -> "Figure":
    columns, rows = 6, max(1, -(-len(mistakes) // 6))
    figure = new_figure(11, 0.8 + 2.3 * rows)
    figure.suptitle("The surest mistakes on the test images" if mistakes else "No mistake on the test images")
    for place, plot in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        plot.set_axis_off()
        if place < len(mistakes):
            mistake = mistakes[place]
            plot.imshow(mistake.image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            said = f"{mistake.predicted} ({100 * mistake.probability:.1f} %)"
            plot.set_title(f"is: {mistake.true}\ntaken for: {said}", fontsize=8)
    return figure
