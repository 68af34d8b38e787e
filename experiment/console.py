"""What the user sees in the terminal: progress, tables, durations and paths."""

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from experiment.results import COMPUTED, ExperimentResult, FitResult

HEADINGS = ("epoch", "train loss", "train accuracy", "validation accuracy", "time")


class Progress:
    """One bar over all epochs of all fits (only in a terminal) and a table row an epoch that all folds have done."""

    def __init__(self, epochs: int, done: int) -> None:
        self._started, self._rows = time.monotonic(), 0
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(total=epochs, initial=done, unit="epoch", disable=hidden, dynamic_ncols=True, smoothing=0)
        say("\n " + " │ ".join(HEADINGS) + "   (means over the folds)")
        say("─" + "─┼─".join("─" * len(heading) for heading in HEADINGS) + "───")

    def step(self, fit_name: str, metrics: dict[str, float]) -> None:
        """Move the bar by one epoch of one fit."""
        accuracy = metrics.get("validation/accuracy", metrics["train/accuracy"])
        done = f"{fit_name}: loss {metrics['train/loss']:.3f}, accuracy {accuracy:.4f}"
        self._bar.set_postfix_str(done, refresh=False)
        with contextlib.suppress(OSError):  # the terminal is gone
            self._bar.update()

    def rows(self, histories: list[list[dict[str, float]]]) -> None:
        """Print a table row for each further epoch that all of the folds' histories have."""
        while histories and min(map(len, histories)) > self._rows:
            epoch = [history[self._rows] for history in histories]
            self._rows += 1
            loss, train = (statistics.fmean(row[f"train/{name}"] for row in epoch) for name in ("loss", "accuracy"))
            validation = [row["validation/accuracy"] for row in epoch]
            mean, spread = statistics.fmean(validation), statistics.stdev(validation) if len(validation) > 1 else 0.0
            taken = format_seconds(time.monotonic() - self._started)
            say(f"{self._rows:>6} │ {loss:>10.4f} │ {train:>14.4f} │ {mean:>10.4f} ± {spread:.4f} │ {taken:>7}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()


def say(line: str) -> None:
    """Print to standard output, above the bar if there is one."""
    _write(line, sys.stdout)


def warn(line: str) -> None:
    """Print to standard error, above the bar if there is one."""
    _write(line, sys.stderr)


def _write(line: str, stream: TextIO) -> None:
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except OSError:  # the terminal or the pipe is gone: the run goes on without
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def summary_text(result: ExperimentResult) -> str:
    """Return the tables of a finished run, as the terminal and report.md show them."""
    config, environment = result.config, result.environment
    lines = ["Hyperparameters"]
    lines += [f"  {name.upper():<15}{config[name]}" for name in COMPUTED]
    lines.append(f"  on {environment['device']} in {environment['precision']}, workers: {environment['workers']}")
    if result.final:
        lines += ["", *_test_lines(result.final)]
    lines += ["", "Cross-validation", "  fold      accuracy     loss"]
    lines += [f"  {fold.name:<10}{fold.accuracy:>8.4f}{fold.loss:>9.4f}" for fold in result.folds]
    if summary := result.cross_validation:
        lines.append(
            f"  accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f} · "
            f"loss {summary['loss_mean']:.4f} ± {summary['loss_std']:.4f} (mean ± standard deviation)"
        )
    lines += ["", *result.failures.values()] if result.failures else []
    since = " since it went on" if environment["resumed"] else ""
    return "\n".join([*lines, "", f"Time taken: {format_seconds(environment['seconds'])}{since}"])


def _test_lines(final: FitResult) -> list[str]:
    rows = {name: row for name, row in final.report.items() if isinstance(row, dict)}
    width = max(len(name) for name in rows) + 2
    lines = [
        f"Test set, {int(rows['macro avg']['support']):,} images",
        f"  {'class':<{width}}{'precision':>11}{'recall':>9}{'F1':>9}",
    ]
    for name, row in rows.items():
        lines.append(f"  {name:<{width}}{row['precision']:>11.4f}{row['recall']:>9.4f}{row['f1-score']:>9.4f}")
    return [*lines, f"  accuracy {final.accuracy:.4f} · loss {final.loss:.4f} (mean cross-entropy an image)"]


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
