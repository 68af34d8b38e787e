"""One run compared with another: text and figure."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comparison.changes import (
    Change,
    changes_between,
    comparable,
    describe_changes,
    nearest_run,
    why_not_comparable,
    why_nothing_comparable,
)
from comparison.forest_plot import add_title, draw_panel
from comparison.run_reader import FinishedRun, Fold, as_run, display_path, read_runs
from comparison.statistics import MetricDifference, NoisePrior, compare_metric, correct_together, estimate_prior
from experiment.errors import ConfigurationError
from experiment.formatting import WIDTH, display_name, format_metric
from experiment.identity import has_unequal_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "loss"  # the only metric that is better if it is lower
METRICS = ("accuracy", LOSS)
MACRO_F1 = "macro F1"  # a third metric if the classes are of unequal size
MAX_CHANGES_WIDTH = 220  # characters of the changes, about three lines
MAX_CLASSES = 3  # classes whose F1 score the text shows
MIN_F1_CHANGE = 0.0005  # a class whose F1 score changed less is not shown


@dataclass(frozen=True)
class BaselineNoise:
    """The noise of the differences from a baseline, estimated on all finished runs that are comparable with it."""

    baseline: FinishedRun
    others: list[FinishedRun]

    @cached_property
    def metrics(self) -> dict[str, NoisePrior | None]:
        """The common noise in each metric; None where there are too few runs."""
        priors = {}
        for metric in metrics_of(self.baseline):
            priors[metric] = estimate_prior([_metric_values(self.baseline, other, metric) for other in self.others])
        return priors

    @cached_property
    def f1(self) -> dict[str, NoisePrior | None]:
        """The common noise in the F1 score of each class."""
        scores = [_f1_values(self.baseline, other) for other in self.others]
        classes = dict.fromkeys(name for each in scores for name in each)
        return {name: estimate_prior([each[name] for each in scores if name in each]) for name in classes}


@dataclass(frozen=True)
class PairComparison:
    """A run compared with an earlier one.

    Attributes
    ----------
    before, after : FinishedRun
    changes : list of Change
    metrics : dict of str to MetricDifference
        The differences in accuracy, loss and, if the classes are of unequal size, macro F1; corrected for their number.
    noise : BaselineNoise
    """

    before: FinishedRun
    after: FinishedRun
    changes: list[Change]
    metrics: dict[str, MetricDifference]
    noise: BaselineNoise

    @cached_property
    def f1(self) -> dict[str, MetricDifference]:
        """The difference in the F1 score of each class, corrected for the number of classes."""
        differences = []
        for name, (old, new) in _f1_values(self.before, self.after).items():
            differences.append(compare_metric(name, old, new, self.after.identity.folds, self.noise.f1.get(name)))
        return {difference.metric: difference for difference in correct_together(differences)}

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
        return "\n".join([*lines, *_f1_lines(self.f1), *_indent(self.explanation, indent=2)])

    @property
    def explanation(self) -> str:
        """What p and ± of the metrics are corrected for, and on how many runs the noise is estimated."""
        sentence = describe_noise(self.noise, self.metrics.values())
        tests = sum(difference.has_interval for difference in self.metrics.values())
        return f"p and ± are corrected for {tests} metrics (Holm). {sentence}" if tests > 1 else sentence

    @property
    def explanation_with_classes(self) -> str:
        """The explanation, and what p and ± of the F1 scores are corrected for."""
        tests = sum(difference.has_interval for difference in self.f1.values())
        if tests > 1:
            sentence = f"In the table of the classes, p and ± are corrected for {tests} classes (Holm)."
            return f"{self.explanation} {sentence}"
        return self.explanation

    def figure(self) -> "Figure":
        """Draw accuracy and loss above, and the F1 score of each class below."""
        from experiment.plots import new_figure

        classes = list(self.f1.values())
        class_height = 0.32 * len(classes) + 0.4
        figure = new_figure(9, class_height + 4.4)
        grid = figure.add_gridspec(2, len(self.metrics), height_ratios=[1.2, class_height])
        for column, difference in enumerate(self.metrics.values()):
            panel = figure.add_subplot(grid[0, column])
            draw_panel(
                panel, f"{difference.metric}\n{format_change(difference)}: {difference.verdict}", [difference], [""]
            )
        names = [display_name(difference.metric) for difference in classes]
        draw_panel(figure.add_subplot(grid[1, :]), "F1 of each class", classes, names)
        changes = textwrap.fill(describe_changes(self.changes, MAX_CHANGES_WIDTH), WIDTH)
        runs = f"{display_path(self.after.path)}\ncompared with {display_path(self.before.path)}"
        add_title(figure, f"{changes}\n{runs}")
        return figure


def compare_with_nearest(run_dir: Path, results: dict[str, Any], identity: dict[str, Any]) -> PairComparison | str:
    """Compare a run that is about to be saved with the nearest finished run beside it.

    Parameters
    ----------
    run_dir : Path
        The run directory.
    results : dict
        The future content of its results.json.
    identity : dict
        "identity" of its config.json.

    Returns
    -------
    PairComparison or str
        If there is no run to compare it with, one line that says why.
    """
    after = as_run(run_dir, results, identity)
    finished, _ = read_runs(run_dir.parent)
    before = nearest_run(after, finished)
    if before is None:
        return why_nothing_comparable(after, finished)
    return compare_runs(before, after, finished)


def compare_runs(before: FinishedRun, after: FinishedRun, history: Sequence[FinishedRun] = ()) -> PairComparison:
    """Compare a run with an earlier one.

    Parameters
    ----------
    before, after : FinishedRun
    history : sequence of FinishedRun, optional
        Other runs, on which the noise is estimated together with these two; those that are not comparable are ignored.

    Raises
    ------
    ConfigurationError
        If their folds consist of different images, or too few folds have a result in both.
    """
    return compare_with_baseline(after, baseline_noise(before, [after, *history]))


def baseline_noise(baseline: FinishedRun, runs: Sequence[FinishedRun]) -> BaselineNoise:
    """Return the noise of the differences from a baseline, given all runs; itself and duplicates are ignored."""
    others = {run.path: run for run in runs if run.path != baseline.path and comparable(baseline, run)}
    return BaselineNoise(baseline, list(others.values()))


def compare_with_baseline(after: FinishedRun, noise: BaselineNoise) -> PairComparison:
    """Compare a run with the baseline of `noise`; see `compare_runs`."""
    before = noise.baseline
    reason = why_not_comparable(before, after)
    if reason is not None:
        raise ConfigurationError(reason)
    differences = []
    for metric in metrics_of(before):
        old, new = _metric_values(before, after, metric)
        prior = noise.metrics[metric]
        differences.append(compare_metric(metric, old, new, after.identity.folds, prior, metric == LOSS))
    metrics = {difference.metric: difference for difference in correct_together(differences)}
    return PairComparison(before, after, changes_between(before, after), metrics, noise)


def metrics_of(run: FinishedRun) -> tuple[str, ...]:
    """Return the metrics by which a run is compared."""
    return (*METRICS, MACRO_F1) if has_unequal_classes(run.identity.class_sizes) else METRICS


def _metric_values(before: FinishedRun, after: FinishedRun, metric: str) -> tuple[list[float], list[float]]:
    """Return a metric in the folds that both runs have."""
    folds = _common_folds(before, after)
    return [metric_of(old, metric) for old, _ in folds], [metric_of(new, metric) for _, new in folds]


def metric_of(fold: Fold, metric: str) -> float:
    """Return one of the metrics of `metrics_of` in a fold."""
    return float(getattr(fold, "macro_f1" if metric == MACRO_F1 else metric))


def _f1_values(before: FinishedRun, after: FinishedRun) -> dict[str, tuple[list[float], list[float]]]:
    """Return the F1 score in the folds that both runs have, of each class that has one in all of them."""
    scores = [(old.f1, new.f1) for old, new in _common_folds(before, after)]
    values = {}
    for name in scores[0][0]:
        if all(name in old and name in new for old, new in scores):
            values[name] = ([old[name] for old, _ in scores], [new[name] for _, new in scores])
    return values


def _common_folds(before: FinishedRun, after: FinishedRun) -> list[tuple[Fold, Fold]]:
    return [(fold, after.folds[name]) for name, fold in before.folds.items() if name in after.folds]


def describe_noise(noise: BaselineNoise, differences: Iterable[MetricDifference]) -> str:
    """Return on how many runs the noise of some differences is estimated, as a sentence."""
    differences = list(differences)
    runs = {difference.metric: 2 for difference in differences}
    for difference in differences:
        prior = noise.metrics[difference.metric]
        if prior is not None and difference.is_moderated:
            runs[difference.metric] = prior.comparisons + 1
    if set(runs.values()) <= {2}:
        return "Noise estimated on the 2 runs of each comparison."
    if len(set(runs.values())) == 1:
        return f"Noise estimated on {next(iter(runs.values()))} runs with these folds."
    by_metric = " and ".join(f"{number} runs ({metric})" for metric, number in runs.items())
    return f"Noise estimated on {by_metric} with these folds."


def _metric_lines(difference: MetricDifference) -> list[str]:
    old, new = float(np.mean(difference.before)), float(np.mean(difference.after))
    lines = [
        f"  {difference.metric:<10}{format_metric(old)} → {format_metric(new)}   {format_change(difference)}",
        f"{'':12}{verdict_with_reason(difference)}",
    ]
    if difference.has_interval and difference.verdict == "not significant":
        detectable = difference.detectable
        if detectable <= 1 or difference.metric == LOSS:  # accuracy and F1 cannot differ by more than 1
            lines.append(f"{'':12}A difference of {format_metric(detectable)} would be found in 80 % of cases.")
    return lines


def format_change(difference: MetricDifference) -> str:
    """Return the mean difference with its interval, such as ``+0.0015 ± 0.0012 (95 %)``."""
    mean = signed(difference.mean)
    return f"{mean} ± {format_metric(difference.ci_half_width)} (95 %)" if difference.has_interval else mean


def verdict_with_reason(difference: MetricDifference) -> str:
    """Return the verdict with its p value, such as ``better (p = 0.0003), in 5 of 5 folds``."""
    verdict = difference.verdict
    if verdict == "identical":
        return "identical in every fold"
    if not difference.has_interval:
        return "not significant (the same change in every fold, so no p)"
    p = "p < 0.0001" if difference.corrected_p < 0.0001 else f"p = {difference.corrected_p:.2g}"
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
    number = f"{value:+z.{digits}f}" if abs(value) < 10000 else f"{value:+.4g}"
    return number.replace("-", "−")
