"""What the user sees in the terminal: progress, tables and durations, in 80 columns."""

import contextlib
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from experiment.results import ExperimentResult, FitResult

WIDTH = 80
HEADINGS = (" epoch ", " train loss  accuracy ", " validation loss  accuracy ± deviation ", "   time ")
BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} epochs, {remaining} left{postfix}"
History = list[dict[str, float]]


class Progress:
    """One bar over all epochs of all fits (only in a terminal) and a table row an epoch that all folds have done.

    Parameters
    ----------
    fit_names : iterable of str
        Of the folds and of "final".
    epochs : int
        Of each fit.
    """

    def __init__(self, fit_names: Iterable[str], epochs: int) -> None:
        self.histories: dict[str, History] = {name: [] for name in fit_names}
        self._epochs = epochs
        self._diverged: set[str] = set()
        self._rows = 0
        self._said_how_long = False
        self._started = time.monotonic()
        self._done_before = 0  # epochs of an earlier attempt, which took none of the time since then
        hidden = sys.stderr is None or not sys.stderr.isatty()
        total = self._epochs_in_all()
        self._bar = tqdm(total=total, disable=hidden, dynamic_ncols=True, smoothing=0, bar_format=BAR)

    def begin(self, histories: dict[str, History], diverged: Iterable[str] = ()) -> None:
        """Begin the table, with the epochs that an earlier attempt has done, and the fits that diverged in it."""
        self._diverged = set(diverged)
        say(f"\nMeans over the {len(histories) - 1} folds, ± their standard deviation:\n")
        say("│".join(HEADINGS).rstrip())
        say("┼".join("─" * len(heading) for heading in HEADINGS))
        for name, history in histories.items():
            self.histories[name] = list(history)
        self._done_before = self._epochs_done()
        self._bar.initial = self._bar.n = self._done_before
        self._bar.total = self._epochs_in_all()
        self._print_new_rows()

    def step(self, fit_name: str, metrics: dict[str, float], diverged: bool = False) -> bool:
        """Move the bar by one epoch of one fit; return whether all folds have done another epoch now."""
        self.histories[fit_name].append(metrics)
        if diverged:
            self._diverged.add(fit_name)
            self._bar.total = self._epochs_in_all()
        self._bar.set_postfix_str(_latest(fit_name, metrics), refresh=False)
        with contextlib.suppress(OSError):  # the terminal is gone
            self._bar.update()
        return self._print_new_rows()

    def _epochs_in_all(self) -> int:
        """Return how many epochs all fits will have done at the end: one that diverged is trained no further."""
        given_up = sum(self._epochs - len(self.histories[name]) for name in self._diverged)
        return self._epochs * len(self.histories) - given_up

    def _epochs_done(self) -> int:
        return sum(len(history) for history in self.histories.values())

    def _print_new_rows(self) -> bool:
        makes_no_row = {"final", *self._diverged}
        folds = [history for name, history in self.histories.items() if name not in makes_no_row]
        rows_before = self._rows
        while folds and min(len(history) for history in folds) > self._rows:
            epoch = [history[self._rows] for history in folds]
            self._rows += 1
            say(_row_of_table(self._rows, epoch, time.monotonic() - self._started))
            if not self._said_how_long:
                self._say_how_long()
        return self._rows > rows_before

    def _say_how_long(self) -> None:
        """Say about how long the rest will take, by what the epochs took until now."""
        done = self._epochs_done()
        done_here = done - self._done_before
        left = self._bar.total - done
        if done_here and left:
            seconds_an_epoch = (time.monotonic() - self._started) / done_here
            say(f"       │ about {format_seconds(seconds_an_epoch * left)} to go")
            self._said_how_long = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()


def _latest(fit_name: str, metrics: dict[str, float]) -> str:
    """Return what the bar says of the epoch that was done last: whose figure it is, and of which images."""
    if "validation/accuracy" in metrics:
        return f"{fit_name}: {metrics['validation/accuracy']:.4f} in validation"
    return f"{fit_name}: {metrics['train/accuracy']:.4f} in training"


def _row_of_table(number: int, epoch: list[dict[str, float]], seconds: float) -> str:
    """Return the table's row of an epoch, given the metrics of all folds."""
    loss, accuracy, validation_loss = (
        statistics.fmean(row[name] for row in epoch) for name in ("train/loss", "train/accuracy", "validation/loss")
    )
    validation = [row["validation/accuracy"] for row in epoch]
    deviation = statistics.stdev(validation) if len(validation) > 1 else 0.0
    return (
        f"{number:>6} │ {loss:>10.4f}  {accuracy:>8.4f} │ {validation_loss:>15.4f}  "
        f"{statistics.fmean(validation):>8.4f} ± {deviation:<9.4f} │{format_seconds(seconds):>7}"
    )


def say(text: str) -> None:
    """Print to standard output, above the bar if there is one."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """Print to standard error, above the bar if there is one."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed since Python began, as by 2>&-
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except ValueError:  # the program that called us has closed it
        pass
    except OSError:  # the terminal or the pipe is gone: the run goes on without
        _send_to_nowhere(stream)


def _send_to_nowhere(stream: TextIO) -> None:
    """Let what was written, and could not be sent, vanish; Python would try again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):  # it is no file
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def wrap(text: str) -> str:
    """Return a sentence in lines of at most 80 columns."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def show_pictures(paths: Iterable[Path]) -> None:
    """Show pictures under the cell, where this runs in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    from IPython.display import Image, display

    for path in paths:
        display(Image(filename=str(path)))


def folds_text(result: ExperimentResult) -> str:
    """Return the table of the folds, as the terminal and report.md show it."""
    if not result.folds:
        return "Cross-validation: all folds diverged"
    lines = ["Cross-validation", "  fold      accuracy     loss"]
    lines += [f"  {fold.name:<10}{fold.accuracy:>8.4f}{fold.loss:>9.4f}" for fold in result.folds]
    summary = result.cross_validation
    if summary:
        lines.append(
            f"  accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f} · "
            f"loss {summary['loss_mean']:.4f} ± {summary['loss_std']:.4f} (mean ± standard deviation)"
        )
    return "\n".join(lines)


def final_text(final: FitResult) -> str:
    """Return the table of the test, a row a class, as the terminal and report.md show it."""
    rows = {name: row for name, row in final.report.items() if isinstance(row, dict)}
    width = max(len(display_name(name)) for name in rows) + 2
    lines = [
        f"Test set, {int(rows['macro avg']['support']):,} images",
        f"  {'class':<{width}}{'precision':>11}{'recall':>9}{'F1':>9}",
    ]
    for name, row in rows.items():
        figures = f"{row['precision']:>11.4f}{row['recall']:>9.4f}{row['f1-score']:>9.4f}"
        lines.append(f"  {display_name(name):<{width}}{figures}")
    lines.append(f"  accuracy {final.accuracy:.4f} · loss {final.loss:.4f} (mean cross-entropy an image)")
    return "\n".join(lines)


def time_text(result: ExperimentResult) -> str:
    """Return how long the run took."""
    since = " since it went on" if result.environment["resumed"] else ""
    return f"Time taken: {format_seconds(result.environment['seconds'])}{since}"


def display_name(class_name: str) -> str:
    """Return the name of a class, so that a digit is not taken for a figure."""
    return f"class {class_name}" if class_name.isdigit() else class_name


def format_seconds(seconds: float) -> str:
    """Return a duration as 42 s, 3:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
