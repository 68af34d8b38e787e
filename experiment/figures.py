"""The pictures and report.md of a run, as the bytes of files."""

import io
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_utils import PROJECT_DIR
from experiment.console import History, display_name, final_text, folds_text, time_text
from experiment.errors import beside_the_run
from experiment.results import ExperimentResult, FitResult, Mistake
from experiment.settings import HYPERPARAMETERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with any colour vision (Okabe and Ito, 2008)
Look = dict[str, Any]

# How things look, as keyword arguments of matplotlib's.
FOLD_CURVE: Look = {"linewidth": 0.9, "alpha": 0.45, "marker": "."}
MEAN_CURVE: Look = {"linewidth": 2.5, "marker": "o", "markersize": 5}
FINAL_CURVE: Look = {"color": "black", "linestyle": "--", "linewidth": 1.3, "marker": "."}
FOLD_SCORES: Look = {"color": BLUE, "alpha": 0.6, "marker": "o", "markersize": 5}
TEST_SCORE: Look = {"color": ORANGE, "linestyle": "none", "marker": "D", "markersize": 8}
ABOVE_ITS_POINT: Look = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
IN_A_CELL: Look = {"ha": "center", "va": "center", "fontsize": 8}
SLANTING: Look = {"rotation": 45, "ha": "right"}
GRID: Look = {"alpha": 0.3}
BELOW_THE_PANELS: Look = {"loc": "outside lower center"}
LARGE_RANGE = 20  # of the largest loss to the smallest, from which on their scale is logarithmic
MOST_OF_THE_TIME = 0.01  # that may go into drawing while the fits learn
SCRIPTS = ("main_cnn.py", "main_tutorial.py")
CAPTIONS = {
    "learning_curves.png": "Loss (left) and accuracy (right) after each epoch. Where training goes on getting better "
    "and validation does not, the network learns its training images by heart.",
    "per_class.png": "How well each class is recognised, the worst at the bottom: the folds' spread, and the test.",
    "confusion_matrix.png": "What is taken for what: rows are what an image is, columns what the network took it for.",
    "mistakes.png": "The wrong answers on the test images that the network was surest of, the surest first.",
    "compare.png": "What changed against the nearest earlier run: each fold's difference, their mean, and the interval "
    "in which the true one lies 95 times of 100. An interval that does not touch the line is a difference.",
}


def draw_figures(result: ExperimentResult) -> dict[str, bytes]:
    """Return the figures of a run as PNG files, by name; they need no display."""
    return {name: png_of(figure) for name, figure in make_figures(result).items()}


def make_figures(result: ExperimentResult) -> dict[str, "Figure"]:
    """Return the figures of a run, by the names of their files.

    Without a final result there are only the learning curves, without any there is nothing.
    """
    figures = {}
    if result.folds:
        histories = {fit.name: fit.history for fit in result.folds}
        if result.final:
            histories["final"] = result.final.history
        figures["learning_curves.png"] = draw_learning_curves(histories)
    if result.final:
        figures["per_class.png"] = _draw_per_class(result.folds, result.final)
        figures["confusion_matrix.png"] = _draw_confusion_matrix(result.final)
        figures["mistakes.png"] = _draw_mistakes(result.mistakes)
    return figures


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: "Figure", dpi: float = 110) -> bytes:
    """Return a figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


class GrowingCurves:
    """learning_curves.png, drawn anew while the fits learn, as often as that takes a hundredth of the time at most.

    Parameters
    ----------
    save : callable
        Saves a file, given its name and its bytes.
    """

    def __init__(self, save: Callable[[str, bytes], None]) -> None:
        self._save = save
        self._started = time.monotonic()
        self._spent = 0.0
        self._last = 1.0  # seconds that it took the last time; at first, about what it takes to import matplotlib

    def draw(self, histories: dict[str, History]) -> None:
        """Draw what the fits have done until now, if there is time."""
        began = time.monotonic()
        if self._spent + self._last > MOST_OF_THE_TIME * (began - self._started):
            return
        with beside_the_run("learning_curves.png for now"):
            self._save("learning_curves.png", png_of(draw_learning_curves(histories)))
        self._last = time.monotonic() - began
        self._spent += self._last


def draw_learning_curves(histories: dict[str, History]) -> "Figure":
    """Draw loss and accuracy after each epoch, in training and in validation: folds thin, their mean thick.

    Parameters
    ----------
    histories : dict
        A dict an epoch, of one epoch at least, of each fold; and of "final" as far as that has been trained.
    """
    figure = new_figure(11, 4.8)
    panels = figure.subplots(1, 2)
    folds = [history for name, history in histories.items() if name != "final"]
    epochs_of_all = min(len(history) for history in folds)
    for panel, quantity, unit in zip(
        panels, ("loss", "accuracy"), ("mean cross-entropy an image", "share right"), strict=True
    ):
        for part, colour, what in (
            ("train", BLUE, "training (while it learns)"),
            ("validation", ORANGE, "validation (the part held out)"),
        ):
            _plot_folds(panel, [[row[f"{part}/{quantity}"] for row in fold] for fold in folds], colour)
            mean = np.mean([[row[f"{part}/{quantity}"] for row in fold[:epochs_of_all]] for fold in folds], axis=0)
            epochs = range(1, epochs_of_all + 1)
            panel.plot(epochs, mean, color=colour, label=f"mean: {what}", **MEAN_CURVE)
        final = [row[f"train/{quantity}"] for row in histories.get("final", [])]
        if final:
            epochs = range(1, len(final) + 1)
            panel.plot(epochs, final, label="final fit: training, on all images", **FINAL_CURVE)
        panel.set(title=quantity, xlabel="epoch", ylabel=f"{quantity} ({unit})")
        if quantity == "loss":
            _show_small_losses(panel)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(**GRID)
    if max(len(history) for history in histories.values()) == 1:
        for panel in panels:
            panel.set(xlim=(0.5, 1.5), xticks=[1])
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=4, **BELOW_THE_PANELS)
    return figure


def _show_small_losses(panel: "Axes") -> None:
    """Make the scale logarithmic where the largest loss would press the smallest, and the gap in it, to the floor."""
    losses = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in panel.get_lines()])
    finite = losses[np.isfinite(losses)]
    if finite.size and 0 < LARGE_RANGE * finite.min() < finite.max():
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")


def _plot_folds(panel: "Axes", curves: list[list[float]], colour: str) -> None:
    for number, curve in enumerate(curves):
        label = "each fold" if number == 0 and colour == BLUE else None
        panel.plot(range(1, len(curve) + 1), curve, color=colour, label=label, **FOLD_CURVE)


def _draw_per_class(folds: list[FitResult], final: FitResult) -> "Figure":
    classes = sorted(final.classes, key=lambda name: final.report[name]["f1-score"])
    figure = new_figure(8, 1.5 + 0.4 * len(classes))
    plot = figure.subplots()
    for place, name in enumerate(classes):
        scores = [fold.report[name]["f1-score"] for fold in folds]
        label = None if place else "each fold, on its own part"
        plot.plot(scores, [place] * len(scores), label=label, **FOLD_SCORES)
        test = final.report[name]["f1-score"]
        plot.plot(test, place, label=None if place else "final, on the test images", **TEST_SCORE)
        plot.annotate(f"{test:.3f}", (test, place), **ABOVE_ITS_POINT)
    plot.set_yticks(range(len(classes)), [display_name(name) for name in classes])
    plot.set(ylim=(-0.6, len(classes) - 0.3), title="How well each class is recognised")
    plot.set(xlabel="F1 score (1 is best)", ylabel="class")
    plot.grid(**GRID)
    figure.legend(*plot.get_legend_handles_labels(), ncols=2, **BELOW_THE_PANELS)
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
            plot.text(column, row, f"{count}\n{share:.1f} %", color=colour, **IN_A_CELL)
    names = [display_name(name) for name in final.classes]
    plot.set_xticks(range(len(counts)), names, **SLANTING)
    plot.set_yticks(range(len(counts)), names)
    plot.set(xlabel="predicted class", ylabel="true class")
    plot.set_title("What is taken for what: test images, and their share of the true class")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure


def _draw_mistakes(mistakes: list[Mistake]) -> "Figure":
    columns = 6
    rows = max(1, -(-len(mistakes) // columns))
    figure = new_figure(11, 0.8 + 2.3 * rows)
    figure.suptitle("The surest mistakes on the test images" if mistakes else "No mistake on the test images")
    plots = figure.subplots(rows, columns, squeeze=False).flat
    for plot in plots:
        plot.set_axis_off()
    for plot, mistake in zip(figure.axes, mistakes, strict=False):
        plot.imshow(mistake.image.numpy(), cmap="gray_r", vmin=0, vmax=255)
        said = f"{display_name(mistake.predicted)} ({100 * mistake.probability:.1f} %)"
        plot.set_title(f"is: {display_name(mistake.true)}\ntaken for: {said}", fontsize=8)
    return figure


def report_text(result: ExperimentResult, network: dict[str, Any], comparison: str, figures: list[str]) -> str:
    """Return report.md: the result in a line, the command that repeats it, the tables, and the figures of these names.

    Parameters
    ----------
    result : ExperimentResult
    network : dict
        As `Network.to_dict` has it.
    comparison : str
        How the run compares with an earlier one; "" if it is the first.
    figures : list of str
    """
    parts = [f"# {result.run_dir.name}", _result_in_a_line(result)]
    parts += _how_to_repeat(result, network["name"])
    if comparison:
        parts += ["## Did it help?", _fenced(comparison)]
        parts += [_picture(name) for name in figures if name == "compare.png"]
    parts += ["## Results", _fenced(folds_text(result))]
    if result.final:
        parts.append(_fenced(final_text(result.final)))
    parts += [f"- {reason}" for reason in result.failures.values()]
    parts.append(time_text(result) + ".")
    parts += ["## Epochs", _table_of_epochs(result)]
    parts += ["## Pictures", *[_picture(name) for name in figures if name != "compare.png"]]
    parts += [f"## Network: {network['weights']:,} weights", _fenced(network["printed"])]
    parts += ["## Machine", _table_of_environment(result.environment)]
    parts += ["## More", _list_of_files(result, network["name"])]
    return "\n\n".join(parts) + "\n"


def _result_in_a_line(result: ExperimentResult) -> str:
    line = "No final fit."
    if result.final:
        line = f"Test accuracy **{result.final.accuracy:.4f}**, loss {result.final.loss:.4f}."
    summary = result.cross_validation
    if summary:
        line += (
            f" Over {len(result.folds)} folds: accuracy {summary['accuracy_mean']:.4f} ± "
            f"{summary['accuracy_std']:.4f}, loss {summary['loss_mean']:.4f} ± {summary['loss_std']:.4f} "
            "(± standard deviation)."
        )
    return line


def _how_to_repeat(result: ExperimentResult, network_name: str) -> list[str]:
    """Return the command with every hyperparameter, since the script may be edited tomorrow; or these as constants."""
    values = {name: result.config[name] for name in HYPERPARAMETERS}
    values |= {name: result.environment[name] for name in ("device", "precision")}
    script = _script_of(network_name)
    if script is None:
        constants = [f"{name.upper()} = {value!r}" for name, value in values.items()]
        return [f"The same again: {network_name}, with these constants:", _fenced("\n".join(constants))]
    options = [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]
    return ["The same again:", _fenced(" ".join(["python", script, *options]))]


def _script_of(network_name: str) -> str | None:
    """Return the script that is running; else the one that trains the network of that name; None for a user's own."""
    running = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if running in SCRIPTS:
        return running
    for script in SCRIPTS:
        if _stands_in(PROJECT_DIR / script, f"import {network_name}\n"):
            return script
    return None


def _stands_in(path: Path, text: str) -> bool:
    return path.is_file() and text in path.read_text(encoding="utf-8", errors="replace")


def _table_of_epochs(result: ExperimentResult) -> str:
    """Return the means over the folds after each epoch."""
    lines = [
        "| epoch | training: loss | accuracy | validation: loss | accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rows in zip(*(fold.history for fold in result.folds), strict=True):
        means = [
            f"{np.mean([row[name] for row in rows]):.4f}"
            for name in ("train/loss", "train/accuracy", "validation/loss", "validation/accuracy")
        ]
        lines.append(f"| {rows[0]['epoch']} | {' | '.join(means)} |")
    return "\n".join(lines)


def _table_of_environment(environment: dict[str, Any]) -> str:
    lines = ["| what | value |", "| --- | --- |"]
    for name, value in environment.items():
        if name == "seconds" or not value:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        lines.append(f"| {name.replace('_', ' ')} | {value} |")
    return "\n".join(lines)


def _list_of_files(result: ExperimentResult, network_name: str) -> str:
    lines = ["- `results.json`: every figure at full precision; `config.json`: what was asked."]
    if result.final:
        lines.append("- `model.pt`: the weights of the final network, for `load_state_dict`.")
        command = _command_that_classifies(result.run_dir, network_name)
        lines.append(f"- `{command}` asks the final network about a picture of yours.")
    if result.environment["wandb_run_ids"]:
        lines.append(f"- In Weights & Biases: the runs of the group `{result.run_dir.name}`.")
    return "\n".join(lines)


def _command_that_classifies(run_dir: Path, network_name: str) -> str:
    command = f"python -m experiment.classify picture.png --run {run_dir.name}"
    if run_dir.parent != PROJECT_DIR / "runs":
        command += f" --runs-dir {shlex.quote(str(run_dir.parent))}"
    if not _stands_in(PROJECT_DIR / "models.py", f"class {network_name}("):
        command += f" --network file.py:{network_name}"
    return command


def _picture(name: str) -> str:
    return f"![{name}]({name})\n\n{CAPTIONS[name]}"


def _fenced(text: str) -> str:
    return f"```\n{text}\n```"
