"""One run compared with another: text and figure."""

import math
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comparison.changes import Change, changes_between, describe_changes, nearest_run, why_not_comparable
from comparison.forest_plot import add_title, draw_panel
from comparison.run_reader import FinishedRun, Fold, as_run, display_path, read_runs
from comparison.statistics import MetricDifference, compare_metric, holm
from experiment.errors import ConfigurationError
from experiment.formatting import WIDTH, display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("accuracy", "loss")
MAX_CHANGES_WIDTH = 220  # characters of the changes, about three lines
MAX_CLASSES = 3  # classes whose F1 score the text shows
MIN_F1_CHANGE = 0.0005  # a class whose F1 score changed less is not shown


@dataclass(frozen=True)
class PairComparison:
    """A run compared with an earlier one; `metrics` has the differences in accuracy and loss."""

    before: FinishedRun
    after: FinishedRun
    changes: list[Change]
    metrics: dict[str, MetricDifference]

    @cached_property
    def f1(self) -> dict[str, MetricDifference]:
        """The difference in the F1 score of each class."""
        old_scores, new_scores = [], []
        for old_fold, new_fold in _common_folds(self.before, self.after):
            old_scores.append(old_fold.f1)
            new_scores.append(new_fold.f1)
        f1 = {}
        for name in old_scores[0]:
            if all(name in scores for scores in old_scores + new_scores):
                old = [scores[name] for scores in old_scores]
                new = [scores[name] for scores in new_scores]
                f1[name] = compare_metric(name, old, new, self.after.identity.folds)
        return f1

    @property
    def is_identical(self) -> bool:
        """Whether every metric is equal to the bit in every fold."""
        return all(difference.is_identical for difference in (*self.metrics.values(), *self.f1.values()))

    @property
    def text(self) -> str:
        """The changes and their effect, in lines of at most 80 columns."""
        lines = [f"Compared with {display_path(self.before.path)}"]
        common, folds = len(self.metrics["accuracy"].after), self.after.identity.folds
        if common < folds:
            lines.append(f"  over the {common} of {folds} folds that both have")
        lines += _indent(describe_changes(self.changes, MAX_CHANGES_WIDTH), indent=4)
        if self.is_identical:
            return "\n".join([*lines, "  identical in every fold"])
        for difference in self.metrics.values():
            lines += _metric_lines(difference)
        return "\n".join(lines + _f1_lines(self.f1))

    def figure(self) -> "Figure":
        """Draw accuracy and loss above, and the F1 score of each class below."""
        from experiment.plots import new_figure

        classes = list(self.f1.values())
        class_height = 0.32 * len(classes) + 0.4
        figure = new_figure(9, class_height + 4.4)
        grid = figure.add_gridspec(2, 2, height_ratios=[1.2, class_height])
        for column, difference in enumerate(self.metrics.values()):
            result = f"{signed(difference.mean)} ± {difference.standard_error:.4f}: {difference.verdict(difference.p)}"
            panel = figure.add_subplot(grid[0, column])
            draw_panel(panel, f"{difference.metric}\n{result}", [difference], [""], [difference.p])
        names = [display_name(difference.metric) for difference in classes]
        corrected = holm([difference.p for difference in classes])
        draw_panel(figure.add_subplot(grid[1, :]), "F1 of each class", classes, names, corrected)
        changes = textwrap.fill(describe_changes(self.changes, MAX_CHANGES_WIDTH), WIDTH)
        runs = f"{display_path(self.after.path)}\ncompared with {display_path(self.before.path)}"
        add_title(figure, f"{changes}\n{runs}")
        return figure


def compare_with_nearest(run_dir: Path, results: dict[str, Any], identity: dict[str, Any]) -> PairComparison | None:
    """Compare a run that is about to be saved with the nearest finished run beside it; None if there is none.

    Parameters
    ----------
    run_dir : Path
        The run directory.
    results : dict
        The future content of its results.json.
    identity : dict
        "identity" of its config.json.
    """
    after = as_run(run_dir, results, identity)
    finished, _ = read_runs(run_dir.parent)
    before = nearest_run(after, finished)
    return None if before is None else compare_runs(before, after)


def compare_runs(before: FinishedRun, after: FinishedRun) -> PairComparison:
    """Compare a run with an earlier one.

    Raises
    ------
    ConfigurationError
        If their folds consist of different images, or too few folds have a result in both.
    """
    reason = why_not_comparable(before, after)
    if reason is not None:
        raise ConfigurationError(reason)
    folds = _common_folds(before, after)
    metrics = {}
    for metric in METRICS:
        old = [getattr(old_fold, metric) for old_fold, _ in folds]
        new = [getattr(new_fold, metric) for _, new_fold in folds]
        metrics[metric] = compare_metric(metric, old, new, after.identity.folds)
    return PairComparison(before, after, changes_between(before, after), metrics)


def _common_folds(before: FinishedRun, after: FinishedRun) -> list[tuple[Fold, Fold]]:
    return [(fold, after.folds[name]) for name, fold in before.folds.items() if name in after.folds]


def _metric_lines(difference: MetricDifference) -> list[str]:
    old, new = float(np.mean(difference.before)), float(np.mean(difference.after))
    change = f"{signed(difference.mean)} ± {difference.standard_error:.4f}"
    unit = " (± standard error)" if difference.metric == "accuracy" else ""  # once is enough
    return [
        f"  {difference.metric:<10}{old:.4f} → {new:.4f}   {change}{unit}",
        f"{'':12}{_verdict_with_reason(difference)}",
    ]


def _verdict_with_reason(difference: MetricDifference) -> str:
    verdict = difference.verdict(difference.p)
    if verdict == "identical":
        return "identical in every fold"
    if math.isnan(difference.p):
        return "not significant (the same change in every fold, so no p)"
    p = "p < 0.0001" if difference.p < 0.0001 else f"p = {difference.p:.2g}"
    if verdict == "not significant":
        return f"not significant ({p})"
    same_direction = sum(change * difference.mean > 0 for change in difference.per_fold)
    return f"{verdict} ({p}), in {same_direction} of {len(difference.after)} folds"


def _f1_lines(f1: dict[str, MetricDifference]) -> list[str]:
    largest_first = sorted(f1.values(), key=lambda difference: -abs(difference.mean))
    shown = []
    for difference in largest_first[:MAX_CLASSES]:
        if abs(difference.mean) >= MIN_F1_CHANGE:
            shown.append(f"{display_name(difference.metric)} {signed(difference.mean, 3)}")
    return _indent(f"F1, largest changes: {', '.join(shown)}", indent=12) if shown else []


def _indent(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * indent)


def signed(value: float, digits: int = 4) -> str:
    """Return a number with its sign and a typographic minus; a number that is rounded to zero is +0."""
    return f"{value:+z.{digits}f}".replace("-", "−")
