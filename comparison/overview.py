"""Several runs compared with a baseline: text."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from comparison.changes import comparable, describe_changes, size_change, why_not_comparable
from comparison.pair import (
    MACRO_F1,
    METRICS,
    BaselineNoise,
    PairComparison,
    baseline_noise,
    compare_with_baseline,
    describe_noise,
    metric_of,
    metrics_of,
    signed,
)
from comparison.run_reader import FinishedRun, display_path, read_runs, shortest_names
from comparison.statistics import MetricDifference, correct_together
from experiment.errors import ConfigurationError
from experiment.formatting import WIDTH, format_duration, wrap

MAX_CHANGES_WIDTH = 105  # characters of the changes in a row of the text
DEFAULT_LAST = 20  # runs that are shown if none is named
HEADING = "        accuracy      change           p    loss      change           p    took"
MACRO_F1_HEADING = f"        {MACRO_F1}      change           p"  # of a second line in each row


@dataclass(frozen=True)
class Row:
    """A run of the overview.

    Attributes
    ----------
    run : FinishedRun
    name : str
        By which `find_run` finds it.
    comparison : PairComparison or None
        Its p values and intervals are corrected for everything that the overview shows. None for the baseline.
    """

    run: FinishedRun
    name: str
    comparison: PairComparison | None

    @property
    def gain(self) -> float:
        """The difference in accuracy to the baseline, over the folds that both have."""
        return 0.0 if self.comparison is None else self.comparison.metrics["accuracy"].mean


@dataclass(frozen=True)
class Overview:
    """Several runs compared with a baseline.

    Attributes
    ----------
    baseline : FinishedRun
    rows : list of Row
        All runs including the baseline, by their difference in accuracy to the baseline, the best first.
    noise : BaselineNoise
    choice : str
        How the baseline was chosen; "" if the user named it.
    notes : list of str
        Which runs are not shown, and why.
    """

    baseline: FinishedRun
    rows: list[Row]
    noise: BaselineNoise
    choice: str
    notes: list[str]

    @property
    def text(self) -> str:
        """The table and its notes, in lines of at most 80 columns."""
        identity = self.baseline.identity
        about = f"{identity.dataset}, {identity.folds} folds, RNG_SEED {identity.rng_seed}"
        details = f"{self.choice}; {about}" if self.choice else about
        lines = [f"Baseline: {display_path(self.baseline.path)}"]
        lines += textwrap.wrap(details, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += ["", HEADING]
        has_macro_f1 = MACRO_F1 in metrics_of(self.baseline)
        if has_macro_f1:
            lines.append(MACRO_F1_HEADING)
        frequency: Counter[str] = Counter()
        for row in self.rows:
            if row.comparison is not None:
                frequency.update({change.text for change in row.comparison.changes})
        best = next((row for row in self.rows if not row.run.diverged), None)
        for row in self.rows:
            lines.append(_numbers_line(row, is_best=row is best))
            if has_macro_f1:
                lines.append(f"{'':8}{_metric_columns(row, MACRO_F1)}".rstrip())
            lines.append(_changes_lines(row, frequency))
        lines += ["", wrap(self._explanation()), *map(wrap, self.notes)]
        return "\n".join(lines)

    def _explanation(self) -> str:
        differences = [each for row in self.rows if row.comparison for each in row.comparison.metrics.values()]
        sentences = ["* marks the best accuracy. ± is half the width of the 95 % confidence interval."]
        tests = sum(difference.has_interval for difference in differences)
        if tests > 1:
            sentences.append(f"p and ± are corrected for {tests} comparisons (Holm).")
        sentences.append(describe_noise(self.noise, differences))
        if any(row.run.diverged for row in self.rows):
            sentences.append("A run with diverged folds is never marked.")
        if any(row.run.resumed for row in self.rows):
            sentences.append("> is the time since a run was resumed.")
        return " ".join(sentences)


def overview_of_all(runs_dir: Path, last: int = DEFAULT_LAST, chosen: FinishedRun | None = None) -> Overview:
    """Return the overview of the newest finished runs that are comparable with the baseline.

    Parameters
    ----------
    runs_dir : Path
    last : int
        How many runs are shown at most. The noise is estimated on all of them.
    chosen : FinishedRun, optional
        The baseline. By default, it is the oldest of the newest `last` runs that are comparable with the newest.

    Raises
    ------
    ConfigurationError
        If there are fewer than two such runs.
    """
    where = display_path(runs_dir)
    runs, problems = read_runs(runs_dir)
    notes = []
    if problems:
        notes.append(f"Not shown: {_count_runs(len(problems))}, for example: {problems[0]}")
    usable = [run for run in runs if len(run.folds) >= 2]
    if len(usable) < len(runs):
        count = _count_runs(len(runs) - len(usable))
        notes.append(f"Not shown: {count} in which fewer than two folds have a result.")
    if not usable:
        raise ConfigurationError("\n".join([f"There is no finished run in {where}.", *notes]))
    reference = usable[0] if chosen is None else chosen
    group = [run for run in usable if comparable(reference, run)]
    others = Counter(run.identity.dataset for run in usable if run not in group)
    if others:
        named = ", ".join(
            f"{count} on {dataset}{_other_pictures(reference, usable, dataset)}" for dataset, count in others.items()
        )
        notes.append(f"Not shown: runs whose folds consist of different images ({named}). Name runs to compare them.")
    shown = group[:last]
    baseline = shown[-1] if chosen is None else chosen
    compared = [run for run in shown if run.path != baseline.path]
    if not compared:
        only = f"There is nothing in {where} to compare {display_path(reference.path)} with."
        raise ConfigurationError("\n".join([only, *notes]))
    older = len([run for run in group[last:] if run.path != baseline.path])
    if older:
        notes.insert(0, f"Not shown: {_count_runs(older)} before these (--last {len(group)} shows all).")
    choice = ""
    if chosen is None:
        newest = f"the {last} newest" if older else f"{len(group)}"
        choice = f"the oldest of {newest} comparable runs in {where}"
    return overview_of(baseline, compared, runs_dir, group, choice, notes)


def _other_pictures(reference: FinishedRun, runs: Sequence[FinishedRun], dataset: str) -> str:
    """Return how many training images more or fewer the newest run with other images has, if it is on the same data."""
    if dataset != reference.identity.dataset:
        return ""
    newest = next(run for run in runs if run.identity.dataset == dataset and not comparable(reference, run))
    return size_change(reference.identity, newest.identity)


def _count_runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def overview_of(
    baseline: FinishedRun,
    others: Sequence[FinishedRun],
    runs_dir: Path,
    history: Sequence[FinishedRun] = (),
    choice: str = "",
    notes: Sequence[str] = (),
) -> Overview:
    """Compare several runs with a baseline; p values and intervals are corrected for everything that is shown.

    Parameters
    ----------
    baseline : FinishedRun
    others : sequence of FinishedRun
    runs_dir : Path
        The folder in which the user finds runs by their names.
    history : sequence of FinishedRun, optional
        Other runs, on which the noise is estimated together with these.
    choice : str
        How the baseline was chosen.
    notes : sequence of str
        What the text shows below the table.

    Raises
    ------
    ConfigurationError
        With one line per run that cannot be compared with the baseline.
    """
    reasons = [why_not_comparable(baseline, other) for other in others]
    refused = [reason for reason in reasons if reason is not None]
    if refused:
        raise ConfigurationError("\n".join(refused))
    noise = baseline_noise(baseline, [*others, *history])
    comparisons = _corrected_together([compare_with_baseline(other, noise) for other in others])
    names = shortest_names([baseline, *others], runs_dir)
    rows = [Row(baseline, names[baseline.path], None)]
    rows += [Row(each.after, names[each.after.path], each) for each in comparisons]
    rows.sort(key=lambda row: row.gain, reverse=True)
    return Overview(baseline, rows, noise, choice, list(notes))


def _corrected_together(comparisons: Sequence[PairComparison]) -> list[PairComparison]:
    """Return comparisons whose metrics are corrected for all comparisons and metrics."""
    differences = iter(correct_together([metric for each in comparisons for metric in each.metrics.values()]))
    return [replace(each, metrics={name: next(differences) for name in each.metrics}) for each in comparisons]


def _numbers_line(row: Row, is_best: bool) -> str:
    """Return the first line of a row: day, metrics with their differences, and duration."""
    line = f"{'*' if is_best else ' '} {row.run.created:%d %b}"
    for metric in METRICS:
        line += _metric_columns(row, metric)
    took = format_duration(row.run.seconds)
    return line + f"{'>' + took if row.run.resumed else took:>8}"


def _metric_columns(row: Row, metric: str) -> str:
    """Return the mean of a metric over a run's folds, and its difference to the baseline."""
    mean = float(np.mean([metric_of(fold, metric) for fold in row.run.folds.values()]))
    columns = f"{mean:>8.{_decimals(mean)}f}"
    if row.comparison is None:
        return columns + " " * 24
    return columns + _difference_columns(row.comparison.metrics[metric])


def _difference_columns(difference: MetricDifference) -> str:
    if difference.is_identical:
        return f"{'identical':^18}{'':6}"
    change = signed(difference.mean, _decimals(difference.mean))
    if not difference.has_interval:
        return f" {change:<16} {'–':>6}"
    half_width = difference.ci_half_width
    p = "<0.001" if difference.corrected_p < 0.001 else f"{difference.corrected_p:.2g}"
    return f"{f'{change} ± {half_width:.{_decimals(half_width)}f}':>17} {p:>6}"


def _decimals(value: float) -> int:
    """Return 4, or fewer decimals for a large number, such as the loss of a run that diverged."""
    return max(0, 5 - len(f"{abs(value):.0f}"))


def _changes_lines(row: Row, frequency: Mapping[str, int]) -> str:
    """Return the lines below the numbers: time of day, what changed, and what is significant."""
    text = "baseline"
    significant = []
    if row.comparison is not None:
        text = describe_changes(row.comparison.changes, MAX_CHANGES_WIDTH, frequency)
        for metric, difference in row.comparison.metrics.items():
            if difference.verdict in ("better", "worse"):
                significant.append(f"{metric} {difference.verdict}")
    if row.run.diverged:
        text += f" ({', '.join(row.run.diverged)} diverged)"
    if significant:
        text += f": {', '.join(significant)}"
    if row.name == display_path(row.run.path):  # the user renamed the folder, or no time of day distinguishes it
        text = f"{row.name}: {text}"
    else:
        text = f"{row.name} {text}"
    wrapper = textwrap.TextWrapper(WIDTH, "  ", " " * 8, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)
