"""The report of a run, report.html: written at its start, rewritten during training, complete at its end."""

from __future__ import annotations

import inspect
import io
import os
import shlex
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from comparison.index import write_index
from comparison.pair import PairComparison
from comparison.pair_page import pair_content
from data_files import PROJECT_DIR, resolve_path
from experiment.charts import draw_learning_curves
from experiment.errors import RunError, nonfatal
from experiment.files import relative_to_cwd
from experiment.formatting import display_name, format_duration, format_metric
from experiment.identity import HYPERPARAMETERS
from experiment.pages import render
from experiment.plots import displayed_pixels
from experiment.terminal import duration_line, print_line, show_page

if TYPE_CHECKING:
    from torch import nn

    from experiment.prepare import Experiment
    from experiment.results import ExperimentResult
    from experiment.run_directory import RunDirectory
    from experiment.training import Checkpoint

NAME = "report.html"
SCRIPTS = ("main_cnn.py", "main_tutorial.py")
FOLDERS = {"data_dir": "data", "runs_dir": "runs"}  # their defaults in the scripts
REPORT_SHARE = 0.008  # of the training time, for rewriting the report
INDEX_SHARE = 0.002  # and for rewriting the page of all runs
SECONDS_ALIVE = 60  # after which the report is rewritten even if no epoch is done
MIN_SILENCE = 600  # seconds without an update after which a page in the browser takes the run for killed
# Heading, description of the picture and caption of each figure.
FIGURES = {
    "per_class.png": (
        "F1 of each class",
        "Dot plot with one row per class",
        "F1 score of each class, the worst at the bottom: in each fold and on the test images.",
    ),
    "confusion_matrix.png": (
        "Confusion matrix",
        "Matrix of true and predicted classes",
        "Rows are the true classes, columns the predicted classes.",
    ),
    "mistakes.png": (
        "Most confident mistakes",
        "Test images with their true and predicted classes",
        "The wrong predictions on the test images in which the network was most confident.",
    ),
}


class _Budget:
    """Allows an action as often as it takes at most a share of the time.

    Parameters
    ----------
    share : float
    seconds : float
        About how long the action takes the first time.
    """

    def __init__(self, share: float, seconds: float) -> None:
        self._share, self._last = share, seconds
        self._started = time.monotonic()
        self._total = 0.0

    def allows_another(self) -> bool:
        """Return whether the share also suffices for the action once more."""
        return self._total + self._last <= self._share * (time.monotonic() - self._started)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the time that the action takes."""
        begin = time.monotonic()
        yield
        self._last = time.monotonic() - begin
        self._total += self._last


class Report:
    """The file report.html in a run's folder; it cannot end the run.

    Parameters
    ----------
    experiment : Experiment
    folder : RunDirectory
    model_class : callable
        Returns the network.
    """

    def __init__(self, experiment: Experiment, folder: RunDirectory, model_class: Callable[[], nn.Module]) -> None:
        self._experiment = experiment
        self._folder = folder
        self._model_class = model_class
        self._checkpoints: Mapping[str, Checkpoint] = {}
        self._seconds_left: float | None = None
        self._written = time.monotonic()
        self._longest_interval = 0.0  # between two epochs
        self._failed = self._index_failed = False
        self._budget, self._index_budget = _Budget(REPORT_SHARE, 0.05), _Budget(INDEX_SHARE, 0.1)
        self._display_id, self._is_displayed = uuid.uuid4().hex, False  # in a notebook

    def __enter__(self) -> Report:
        """Write the report, and the page of all runs."""
        self._write_unfinished("running")
        begin = time.monotonic()
        self._write_index()
        self._index_budget = _Budget(INDEX_SHARE, time.monotonic() - begin)
        if not self._failed:
            print_line(f"Report, which shows the progress: {relative_to_cwd(self._folder.path / NAME)}")
        return self

    def begin(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Show the epochs of a run that is resumed, given the checkpoint of each fit, by name."""
        self._checkpoints = checkpoints
        if any(checkpoint["history"] for checkpoint in checkpoints.values()):
            self._write_unfinished("running")

    def update(self, checkpoints: Mapping[str, Checkpoint], seconds_left: float | None) -> None:
        """Show the epochs that are done, if that takes no more than its share of the time.

        Parameters
        ----------
        checkpoints : mapping
            The last checkpoint of each fit, by name.
        seconds_left : float or None
            About how long the remaining epochs will take, if that is known.
        """
        self._checkpoints, self._seconds_left = checkpoints, seconds_left
        self._longest_interval = max(self._longest_interval, time.monotonic() - self._written)
        self._rewrite()

    def keep_alive(self) -> None:
        """Show that the run is still running, at most once a minute."""
        if time.monotonic() - self._written > SECONDS_ALIVE:
            if self._seconds_left is not None:
                self._seconds_left = max(1.0, self._seconds_left - (time.monotonic() - self._written))
            self._rewrite()

    def _rewrite(self) -> None:
        if self._budget.allows_another() and not self._failed:
            with self._budget.measure():
                self._write_unfinished("running")
        if self._index_budget.allows_another() and not self._index_failed:
            with self._index_budget.measure():
                self._write_index()

    def _write_index(self) -> None:
        """Write the page of all runs; after a failure, it is not tried again while the run is running."""
        self._index_failed = True
        with nonfatal("the page of all runs"):
            write_index(self._folder.path.parent)
            self._index_failed = False

    def finish(self, result: ExperimentResult, comparison: PairComparison | str, figures: Mapping[str, bytes]) -> bool:
        """Write the complete report; return whether that was possible.

        Parameters
        ----------
        result : ExperimentResult
        comparison : PairComparison or str
            How the run compares with its nearest run, or why it was not compared.
        figures : mapping
            The figures as PNG files, by file name.
        """
        with nonfatal(NAME):
            self._save(report_page(result, self._experiment, self._model_class, comparison, figures))
            return True
        return False

    def __exit__(self, exception_type: type[BaseException] | None, exception: BaseException | None, _: object) -> None:
        """After an error or an interruption, show which, and how to resume the run."""
        if exception is None or not self._folder.path.is_dir() or (self._folder.path / "results.json").exists():
            return
        if isinstance(exception, KeyboardInterrupt):
            number = exception.args[0] if exception.args else None
            self._write_unfinished("interrupted", getattr(number, "name", "SIGINT"))
        elif isinstance(exception, RunError):
            self._write_unfinished("failed", str(exception))
        else:  # the message could contain anything, also a secret
            self._write_unfinished("failed", f"{type(exception).__name__}. The terminal shows the details.")

    def _write_unfinished(self, state: str, reason: str = "") -> None:
        """Write the report of a run that has no results yet; after a failure, it is not tried again while it runs."""
        self._failed = True
        with nonfatal(NAME):
            experiment, silence = self._experiment, max(MIN_SILENCE, 4 * self._longest_interval)
            page = unfinished_page(
                experiment, self._folder.path, self._checkpoints, state, reason, self._seconds_left, silence
            )
            self._save(page)
            self._failed = False
        self._written = time.monotonic()

    def _save(self, page: bytes) -> None:
        """Write the report and, in a notebook, show it below the cell."""
        self._folder.save(NAME, page)
        with nonfatal("the report under the cell"):
            show_page(page, self._display_id, update=self._is_displayed)
            self._is_displayed = True


@contextmanager
def index_at_end(experiment: Experiment) -> Iterator[None]:
    """Write the page of all runs at the end, however the run ends."""
    try:
        yield
    finally:
        runs_dir = resolve_path(experiment.config.runs_dir)
        if os.path.isdir(runs_dir):  # Path.is_dir raises if the name is too long
            with nonfatal("the page of all runs"):
                write_index(runs_dir)


def unfinished_page(
    experiment: Experiment,
    run_dir: Path,
    checkpoints: Mapping[str, Checkpoint],
    state: str,
    reason: str = "",
    seconds_left: float | None = None,
    max_silence: float = MIN_SILENCE,
) -> bytes:
    """Return the report of a run without results.

    Parameters
    ----------
    experiment : Experiment
    run_dir : Path
    checkpoints : mapping
        The last checkpoint of each fit, by name; empty before training.
    state : str
        "running", "interrupted" or "failed".
    reason : str
        The signal that interrupted it, or how it failed.
    seconds_left : float, optional
    max_silence : float
        Seconds without an update after which the page in a browser takes the run for killed.
    """
    names = [fit.name for fit in experiment.fits]
    histories = {name: checkpoints[name]["history"] if checkpoints else [] for name in [*names[1:], names[0]]}
    epochs = experiment.config.to_dict()["epochs"]
    failures = [checkpoint["failure"] for checkpoint in checkpoints.values() if checkpoint["failure"]]
    fits = []
    for name, history in histories.items():
        last = history[-1] if history else {}
        accuracy = last.get("validation/accuracy", last.get("train/accuracy"))
        fit: dict[str, Any] = {"name": name, "done": len(history), "epochs": epochs}
        fit["accuracy"] = "" if accuracy is None else f"{accuracy:.4f}"
        if checkpoints and checkpoints[name]["failure"]:
            fit |= {"epochs": len(history), "accuracy": "diverged"}
        fits.append(fit)
    content = _common_content(experiment, run_dir, histories) | {
        "state": state,
        "reason": reason,
        "problems": failures,
        "max_silence": f"{max_silence:.0f}",
        "fits": fits,
        "epochs": epochs,
        "epochs_done": sum(fit["done"] for fit in fits),
        "epochs_total": sum(fit["epochs"] for fit in fits),
        "left": format_duration(seconds_left) if seconds_left else "",
    }
    return render("report.html.jinja", **content)


def report_page(
    result: ExperimentResult,
    experiment: Experiment,
    model_class: Callable[[], nn.Module],
    comparison: PairComparison | str,
    figures: Mapping[str, bytes],
) -> bytes:
    """Return the complete report; see `Report` and `Report.finish`."""
    histories = {fold.name: fold.history for fold in result.folds}
    if result.final:
        histories["final"] = result.final.history
    pair = None if isinstance(comparison, str) else comparison
    content = _common_content(experiment, result.run_dir, histories, pair) | {
        "state": "finished",
        "problems": list(result.failures.values()),
        "took": f"{duration_line(result).lower()}",
        "result": _result_content(result),
        "pair": pair_content(pair) if pair else None,
        "why_no_pair": "" if pair else comparison,
        "figures": _figures_content(result, figures),
        "doubtful_labels": _doubtful_labels_content(result),
        "without_rows": " and ".join(result.failures),
        "file_names": list(figures),
        "epoch_table": _epoch_table(result),
        "environment": _environment_rows(result.environment),
        "classify_command": _classify_command(result.run_dir, experiment.model.name, model_class),
        "in_wandb": bool(result.environment.get("wandb_run_ids")),
    }
    return render("report.html.jinja", **content)


def _common_content(
    experiment: Experiment, run_dir: Path, histories: Mapping[str, Any], pair: PairComparison | None = None
) -> dict[str, Any]:
    """Return what the report shows in every state, and that what it shows in only one of them is missing."""
    now = datetime.now().astimezone()
    config, network = experiment.config.to_dict(), experiment.model.name
    script = _script_name(network)
    loss = accuracy = ""
    if any(history for name, history in histories.items() if name != "final"):
        loss, accuracy = (draw_learning_curves(histories, metric) for metric in ("loss", "accuracy"))
    started = experiment.environment["started"]
    with suppress(ValueError):
        started = f"{datetime.fromisoformat(started).astimezone():%Y-%m-%d %H:%M}"
    command = _repeat_command(script, config, experiment.environment) if script else ""
    resume_command = command
    if command and not config.get("resume", True):
        resume_command += " --resume True"
    return {
        "title": f"{network} on {config['dataset']}",
        "name": run_dir.name,
        "started": started,
        "took": "",
        "updated": f"{now:%H:%M:%S}",
        "updated_seconds": f"{now.timestamp():.0f}",
        "max_silence": MIN_SILENCE,
        "result": None,
        "pair": None,
        "network": network,
        "repeat_command": command,
        "resume_command": resume_command,
        "constants": _constants(config, experiment.environment),
        "loss_curves": loss,
        "accuracy_curves": accuracy,
        "has_final_curve": bool(histories.get("final")),
        "parameters": f"{experiment.model.parameters:,}",
        "printed": experiment.model.printed,
        "nearest_name": pair.before.path.name if pair else "",
        "settings": _settings_rows(config, experiment.environment, pair),
        "environment": _environment_rows(experiment.environment),
    }


def _values_to_repeat(config: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return every hyperparameter, because the script may be edited later, and where it was computed."""
    values = {name: config[name] for name in HYPERPARAMETERS}
    values |= {name: environment[name] for name in ("device", "precision")}
    return values | {"image_shape": tuple(values["image_shape"])}


def _repeat_command(script: str, config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the command that repeats the run; with RESUME, it resumes the run while this is unfinished."""
    values = _values_to_repeat(config, environment)
    values["image_shape"] = "x".join(map(str, values["image_shape"]))
    for name, default in FOLDERS.items():
        if name in config and resolve_path(config[name]) != PROJECT_DIR / default:
            values[name] = config[name]
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in values.items()]
    return " ".join(["python", script, *options])


def _constants(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    values = _values_to_repeat(config, environment)
    return "\n".join(f"{name.upper()} = {value!r}" for name, value in values.items())


def _script_name(network_name: str) -> str | None:
    """Return the running script, or else the script that imports the network; None for the user's own."""
    running = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if running in SCRIPTS:
        return running
    for script in SCRIPTS:
        if _file_contains(PROJECT_DIR / script, f"import {network_name}\n"):
            return script
    return None


def _file_contains(path: Path, line: str) -> bool:
    return path.is_file() and line in path.read_text(encoding="utf-8", errors="replace")


def _classify_command(run_dir: Path, network_name: str, model_class: Callable[[], nn.Module]) -> str:
    command = f"python classify.py picture.png --run {shlex.quote(run_dir.name)}"
    if run_dir.parent != PROJECT_DIR / "runs":
        command += f" --runs-dir {shlex.quote(str(run_dir.parent))}"
    is_named_function = inspect.isfunction(model_class) and model_class.__qualname__.isidentifier()
    if is_named_function or not _file_contains(PROJECT_DIR / "models.py", f"class {network_name}("):
        command += f" --network {shlex.quote(_file_and_name(network_name, model_class))}"
    return command


def _file_and_name(network_name: str, model_class: Callable[[], nn.Module]) -> str:
    """Return where the class or function of a network is, as classify.py takes it; "file.py" if no file is known."""
    name = getattr(model_class, "__qualname__", "")
    if not name.isidentifier():  # a lambda, a functools.partial, or what is defined inside a function
        return f"file.py:{network_name}"
    file = getattr(sys.modules.get(model_class.__module__), "__file__", None)
    if file is None:  # a notebook
        return f"file.py:{name}"
    path = Path(file).resolve()
    return f"{path.relative_to(PROJECT_DIR) if path.is_relative_to(PROJECT_DIR) else path}:{name}"


def _settings_rows(
    config: Mapping[str, Any], environment: Mapping[str, Any], pair: PairComparison | None
) -> list[dict[str, Any]]:
    values = _values_to_repeat(config, environment)
    values |= {"threads": environment.get("threads_per_fit"), "workers": environment.get("workers")}
    rows = []
    for name, value in values.items():
        if value is None:
            continue
        there = getattr(pair.before.identity, name, "") if pair else ""
        row_name = name if name == "threads" else name.upper()
        differs = there != "" and _plain(value) != _plain(there)
        rows.append({"name": row_name, "value": str(value), "there": str(there), "differs": differs})
    return rows


def _plain(value: Any) -> Any:
    """Return a value as JSON stores it, where a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def _result_content(result: ExperimentResult) -> dict[str, Any]:
    content: dict[str, Any] = {"test": None, "classes": [], "mean": None}
    content["folds"] = [
        {"name": fold.name, "accuracy": f"{fold.accuracy:.4f}", "loss": format_metric(fold.loss)}
        for fold in result.folds
    ]
    mean = result.cross_validation
    if mean:
        content["mean"] = {
            metric: f"{format_metric(mean[f'{metric}_mean'])} ± {format_metric(mean[f'{metric}_std'])}"
            for metric in ("accuracy", "loss")
        }
    if result.final:
        images = int(result.final.report["macro avg"]["support"])
        content["test"] = {
            "accuracy": f"{result.final.accuracy:.4f}",
            "loss": format_metric(result.final.loss),
            "images": f"{images:,}",
        }
        for name, row in result.final.report.items():
            if isinstance(row, dict):
                scores = {"precision": row["precision"], "recall": row["recall"], "f1": row["f1-score"]}
                cells = {score: f"{value:.4f}" for score, value in scores.items()}
                content["classes"].append({"name": display_name(name), "support": f"{row['support']:,.0f}"} | cells)
    return content


def _figures_content(result: ExperimentResult, figures: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the figures that the page contains; learning curves and comparison are drawn by the page itself."""
    content = []
    for name, (heading, description, caption) in FIGURES.items():
        if name in figures:
            if name == "mistakes.png" and result.is_light_on_dark and result.mistakes:
                caption += " The images are light on dark; they are drawn dark on light."
            alt = f"{description}. {_figure_summary(name, result)}"
            figure_id = name.removesuffix(".png")
            content.append({"id": figure_id, "heading": heading, "alt": alt, "caption": caption, "png": figures[name]})
    return content


def _doubtful_labels_content(result: ExperimentResult) -> list[dict[str, Any]]:
    return [
        {
            "name": doubtful.name,
            "label": display_name(doubtful.label),
            "predicted": display_name(doubtful.predicted),
            "probability": _percentage(doubtful.probability),
            "png": _png_of_pixels(displayed_pixels(doubtful.image, result.is_light_on_dark)),
        }
        for doubtful in result.doubtful_labels
    ]


def _percentage(probability: float) -> str:
    return "< 0.01 %" if probability < 0.0001 else f"{100 * probability:.2g} %"


def _png_of_pixels(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    return png.getvalue()


def _figure_summary(name: str, result: ExperimentResult) -> str:
    """Return what a figure of the final network shows, in words."""
    final = result.final
    if final is None:
        return ""
    classes = final.classes
    if name == "per_class.png":
        best_first = sorted(classes, key=lambda each: -final.report[each]["f1-score"])
        best, worst = (
            f"{display_name(each)} {final.report[each]['f1-score']:.3f}" for each in (best_first[0], best_first[-1])
        )
        return f"Best on the test images: {best}; worst: {worst}."
    if name == "confusion_matrix.png":
        mistakes = []
        for true, row in zip(classes, final.confusion, strict=True):
            mistakes += [
                (count, true, predicted) for predicted, count in zip(classes, row, strict=True) if predicted != true
            ]
        count, true, predicted = max(mistakes, default=(0, "", ""))
        if not count:
            return "No class is confused with another."
        images = "1 image" if count == 1 else f"{count} images"
        return f"Most frequent confusion: {images} of {display_name(true)} predicted as {display_name(predicted)}."
    shown = [
        f"{display_name(each.true)} predicted as {display_name(each.predicted)} ({100 * each.probability:.1f} %)"
        for each in result.mistakes[:6]
    ]
    return f"{len(result.mistakes)} images; the first: {'; '.join(shown)}." if shown else "There are no mistakes."


def _epoch_table(result: ExperimentResult) -> dict[str, list[Any]]:
    """Return the means over the folds after each epoch, also of metrics that the user added to `run_epoch`."""
    histories = [fold.history for fold in result.folds]
    standard = {"train/loss": "training loss", "train/accuracy": "training accuracy"}
    standard |= {"validation/loss": "validation loss", "validation/accuracy": "validation accuracy"}
    recorded = dict.fromkeys(name for history in histories for epoch in history for name in epoch)
    own = {name: name for name in recorded if name not in {"epoch", "learning_rate", *standard}}
    columns = standard | own
    rows = []
    for epochs in zip(*histories, strict=True):
        means = [_mean_of_epoch(epochs, name) for name in columns]
        rows.append([f"{epochs[0]['epoch']}", *means])
    return {"columns": ["epoch", *columns.values()], "rows": rows}


def _mean_of_epoch(epochs: Sequence[Mapping[str, float]], name: str) -> str:
    """Return the mean of a metric over the folds that have it in an epoch, or a dash if none has."""
    values = [epoch[name] for epoch in epochs if name in epoch]
    return format_metric(statistics.fmean(values)) if values else "–"


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if name in ("seconds", "wandb_run_ids", "started") or not value:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        rows.append((name.replace("_", " "), str(value)))
    return rows
