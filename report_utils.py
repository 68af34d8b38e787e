"""What the user sees and keeps: progress and tables in the terminal, results files on disk.

Everything here takes plain dicts and numbers, as they stand in results.json; nothing here computes a result.
"""

import io
import json
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import joblib
import pydantic
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor
from tqdm import tqdm
from wandb.errors import AuthenticationError

PER_CLASS = "{:<{width}}{:>11}{:>9}{:>9}"


class ConfigurationError(ValueError):
    """A setting does not fit the data."""


class RunError(RuntimeError):
    """The run cannot go on; the message says what to do."""


@dataclass
class FitResult:
    """What a fit came to. `history` has a dict an epoch; the last two are of the images that it was evaluated on."""

    name: str
    loss: float
    accuracy: float
    report: dict[str, Any]
    history: list[dict[str, float]]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds of this fit."""
        return {name: getattr(self, name) for name in ("name", "loss", "accuracy", "report", "history")}


@dataclass
class ExperimentResult:
    """What a run came to; ``to_dict()`` is the content of results.json, which lies in `run_dir`."""

    config: dict[str, Any]
    folds: list[FitResult]
    final: FitResult
    environment: dict[str, Any]
    run_dir: Path

    @property
    def cross_validation(self) -> dict[str, float]:
        """Mean and sample standard deviation (ddof = 1) over the folds of loss, accuracy and averages."""
        values = {
            "accuracy": [fold.accuracy for fold in self.folds],
            "loss": [fold.loss for fold in self.folds],
            "macro_f1": [fold.report["macro avg"]["f1-score"] for fold in self.folds],
            "weighted_f1": [fold.report["weighted avg"]["f1-score"] for fold in self.folds],
        }
        means = {f"{name}_mean": statistics.fmean(of_folds) for name, of_folds in values.items()}
        return means | {f"{name}_std": statistics.stdev(of_folds) for name, of_folds in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "config": self.config,
            "folds": [fold.to_dict() for fold in self.folds],
            "final": self.final.to_dict(),
            "cross_validation": self.cross_validation,
            "environment": self.environment,
        }


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C meanwhile: processes started here inherit that, so that only the parent answers to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a mistake of the user's, or an interruption, into one message and the right exit status.

    Status 2 is a bad configuration, 1 a failed run, 128 + the signal's number an interruption. Errors of the program
    itself keep their traceback.
    """
    previous = _handle_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a file on Windows may have no character for a table's lines
    try:
        yield
    except pydantic.ValidationError as error:
        lines = [
            f"{str(e['loc'][0]).upper()} is missing" if e["type"] == "missing" else e["msg"] for e in error.errors()
        ]
        _fail(2, "Bad configuration:\n" + "\n".join(f"  {line}" for line in lines))
    except (ConfigurationError, AuthenticationError) as error:
        _fail(2, f"Bad configuration:\n  {error}")
    except (OSError, RunError) as error:
        _fail(1, f"The run failed: {error}")
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        _fail(128 + int(number), f"Stopped by {signal.Signals(number).name}.")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handle_signals() -> dict[int, Any]:
    """Let SIGTERM end the run as Ctrl-C does; return the handlers that were there (none outside the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    return {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}


def _fail(status: int, message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


def evaluate(
    name: str,
    history: list[dict[str, float]],
    evaluation: tuple[float, Tensor, Tensor],
    class_names: dict[int, str],
) -> FitResult:
    """Compute a fit's figures.

    Parameters
    ----------
    name : str
    history : list of dict
        The metrics of each epoch.
    evaluation : tuple
        Mean loss, labels (N,) and class probabilities (N, classes), as `test_loop` returns them.
    class_names : dict
        Label → name of the classes that occur in the data set: a class without any image has no row.
    """
    loss, labels, probabilities = evaluation
    predictions = probabilities.argmax(1)
    present = list(class_names)
    report = classification_report(
        labels,
        predictions,
        labels=present,
        target_names=list(class_names.values()),
        output_dict=True,
        zero_division=0,
    )
    report.pop("micro avg", None)  # stands in for the accuracy where a class was predicted that does not occur
    accuracy = report["accuracy"] = (predictions == labels).double().mean().item()
    return FitResult(
        name, loss, accuracy, report, history, confusion_matrix(labels, predictions, labels=present).tolist()
    )


class Progress:
    """One bar over all epochs of all fits (only in a terminal) and one table row a finished round of epochs."""

    def __init__(self, fits: int, epochs: int) -> None:
        self.started = time.monotonic()
        self._bar = tqdm(
            total=fits * epochs, unit="epoch", disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0
        )
        self._print("\n epoch │ train loss │ train accuracy │ validation accuracy │ time   (means over the folds)")
        self._print("───────┼────────────┼────────────────┼─────────────────────┼────────")

    def step(self, fit_name: str, metrics: dict[str, float]) -> None:
        """Move the bar by one epoch of one fit."""
        accuracy = metrics.get("validation/accuracy", metrics["train/accuracy"])
        self._bar.set_postfix_str(
            f"{fit_name}: loss {metrics['train/loss']:.3f}, accuracy {accuracy:.4f}", refresh=False
        )
        self._bar.update()

    def row(self, epoch: int, rows: list[dict[str, float]]) -> None:
        """Print the table's row of an epoch from the folds' metrics."""
        loss, train, validation = (
            [row[name] for row in rows] for name in ("train/loss", "train/accuracy", "validation/accuracy")
        )
        self._print(
            f"{epoch:>6} │ {statistics.fmean(loss):>10.4f} │ {statistics.fmean(train):>14.4f} │ "
            f"{statistics.fmean(validation):>10.4f} ± {statistics.stdev(validation):.4f} │ "
            f"{format_seconds(time.monotonic() - self.started):>7}"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def describe_environment(**resolved: Any) -> dict[str, Any]:
    """Return what two runs of one configuration may differ in: time, machine, versions, and what `resolved` adds."""
    versions = {
        name: metadata.version(name) for name in ("torch", "torchvision", "scikit-learn", "wandb", "numpy", "joblib")
    }
    return resolved | {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | versions,
    }


def print_summary(result: ExperimentResult) -> None:
    """Print the tables of a finished run."""
    results = result.to_dict()
    config, environment, final = results["config"], results["environment"], results["final"]
    print("\nHyperparameters")
    for name in ("dataset", "folds", "epochs", "batch_size", "learning_rate", "lr_schedule", "rng_seed"):
        print(f"  {name.upper():<15}{config[name]}")
    print(f"  on {environment['device']} in {environment['precision']}, {environment['workers']} workers")

    report = {name: row for name, row in final["report"].items() if isinstance(row, dict)}
    width = max(len(name) for name in report) + 2
    images = int(report["macro avg"]["support"])
    print(f"\nTest set, {images:,} images\n  " + PER_CLASS.format("class", "precision", "recall", "F1", width=width))
    for name, row in report.items():
        figures = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1-score"))
        print("  " + PER_CLASS.format(name, *figures, width=width))
    print(f"  accuracy {final['accuracy']:.4f} · loss {final['loss']:.4f} (mean cross-entropy an image)")

    print("\nCross-validation\n  fold      accuracy     loss")
    for fold in results["folds"]:
        print(f"  {fold['name']:<10}{fold['accuracy']:>8.4f}{fold['loss']:>9.4f}")
    summary = results["cross_validation"]
    print(f"  accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f}", end=" · ")
    print(f"loss {summary['loss_mean']:.4f} ± {summary['loss_std']:.4f} (mean ± standard deviation)")
    print(f"\nTime taken: {format_seconds(environment['seconds'])}")
    print(f"Results: {path_from_here(result.run_dir / 'results.json')}")


def save_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` make a temporary file beside `path`, put it on the disk for good, and rename it to `path`.

    Whoever reads `path`, at any moment and after any crash, finds the old file whole or the new file whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        write(str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON, atomically, numbers at full precision."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    save_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def make_run_dir(runs_dir: Path, name: str) -> Path:
    """Make and return a new ``<name>-<time>`` in runs_dir; two runs that start at once never share one."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = runs_dir / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def format_seconds(seconds: float) -> str:
    """Return a duration as 42 s, 3:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def path_from_here(path: Path) -> str:
    """Return the path relative to the working directory, or as it is where that would be more roundabout."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive, on Windows
        return str(path)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative
