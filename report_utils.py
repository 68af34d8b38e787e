"""What the user sees and keeps: progress and tables in the terminal, results files on disk.

Nothing here trains or evaluates a network. What a run came to is worked out here from its predictions.
"""

import atexit
import gc
import hashlib
import io
import json
import os
import platform
import signal
import statistics
import sys
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pydantic
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor
from tqdm import tqdm
from wandb.errors import AuthenticationError

PER_CLASS = "{:<{width}}{:>11}{:>9}{:>9}"
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with any colour vision (Okabe and Ito, 2008)
FIGURES = ("learning_curves.png", "per_class.png", "confusion_matrix.png", "mistakes.png")

atexit.register(gc.freeze)  # Python's last collection would search all that was imported, and a run end a second later


class ConfigurationError(ValueError):
    """A setting does not fit the data."""


class RunError(RuntimeError):
    """The run cannot go on; the message says what to do."""


@dataclass
class FitResult:
    """What a fit came to: `history` has a dict an epoch, all else is of the images that the fit was evaluated on.

    `confusion` counts images by true class (row) and predicted class (column), in the order of the report's classes.
    """

    name: str
    loss: float
    accuracy: float
    report: dict[str, Any]
    history: list[dict[str, float]]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds of this fit."""
        return {name: getattr(self, name) for name in ("name", "loss", "accuracy", "report", "history")}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the report and of `confusion`."""
        return [name for name, row in self.report.items() if isinstance(row, dict) and not name.endswith(" avg")]


@dataclass
class Mistake:
    """A test image (uint8, 28×28) that the final network takes for something else, and how sure it is of that."""

    image: Tensor
    true: str
    predicted: str
    probability: float


@dataclass
class ExperimentResult:
    """What a run came to; ``to_dict()`` is the content of results.json, which lies in `run_dir`.

    `failures` says of each fit that diverged what happened; such a fit is not among the folds, or final is None.
    """

    config: dict[str, Any]
    folds: list[FitResult]
    final: FitResult | None
    failures: dict[str, str]
    mistakes: list[Mistake]
    environment: dict[str, Any]
    run_dir: Path

    @property
    def cross_validation(self) -> dict[str, float]:
        """Mean and sample standard deviation (ddof = 1) over the folds of loss, accuracy and averages.

        Empty where all folds but one, or all, have failed.
        """
        if len(self.folds) < 2:
            return {}
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
            "final": self.final and self.final.to_dict(),
            "failures": self.failures,
            "cross_validation": self.cross_validation,
            "environment": self.environment,
        }


@contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Answer to Ctrl-C only after this; processes started here never do, so that only the parent answers to it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # on its first start, which comes with the workers', it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # if it were ignored, it would be lost
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a mistake of the user's, or an interruption, into one message and the right exit status.

    Status 2 is a bad configuration, 1 a failed run, 128 + the signal's number an interruption. Errors of the program
    itself keep their traceback.
    """
    previous, thread_hook = _handle_signals(), threading.excepthook
    threading.excepthook = _report_unless_lokys
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a file on Windows may have no character for a table's lines
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\d+ tasks ", UserWarning)  # joblib's, of what a stopped run cuts off
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
        threading.excepthook = thread_hook
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handle_signals() -> dict[int, Any]:
    """Let SIGTERM end the run as Ctrl-C does; return the handlers that were there (none outside the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    return {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}


def _report_unless_lokys(error: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, but not that of loky's which misses the work that a stopping run took from it."""
    lokys = error.thread is not None and error.thread.name == "ExecutorManagerThread"
    if not (lokys and error.exc_type is KeyError):
        threading.__excepthook__(error)


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


def find_mistakes(
    images: Tensor, labels: Tensor, probabilities: Tensor, class_names: list[str], most: int = 24
) -> list[Mistake]:
    """Return the wrongly classified images, those first that the network is most sure of.

    Parameters
    ----------
    images, labels, probabilities : Tensor
        uint8 (N, 28, 28), int64 (N,) and float32 (N, classes).
    class_names : list of str
        Name of each label.
    most : int
        How many at most.
    """
    sureness, predictions = probabilities.max(1)
    wrong = (predictions != labels).nonzero().flatten()
    order = wrong[sureness[wrong].argsort(descending=True, stable=True)][:most]
    return [
        Mistake(images[i], class_names[labels[i]], class_names[predictions[i]], sureness[i].item())
        for i in order.tolist()
    ]


class Progress:
    """One bar over all epochs of all fits (only in a terminal) and a table row an epoch that all folds have done."""

    def __init__(self, epochs: int, done: int) -> None:
        self.started, self._rows = time.monotonic(), 0
        self._bar = tqdm(
            total=epochs,
            initial=done,
            unit="epoch",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0,
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

    def rows(self, checkpoints: dict[str, dict[str, Any]]) -> None:
        """Print a table row for each further epoch that all folds have done, but for those that have diverged."""
        histories = [one["history"] for name, one in checkpoints.items() if name != "final" and not one["failure"]]
        while histories and min(map(len, histories)) > self._rows:
            self._row(self._rows + 1, [history[self._rows] for history in histories])
            self._rows += 1

    def _row(self, epoch: int, rows: list[dict[str, float]]) -> None:
        loss, train, validation = (
            [row[name] for row in rows] for name in ("train/loss", "train/accuracy", "validation/accuracy")
        )
        self._print(
            f"{epoch:>6} │ {statistics.fmean(loss):>10.4f} │ {statistics.fmean(train):>14.4f} │ "
            f"{statistics.fmean(validation):>10.4f} ± {_spread(validation):.4f} │ "
            f"{format_seconds(time.monotonic() - self.started):>7}"
        )

    def warn(self, message: str) -> None:
        """Print a line to standard error, above the bar."""
        tqdm.write(message, file=sys.stderr)

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


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summary_text(result: ExperimentResult) -> str:
    """Return the tables of a finished run, as the terminal and report.md show them."""
    config, environment, final = result.config, result.environment, result.final
    lines = ["Hyperparameters"]
    for name in ("dataset", "folds", "epochs", "batch_size", "learning_rate", "lr_schedule", "rng_seed"):
        lines.append(f"  {name.upper():<15}{config[name]}")
    lines.append(f"  on {environment['device']} in {environment['precision']}, {environment['workers']} workers")
    if final:
        report = {name: row for name, row in final.report.items() if isinstance(row, dict)}
        width = max(len(name) for name in report) + 2
        lines += ["", f"Test set, {int(report['macro avg']['support']):,} images"]
        lines.append("  " + PER_CLASS.format("class", "precision", "recall", "F1", width=width))
        for name, row in report.items():
            figures = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1-score"))
            lines.append("  " + PER_CLASS.format(name, *figures, width=width))
        lines.append(f"  accuracy {final.accuracy:.4f} · loss {final.loss:.4f} (mean cross-entropy an image)")
    lines += ["", "Cross-validation", "  fold      accuracy     loss"]
    lines += [f"  {fold.name:<10}{fold.accuracy:>8.4f}{fold.loss:>9.4f}" for fold in result.folds]
    if summary := result.cross_validation:
        lines.append(
            f"  accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f} · "
            f"loss {summary['loss_mean']:.4f} ± {summary['loss_std']:.4f} (mean ± standard deviation)"
        )
    lines += ["", *result.failures.values()] if result.failures else []
    return "\n".join([*lines, "", f"Time taken: {format_seconds(environment['seconds'])}"])


def save_report(result: ExperimentResult) -> list[Path]:
    """Save the figures and report.md into the run's directory; return their paths, the report first.

    The figures need no display. Without a final result only the learning curves are drawn, without any nothing is.
    """
    figures = {"learning_curves.png": _draw_learning_curves(result)} if result.folds else {}
    if result.final:
        figures["per_class.png"] = _draw_per_class(result)
        figures["confusion_matrix.png"] = _draw_confusion_matrix(result.final)
        figures["mistakes.png"] = _draw_mistakes(result.mistakes)
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        save_atomically(result.run_dir / name, picture.getvalue())
    environment = json.dumps(result.environment, indent=2, ensure_ascii=False)
    text = f"""# {result.run_dir.name}

```
{summary_text(result)}
```

{"".join(f"![{name}]({name})" + chr(10) * 2 for name in figures)}## Environment

```json
{environment}
```

## More

- `results.json`: every figure at full precision; `config.json`: what was asked.
- `model.pt`: the weights of the final network, for `load_state_dict`.
- In Weights & Biases: the runs of the group `{result.run_dir.name}`; offline, `wandb leet` shows them in the terminal.
"""
    save_atomically(result.run_dir / "report.md", text.encode())
    return [result.run_dir / name for name in ("report.md", *figures)]


def _draw_learning_curves(result: ExperimentResult) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
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
            plot.set_title("on the images trained on" if part == "train" else "on the fold held out (validation)")
            plot.set_ylabel(f"{quantity} ({unit})")
            plot.tick_params(labelleft=True)
            plot.grid(alpha=0.3)
            plot.legend()
    for plot in axes[1]:
        plot.set_xlabel("epoch")
        plot.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"Learning curves: {result.run_dir.name}")
    return figure


def _draw_per_class(result: ExperimentResult) -> Figure:
    assert result.final is not None
    classes = sorted(result.final.classes, key=lambda name: result.final.report[name]["f1-score"])
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(classes)), layout="constrained")
    plot = figure.subplots()
    for place, name in enumerate(classes):
        scores = [fold.report[name]["f1-score"] for fold in result.folds]
        label = None if place else "each fold, on its own part"
        plot.plot(scores, [place] * len(scores), "o-", color=BLUE, alpha=0.6, markersize=5, label=label)
        test = result.final.report[name]["f1-score"]
        plot.plot(test, place, "D", color=ORANGE, markersize=8, label=None if place else "final, on the test images")
        plot.annotate(f"{test:.3f}", (test, place), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
    plot.set_yticks(range(len(classes)), classes)
    plot.set_ylim(-0.6, len(classes) - 0.3)
    plot.set_ylabel("class")
    plot.set_xlabel("F1 score (1 is best)")
    plot.set_title("How well each class is recognised")
    plot.grid(alpha=0.3)
    plot.legend(loc="upper left")
    return figure


def _draw_confusion_matrix(final: FitResult) -> Figure:
    counts = np.array(final.confusion)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(10, 9), layout="constrained")
    plot = figure.subplots()
    image = plot.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            share = shares[row, column]
            colour = "white" if share > 50 else "black"
            plot.text(column, row, f"{count}\n{share:.1f} %", ha="center", va="center", color=colour, fontsize=8)
    plot.set_xticks(range(len(counts)), final.classes, rotation=45, ha="right")
    plot.set_yticks(range(len(counts)), final.classes)
    plot.set_xlabel("predicted class")
    plot.set_ylabel("true class")
    plot.set_title("What is taken for what: test images, and their share of the true class")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure


def _draw_mistakes(mistakes: list[Mistake]) -> Figure:
    columns, rows = 6, max(1, -(-len(mistakes) // 6))
    figure = Figure(figsize=(11, 0.8 + 2.3 * rows), layout="constrained")
    figure.suptitle("The surest mistakes on the test images" if mistakes else "No mistake on the test images")
    for place, plot in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        plot.set_axis_off()
        if place < len(mistakes):
            mistake = mistakes[place]
            plot.imshow(mistake.image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            said = f"{mistake.predicted} ({100 * mistake.probability:.1f} %)"
            plot.set_title(f"is: {mistake.true}\ntaken for: {said}", fontsize=8)
    return figure


def save_atomically(path: Path, content: bytes) -> None:
    """Write a file on the disk for good: a temporary file beside it, fsync, rename.

    Whoever reads `path`, at any moment and after any crash, finds the old file whole or the new file whole.

    Raises
    ------
    RunError
        If it cannot be written, for one because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename, too, is only then on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise RunError(
            f"{path_from_here(path)} cannot be written ({error.strerror}). Make room, or mend that."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class RunDirectory:
    """The folder of a run, ``<runs_dir>/<name>-<time>``: locked while the run lasts, and found again if it is cut off.

    Parameters
    ----------
    runs_dir : Path
    name : str
    settings : dict
        What was asked, for config.json.
    identity : dict
        All that the results depend on: a run goes on only with the checkpoints of one whose identity is the same.
    resume : bool
        Go on in the newest unfinished directory of the same identity that no other process is busy with.
    """

    def __init__(
        self, runs_dir: Path, name: str, settings: dict[str, Any], identity: dict[str, Any], resume: bool
    ) -> None:
        self._identity = hashlib.sha256(_to_json(identity)).hexdigest()
        runs_dir.mkdir(parents=True, exist_ok=True)
        found = self._find_unfinished(runs_dir, name) if resume else None
        self.resumed = found is not None
        if found is None:
            found = self._make(runs_dir, name)
            config = settings | {"identity": identity | {"digest": self._identity}, "wandb_id": uuid.uuid4().hex[:8]}
            save_atomically(found / "config.json", _to_json(config))
        self.path = found
        self.wandb_id: str = json.loads((found / "config.json").read_text(encoding="utf-8"))["wandb_id"]
        for leftover in found.glob(".*.unfinished"):
            leftover.unlink()

    def _find_unfinished(self, runs_dir: Path, name: str) -> Path | None:
        for path in sorted(runs_dir.glob(f"{name}-*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                identity = json.loads(path.read_text(encoding="utf-8"))["identity"]["digest"]
            except (ValueError, KeyError, TypeError):  # not written by this program, or not by this version
                continue
            if identity == self._identity and self._lock_unfinished(path.parent):
                return path.parent
        return None

    def _lock_unfinished(self, path: Path) -> bool:
        if (path / "results.json").exists():
            return False
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        if (path / "results.json").exists():  # finished by another process between the two lines above
            self._unlock(path)
            return False
        return True

    def _unlock(self, path: Path) -> None:
        self._lock.release()
        (path / ".lock").unlink(missing_ok=True)

    def _make(self, runs_dir: Path, name: str) -> Path:
        """Make and lock a new directory; two runs that start at once never share one."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while True:
            path = runs_dir / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            self._lock = FileLock(path / ".lock")
            self._lock.acquire()
            return path

    def load_checkpoint(self, fit_name: str) -> dict[str, Any] | None:
        """Return the checkpoint of a fit; None if there is none or, with a warning, if it is damaged or not its own."""
        path = self.path / f"{fit_name}.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint is None or checkpoint["belongs_to"] != f"{fit_name} {self._identity}":
                raise ValueError("it is not what this run wrote")
        except Exception as error:  # a damaged file can raise anything, and the fit can always start over
            print(f"{path_from_here(path)} cannot be used, so {fit_name} starts over: {error}", file=sys.stderr)
            return None
        return checkpoint

    def save_checkpoint(self, fit_name: str, checkpoint: dict[str, Any]) -> None:
        """Save the checkpoint of a fit in the place of its last one."""
        self.save_tensors(f"{fit_name}.pt", checkpoint | {"belongs_to": f"{fit_name} {self._identity}"})

    def save_tensors(self, name: str, content: dict[str, Any]) -> None:
        """Save tensors and plain values as torch does."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        save_atomically(self.path / name, buffer.getvalue())

    def finish(self, results: dict[str, Any]) -> None:
        """Save results.json, which makes the run a finished one, and remove its checkpoints."""
        save_atomically(self.path / "results.json", _to_json(results))
        for path in self.path.glob("*.pt"):
            if path.name != "model.pt":
                path.unlink()
        self._unlock(self.path)

    def __enter__(self) -> "RunDirectory":
        """Say which directory it is, where an earlier run goes on in it."""
        if self.resumed:
            print(f"Going on with the unfinished run in {path_from_here(self.path)} (RESUME = False starts anew).")
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Let others have the directory; after an error, say how to go on."""
        self._lock.release()
        if exception_type is not None:
            where = path_from_here(self.path)
            print(
                f"Every finished epoch is in {where}: the same command, with RESUME = True, goes on.", file=sys.stderr
            )


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
