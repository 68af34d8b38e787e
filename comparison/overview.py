"""Several runs compared with a baseline: text and figure."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comparison.changes import comparable, describe_changes, why_not_comparable
from comparison.forest_plot import add_title, draw_panel
from comparison.pair import METRICS, PairComparison, compare_runs, signed
from comparison.run_reader import FinishedRun, display_path, read_runs
from comparison.statistics import MetricDifference, holm
from experiment.errors import ConfigurationError
from experiment.formatting import WIDTH, format_duration, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CHANGES_WIDTH = 105  # characters of the changes in a row of the text
MAX_ROWS_DRAWN = 40
HEADING = "        accuracy      change           p    loss      change           p    took"


@dataclass(frozen=True)
class Row:
    """A run of the overview; `comparison` is None, and `p` (corrected, per metric) empty, for the baseline."""

    run: FinishedRun
    comparison: PairComparison | None
    p: dict[str, float]


@dataclass(frozen=True)
class Overview:
    """Several runs compared with a baseline.

    Attributes
    ----------
    baseline : FinishedRun
    rows : list of Row
        All runs including the baseline, by accuracy, the best first.
    choice : str
        How the baseline was chosen; "" if the user named it.
    notes : list of str
        Which runs are not shown, and why.
    """

    baseline: FinishedRun
    rows: list[Row]
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
        frequency: Counter[str] = Counter()
        for row in self.rows:
            if row.comparison is not None:
                frequency.update({change.text for change in row.comparison.changes})
        for place, row in enumerate(self.rows):
            lines += [_numbers_line(row, is_best=place == 0), _changes_lines(row, frequency)]
        lines += ["", wrap(self._explanation()), *map(wrap, self.notes)]
        return "\n".join(lines)

    def _explanation(self) -> str:
        sentences = ["* marks the highest accuracy. ± is the standard error."]
        corrected_for = max(sum(not math.isnan(row.p.get(metric, math.nan)) for row in self.rows) for metric in METRICS)
        if corrected_for > 1:
            sentences.append(f"p is corrected for {corrected_for} comparisons per metric (Holm).")
        if any(row.run.resumed for row in self.rows):
            sentences.append("> is the time since a run was resumed.")
        return " ".join(sentences)

    def figure(self) -> "Figure":
        """Draw accuracy and loss side by side, one row per run, the best at the top."""
        from experiment.plots import new_figure

        compared = [(row.comparison, row.p) for row in self.rows if row.comparison is not None]
        shown = compared[:MAX_ROWS_DRAWN]
        labels = [_label(comparison) for comparison, _ in shown]
        figure = new_figure(10, 0.45 * len(shown) + 2.4)
        for panel, metric in zip(figure.subplots(1, 2, sharey=True), METRICS, strict=True):
            differences = [comparison.metrics[metric] for comparison, _ in shown]
            draw_panel(panel, metric, differences, labels, [p[metric] for _, p in shown])
        runs = _count_runs(len(compared))
        if len(shown) < len(compared):
            runs = f"The {len(shown)} best of {runs}"
        add_title(figure, f"{runs} compared with {display_path(self.baseline.path)}")
        return figure


def overview_of_all(runs_dir: Path) -> Overview:
    """Return the overview of all finished runs that are comparable with the newest; the oldest is the baseline.

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
    newest = usable[0]
    group = [run for run in usable if comparable(run, newest)]
    others = Counter(run.identity.dataset for run in usable if run not in group)
    if others:
        named = ", ".join(f"{count} on {dataset}" for dataset, count in others.items())
        notes.append(f"Not shown: runs whose folds consist of different images ({named}). Name runs to compare them.")
    if len(group) == 1:
        only = f"There is nothing in {where} to compare {display_path(newest.path)} with."
        raise ConfigurationError("\n".join([only, *notes]))
    return overview_of(group[-1], group[:-1], f"the oldest of {len(group)} comparable runs in {where}", notes)


def _count_runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def overview_of(
    baseline: FinishedRun, others: Sequence[FinishedRun], choice: str = "", notes: Sequence[str] = ()
) -> Overview:
    """Compare several runs with a baseline; p values are corrected for their number.

    Parameters
    ----------
    baseline : FinishedRun
    others : sequence of FinishedRun
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
    comparisons = [compare_runs(baseline, other) for other in others]
    corrected = {metric: holm([_p_to_correct(each, metric) for each in comparisons]) for metric in METRICS}
    rows = [Row(baseline, None, {})]
    for index, comparison in enumerate(comparisons):
        rows.append(Row(comparison.after, comparison, {metric: corrected[metric][index] for metric in METRICS}))
    rows.sort(key=lambda row: _mean(row.run, "accuracy"), reverse=True)
    return Overview(baseline, rows, choice, list(notes))


def _p_to_correct(comparison: PairComparison, metric: str) -> float:
    """Return the p value of a metric; NaN for an identical repetition, which is not a test of anything."""
    return math.nan if comparison.is_identical else comparison.metrics[metric].p


def _mean(run: FinishedRun, metric: str) -> float:
    return float(np.mean([getattr(fold, metric) for fold in run.folds.values()]))


def _numbers_line(row: Row, is_best: bool) -> str:
    """Return the first line of a row: day, metrics with their differences, and duration."""
    line = f"{'*' if is_best else ' '} {row.run.started:%d %b}"
    for metric in METRICS:
        mean = _mean(row.run, metric)
        line += f"{mean:>8.{_decimals(mean)}f}"
        if row.comparison is None:
            line += " " * 24
        else:
            line += _difference_columns(row.comparison.metrics[metric], row.p[metric])
    took = format_duration(row.run.seconds)
    return line + f"{'>' + took if row.run.resumed else took:>8}"


def _difference_columns(difference: MetricDifference, p: float) -> str:
    if difference.is_identical:
        return f"{'identical':^18}{'':6}"
    if math.isnan(p):
        shown = "–"
    elif p < 0.001:
        shown = "<0.001"
    else:
        shown = f"{p:.2g}"
    change = signed(difference.mean, _decimals(difference.mean))
    error = difference.standard_error
    return f"{f'{change} ± {error:.{_decimals(error)}f}':>17} {shown:>6}"


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
            verdict = difference.verdict(row.p[metric])
            if verdict in ("better", "worse"):
                significant.append(f"{metric} {verdict}")
    if not re.search(r"-\d{8}-\d{6}(-\d+)?$", row.run.path.name):  # the user renamed the folder
        text = f"{display_path(row.run.path)}: {text}"
    if row.run.diverged:
        text += f" ({', '.join(row.run.diverged)} diverged)"
    if significant:
        text += f": {', '.join(significant)}"
    time = f"  {row.run.started:%H:%M} "
    return textwrap.fill(text, WIDTH, initial_indent=time, subsequent_indent=" " * 8, break_on_hyphens=False)


def _label(comparison: PairComparison) -> str:
    changes = describe_changes(comparison.changes, 70)
    return textwrap.fill(f"{comparison.after.started:%d %b %H:%M} {changes}", 46)
