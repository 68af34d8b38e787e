"""What a run prints: the progress bar, one table row per epoch, the tables of the results; at most 80 columns."""

from __future__ import annotations

import html
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from experiment.formatting import display_name, format_duration, format_metric

if TYPE_CHECKING:  # imports torch
    from experiment.results import ExperimentResult, FitResult, History

HEADINGS = (" epoch ", " train loss  accuracy ", " validation loss  accuracy ± deviation ", "   time ")
BAR_FORMAT = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} epochs, {remaining} left{postfix}"


class Progress:
    """One bar over all epochs of all fits (only in a terminal), and one table row per epoch that all folds have done.

    Parameters
    ----------
    fit_names : iterable of str
        The folds and "final".
    epochs : int
        Epochs per fit.
    """

    def __init__(self, fit_names: Iterable[str], epochs: int) -> None:
        self.histories: dict[str, History] = {name: [] for name in fit_names}
        self._epochs = epochs
        self._diverged: set[str] = set()
        self._rows = 0
        self._has_estimate = False
        self._started = time.monotonic()
        self._epochs_resumed = 0
        hidden = not sys.stderr.isatty()
        total = self._total_epochs()
        self._bar = tqdm(total=total, disable=hidden, dynamic_ncols=True, smoothing=0, bar_format=BAR_FORMAT)

    def begin(self, histories: dict[str, History], diverged: Iterable[str] = ()) -> None:
        """Print the table's heading and the rows of a resumed run.

        Parameters
        ----------
        histories : dict
            The epochs that each fit has already done.
        diverged : iterable of str
            The fits that have already diverged.
        """
        self.histories = {name: list(history) for name, history in histories.items()}
        self._diverged = set(diverged)
        self._epochs_resumed = self._epochs_done()
        self._bar.initial = self._bar.n = self._epochs_resumed
        self._bar.total = self._total_epochs()
        print_line(f"\nMeans over the {len(histories) - 1} folds, ± their standard deviation:\n")
        print_line("│".join(HEADINGS).rstrip())
        print_line("┼".join("─" * len(heading) for heading in HEADINGS))
        self._print_new_rows()

    def step(self, fit_name: str, metrics: dict[str, float], diverged: bool = False) -> bool:
        """Add one epoch of one fit; return whether all folds have now done another epoch."""
        self.histories[fit_name].append(metrics)
        if diverged:
            self._diverged.add(fit_name)
            self._bar.total = self._total_epochs()
        self._bar.set_postfix_str(_latest_accuracy(fit_name, metrics), refresh=False)
        with suppress(OSError):  # the terminal was closed
            self._bar.update()
        return self._print_new_rows()

    def _total_epochs(self) -> int:
        """Return how many epochs all fits will have done at the end. A fit that diverged is not continued."""
        skipped = sum(self._epochs - len(self.histories[name]) for name in self._diverged)
        return self._epochs * len(self.histories) - skipped

    def _epochs_done(self) -> int:
        return sum(len(history) for history in self.histories.values())

    def _print_new_rows(self) -> bool:
        without_row = {"final", *self._diverged}
        folds = [history for name, history in self.histories.items() if name not in without_row]
        complete = min((len(history) for history in folds), default=0)
        has_new_rows = complete > self._rows
        while self._rows < complete:
            epoch = [history[self._rows] for history in folds]
            self._rows += 1
            print_line(_table_row(self._rows, epoch, time.monotonic() - self._started))
        if has_new_rows and not self._has_estimate:
            self._print_estimate()
        return has_new_rows

    def _print_estimate(self) -> None:
        """Print once about how long the remaining epochs will take."""
        seconds = self.seconds_left()
        if seconds:
            print_line(f"       │ about {format_duration(seconds)} left")
            self._has_estimate = True

    def seconds_left(self) -> float | None:
        """Return about how long the remaining epochs will take; None if no epoch is done yet."""
        done = self._epochs_done()
        done_now = done - self._epochs_resumed
        if not done_now:
            return None
        return (time.monotonic() - self._started) / done_now * (self._total_epochs() - done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):
            self._bar.close()


def _latest_accuracy(fit_name: str, metrics: dict[str, float]) -> str:
    if "validation/accuracy" in metrics:
        return f"{fit_name}: validation accuracy {metrics['validation/accuracy']:.4f}"
    return f"{fit_name}: training accuracy {metrics['train/accuracy']:.4f}"


def _table_row(number: int, epoch: list[dict[str, float]], seconds: float) -> str:
    """Return the table's row of an epoch, given the metrics of all folds."""
    names = ("train/loss", "train/accuracy", "validation/loss", "validation/accuracy")
    means = {name: statistics.fmean(metrics[name] for metrics in epoch) for name in names}
    accuracies = [metrics["validation/accuracy"] for metrics in epoch]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return (
        f"{number:>6} │ {format_metric(means['train/loss']):>10}  {means['train/accuracy']:>8.4f} │ "
        f"{format_metric(means['validation/loss']):>15}  {means['validation/accuracy']:>8.4f} ± {deviation:<9.4f} │"
        f"{format_duration(seconds):>7}"
    )


def print_line(text: str) -> None:
    """Print to standard output, above the progress bar if there is one."""
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Print to standard error, above the progress bar if there is one."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:  # the terminal or the pipe was closed, which must not end the run
        _redirect_to_null(stream)


def _redirect_to_null(stream: TextIO) -> None:
    """Discard what could not be written; otherwise Python tries again at exit, and fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # the stream is not a file
        os.dup2(null, stream.fileno())
    os.close(null)


def show_page(page: bytes, display_id: str, update: bool) -> None:
    """Show an HTML page below the cell if this runs in a notebook; an update replaces the page with the same id."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    from IPython.display import HTML, display

    source = html.escape(page.decode().replace("<nav ", "<nav hidden "))  # its links are relative to the page's folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of IPython, which recommends IFrame; a server may not serve the page's folder
        frame = HTML(f'<iframe srcdoc="{source}" title="Report" style="width: 100%; height: 45em; border: 0"></iframe>')
    display(frame, display_id=display_id, update=update)


def folds_table(result: ExperimentResult) -> str:
    """Return the table of the folds, for the terminal and the report."""
    if not result.folds:
        return "Cross-validation: all folds diverged"
    lines = ["Cross-validation", "  fold      accuracy     loss"]
    lines += [f"  {fold.name:<10}{fold.accuracy:>8.4f}{format_metric(fold.loss):>9}" for fold in result.folds]
    if result.has_unequal_classes:
        lines[1] += "   macro F1"
        for number, fold in enumerate(result.folds, start=2):
            lines[number] += f"{fold.report['macro avg']['f1-score']:>11.4f}"
    summary = result.cross_validation
    if summary:
        loss, deviation = (format_metric(summary[name]) for name in ("loss_mean", "loss_std"))
        lines.append(
            f"  accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f} · "
            f"loss {loss} ± {deviation} (mean ± standard deviation)"
        )
        if result.has_unequal_classes:
            lines.append(f"  macro F1 {summary['macro_f1_mean']:.4f} ± {summary['macro_f1_std']:.4f}")
    return "\n".join(lines)


def test_table(final: FitResult) -> str:
    """Return the table of the test set, one row per class, for the terminal and the report."""
    rows = [(display_name(name), row) for name, row in final.report.items() if isinstance(row, dict)]
    width = max(len(name) for name, _ in rows) + 2
    lines = [
        f"Test set, {int(final.report['macro avg']['support']):,} images",
        f"  {'class':<{width}}{'precision':>11}{'recall':>9}{'F1':>9}",
    ]
    for name, row in rows:
        lines.append(f"  {name:<{width}}{row['precision']:>11.4f}{row['recall']:>9.4f}{row['f1-score']:>9.4f}")
    lines.append(f"  accuracy {final.accuracy:.4f} · loss {format_metric(final.loss)} (mean cross-entropy per image)")
    return "\n".join(lines)


def duration_line(result: ExperimentResult) -> str:
    """Return how long the run took."""
    since = " since it was resumed" if result.environment["resumed"] else ""
    return f"Time taken: {format_duration(result.environment['seconds'])}{since}"
