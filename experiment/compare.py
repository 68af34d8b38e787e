"""Did it help? Compares finished runs, fold by fold.

Two runs with the same data, FOLDS and RNG_SEED cut the training images into the same folds, so what makes a fold hard
makes it hard for both, and drops out of the difference. The mean of the folds' differences says what a change did; its
standard error (the ±) says how far that may be off; p says in what share of all cases chance alone would bring as large
a difference, had the change done nothing. Below 0.05 it is called better or worse.

Without names you get all runs that can be compared with the newest, a row each, against the oldest of them. With
names: those, against the first. With one name: that run against the one from which it differs in the fewest things.

What this can tell. The question behind p is: would it also be so on other data of the same kind? The training images of
the folds overlap, so the folds are no five independent trials, and the standard error is made larger for that (Nadeau
and Bengio, 2003). A plain paired t-test leaves that out: it answers a smaller question, whether it would be so with
other seeds on these very images, and says "better" more often.

What this cannot tell. That a change does nothing: few folds see only large effects (with 5, one must be 3.6 times its ±
to be found in 80 of 100 cases; with 2, 13 times its ± to be called anything at all). Which of several changes made at
once did it. Whether the best of many runs is really better: chance picks, too, so where several runs are compared, each
p is made larger for their number (Holm, 1979), and a line says how far the best would lead if nothing had helped. The
test images take no part in it: whoever chooses by them has no test any more.
"""

import argparse
import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.console import display_name, format_seconds, say
from experiment.errors import ConfigurationError, user_errors
from experiment.figures import BELOW_THE_PANELS, BLUE, GRID, ORANGE, Look, new_figure, png_of
from experiment.past_runs import (
    Difference,
    PastRun,
    as_run,
    comparable,
    default_runs_dirs,
    differences,
    find_run,
    finished_runs,
    folders_in_words,
    nearest,
    read_runs,
    why_not_comparable,
)
from experiment.run_directory import path_from_here, save_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("accuracy", "loss")
# What the command draws; compare.png is a run's own, with its nearest, and its report shows it.
PAIR_PICTURE, OVERVIEW_PICTURE = "pair.png", "overview.png"
SIGNIFICANT = 0.05  # p below which a difference is called one
WIDTH = 80  # columns that a text may have
LAYERS_SHOWN = 6  # changed layers that a pair's text shows
CHANGES_ROOM = 105  # characters that what differs may take in a row of the overview
REASONS_SHOWN = 3  # of the runs that the overview passes over
LEAST_F1 = 0.0005  # a class whose F1 changed by less is not named
CLASSES_SHOWN = 3
ROWS_DRAWN = 40  # runs in a picture
FAR_OUT = 20  # times what is usual, and a picture has a logarithmic axis

# How the pictures look, as keyword arguments of matplotlib's; a mean's inside says whether it is told from chance.
FOLD_COLOUR: Look = {"color": BLUE, "alpha": 0.6}
FOLD_POINTS: Look = {"s": 20, "linewidth": 0, **FOLD_COLOUR}
MEANS: Look = {"marker": "D", "edgecolors": ORANGE, "s": 30, "zorder": 3}
INTERVALS: Look = {"fmt": "none", "color": ORANGE, "capsize": 3}
TOLD, NOT_TOLD = ORANGE, "white"
BAND: Look = {"color": "black", "alpha": 0.04, "linewidth": 0}
NO_DIFFERENCE: Look = {"color": "black", "linewidth": 1}
LABELS: Look = {"fontsize": 8, "parse_math": False}
TICKS_BELOW: Look = {"axis": "x", "labelsize": 8}
TICKS_OF_ROWS: Look = {"axis": "y", "length": 0}
MOST_TICKS_BELOW: Look = {"axis": "x", "nbins": 6}
AXIS_LABEL: Look = {"fontsize": 9}
ABOVE_LEFT: Look = {"x": 0.01, "y": 1.01, "ha": "left", "va": "bottom", "fontsize": 9}
ABOVE_RIGHT: Look = {"x": 0.99, "y": 1.01, "ha": "right", "va": "bottom", "fontsize": 9}
LEGEND: Look = {"ncols": 3, "fontsize": 8, "frameon": False, **BELOW_THE_PANELS}
TITLE: Look = {"fontsize": 11, "parse_math": False}
PANEL_TITLE: Look = {"fontsize": 10}


# --- the statistics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What became of one figure ("accuracy", "loss", or the F1 of a class) in the folds that two runs have in common.

    `mean`, `error` and `p` are what `paired_difference` makes of them.
    """

    figure: str
    before: list[float]
    after: list[float]
    mean: float
    error: float
    p: float

    @property
    def in_folds(self) -> list[float]:
        """The difference in each fold."""
        return [new - old for old, new in zip(self.before, self.after, strict=True)]

    @property
    def is_better(self) -> bool:
        """Whether it went to the good side: less loss, more of everything else."""
        return self.mean < 0 if self.figure == "loss" else self.mean > 0

    @property
    def is_the_same(self) -> bool:
        """Whether it is equal to the bit in every fold."""
        return self.before == self.after

    @property
    def reach(self) -> float:
        """How far the 95 % interval goes to either side of the mean."""
        from scipy.special import stdtrit

        return self.error * float(stdtrit(len(self.after) - 1, 0.975))

    @property
    def farthest(self) -> float:
        """How far from 0 a fold's difference or an end of the interval lies."""
        return max(abs(self.mean) + self.reach, *map(abs, self.in_folds))


@dataclass(frozen=True)
class Comparison:
    """How a run compares with an earlier one: `effects` by figure, `f1` by the name of the class."""

    before: PastRun
    after: PastRun
    differences: list[Difference]
    effects: dict[str, Effect]
    f1: dict[str, Effect]

    @property
    def is_the_same(self) -> bool:
        """Whether every figure of every fold is equal to the bit."""
        return all(effect.is_the_same for effect in (*self.effects.values(), *self.f1.values()))

    @property
    def folds(self) -> int:
        """How many folds both have."""
        return len(self.effects["accuracy"].after)

    @property
    def text(self) -> str:
        """What differs, and whether it helped, as the terminal and report.md show it."""
        return text_of_pair(self)

    def figure(self) -> "Figure":
        """Draw it: accuracy, loss and the F1 of each class."""
        return draw_pair(self)


def against_nearest(run_dir: Path, results: dict[str, Any], identity: dict[str, Any]) -> Comparison | None:
    """Return how a run that is about to be saved compares with the nearest one beside it; None if there is none.

    Parameters
    ----------
    run_dir : Path
        The run's folder; the finished runs beside it are looked at.
    results, identity : dict
        What its results.json will hold, and "identity" of its config.json.

    Raises
    ------
    ConfigurationError
        If these two are not what `past_runs` reads.
    """
    after = as_run(run_dir, results, identity)
    before = nearest(after, finished_runs(run_dir.parent))
    return None if before is None else compare(before, after)


def compare(before: PastRun, after: PastRun) -> Comparison:
    """Compare a run with an earlier one.

    Raises
    ------
    ConfigurationError
        If their folds are not the same images, or have too few results.
    """
    reason = why_not_comparable(before, after)
    if reason is not None:
        raise ConfigurationError(reason)
    pairs = [(fold, after.folds[name]) for name, fold in before.folds.items() if name in after.folds]
    folds = after.identity.folds
    effects = {}
    for figure in FIGURES:
        old = [getattr(one, figure) for one, _ in pairs]
        new = [getattr(other, figure) for _, other in pairs]
        effects[figure] = Effect(figure, old, new, *paired_difference(old, new, folds))
    f1 = {}
    folds_of_both = [fold for pair in pairs for fold in pair]
    for name in folds_of_both[0].f1:
        if all(name in fold.f1 for fold in folds_of_both):
            old = [one.f1[name] for one, _ in pairs]
            new = [other.f1[name] for _, other in pairs]
            f1[name] = Effect(name, old, new, *paired_difference(old, new, folds))
    return Comparison(before, after, differences(before, after), effects, f1)


def paired_difference(before: Sequence[float], after: Sequence[float], folds: int) -> tuple[float, float, float]:
    """Return mean, standard error and two-sided p of a figure's differences in J ≥ 2 folds of two runs.

    The squared error is the differences' variance times 1/J + 1/(K − 1), with K = `folds`, all that the experiment has:
    a fold's test set is to its training set as 1 to K − 1 (Nadeau and Bengio, 2003). Where all folds differ alike, no
    spread tells how far chance reaches: p is NaN; where none differs at all it is 1.
    """
    from scipy.special import stdtr

    in_folds = np.subtract(after, before)
    mean = float(in_folds.mean())
    rounding = 1e-12 * np.abs([before, after]).max()
    if np.ptp(in_folds) <= rounding:
        return mean, 0.0, 1.0 if mean == 0 else math.nan
    error = math.sqrt(in_folds.var(ddof=1) * (1 / len(in_folds) + 1 / (folds - 1)))
    p = 2 * stdtr(len(in_folds) - 1, -abs(mean) / error)
    return mean, error, float(p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm, 1979), in their order.

    If no change did anything, the chance that even one of the corrected values is below 0.05 is at most 5 %. NaN stays
    NaN, and does not count.
    """
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def lead_by_chance(errors: Sequence[float]) -> float:
    """Return by how much the best of several runs that do nothing would lead the run that all are compared with.

    Parameters
    ----------
    errors : sequence of float
        The standard errors of their differences to that run. The half of a difference's variance is that run's own
        and the same in all of them; the other half is what the best is picked by. The largest of n standard normal
        numbers is taken for the normal quantile of (n − 0.375)/(n + 0.25) (Blom, 1958). Where the errors are those of
        `paired_difference`, this is the luck of other data of the same kind; that of other seeds alone is about two
        thirds of it.
    """
    from scipy.special import ndtri

    count = len(errors)
    of_a_run = math.sqrt(float(np.mean(np.square(errors))) / 2)
    return of_a_run * float(ndtri((count - 0.375) / (count + 0.25)))


# --- the words for a pair ------------------------------------------------------------------------------------------


def text_of_pair(comparison: Comparison) -> str:
    """Return what differs between two runs, and whether that helped, in lines of at most 80 columns."""
    lines = [f"Against {path_from_here(comparison.before.path)}"]
    all_folds = comparison.after.identity.folds
    if comparison.folds < all_folds:
        lines.append(f"  over the {comparison.folds} of {all_folds} folds that both have")
    lines += _difference_lines(comparison.differences)
    if comparison.is_the_same:
        lines.append("  the same in every fold, to the bit")
    else:
        lines += _effect_lines(comparison)
    return _printable("\n".join(lines))


def _difference_lines(found: list[Difference]) -> list[str]:
    lines = []
    for difference in found:
        if difference.name != "layer":
            lines += _named(difference.name, difference.text)
    layers = _layer_texts(found)
    for text in layers[:LAYERS_SHOWN]:
        lines += _named("layer", text)
    if len(layers) > LAYERS_SHOWN:
        lines += _named("layers", f"and {len(layers) - LAYERS_SHOWN} more changes")
    return lines


def _named(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name:<15}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 19)


def _layer_texts(found: list[Difference]) -> list[str]:
    """Return what became of layers, and of how many, where several were changed alike."""
    counts = Counter(difference.text for difference in found if difference.name == "layer")
    return [text if count == 1 else f"{text}, {count} times" for text, count in counts.items()]


def _effect_lines(comparison: Comparison) -> list[str]:
    lines = []
    for figure, effect in comparison.effects.items():
        said = " (± standard error)" if figure == FIGURES[0] else ""  # once, so that nobody takes it for a deviation
        old, new = float(np.mean(effect.before)), float(np.mean(effect.after))
        lines.append(
            f"  {figure:<10}{old:.4f} → {new:.4f}   {_signed(effect.mean)} ± {effect.error:.4f}{said}",
        )
        lines.append(f"{'':12}{verdict_of(effect)}")
    most = sorted(comparison.f1.values(), key=lambda effect: -abs(effect.mean))
    named = [effect for effect in most if abs(effect.mean) >= LEAST_F1][:CLASSES_SHOWN]
    if named:
        classes = ", ".join(f"{display_name(effect.figure)} {_signed(effect.mean, 3)}" for effect in named)
        lines += textwrap.wrap(f"F1, most changed: {classes}", WIDTH, initial_indent="  ", subsequent_indent=" " * 12)
    return lines


def verdict_of(effect: Effect) -> str:
    """Return what can be said of a difference: "better", "worse", or that these folds cannot tell."""
    if math.isnan(effect.p):
        return "no difference that these folds can tell (all differ alike, so no p)"
    shown = "p < 0.0001" if effect.p < 0.0001 else f"p = {effect.p:.2g}"
    if effect.p >= SIGNIFICANT:
        return f"no difference that these folds can tell ({shown})"
    alike = sum(difference * effect.mean > 0 for difference in effect.in_folds)
    return f"{_better_or_worse(effect)} ({shown}), in {alike} of {len(effect.after)} folds"


def _better_or_worse(effect: Effect) -> str:
    return "better" if effect.is_better else "worse"


def _signed(value: float, digits: int = 4) -> str:
    """Return a number with its sign, and a minus that is one; what is rounded to nothing is +0."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        text = f"{0.0:+.{digits}f}"
    return text.replace("-", "−")


def _printable(text: str) -> str:
    """Return a text without what no stream takes: a folder's name may hold bytes that are no text."""
    return text.encode(errors="replace").decode()


# --- the overview --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run of the overview; `comparison` and the corrected p values are None of the one that all are compared with."""

    run: PastRun
    comparison: Comparison | None
    p: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Its mean over the folds."""
        return _mean_of(self.run, "accuracy")


@dataclass(frozen=True)
class Overview:
    """Several runs, all compared with the first: `rows` by accuracy, the best first."""

    first: PastRun
    rows: list[Row]
    chosen: str
    notes: list[str]

    @property
    def text(self) -> str:
        """The table, and what it says, in lines of at most 80 columns."""
        return text_of_overview(self)

    @property
    def comparisons(self) -> list[Comparison]:
        """Those of all runs but the first, the best first."""
        return [row.comparison for row in self.rows if row.comparison is not None]

    def figure(self) -> "Figure":
        """Draw it: accuracy and loss, a row a run."""
        return draw_several(self)


def overview_of(first: PastRun, others: Sequence[PastRun], chosen: str = "", notes: Sequence[str] = ()) -> Overview:
    """Compare several runs with the first, with p values that are corrected for their number.

    Parameters
    ----------
    first, others
        The run that all are compared with, and these.
    chosen : str
        How the first one was chosen, in words.
    notes : sequence of str
        What else is to be said below the table, a line each.

    Raises
    ------
    ConfigurationError
        A line for each run that cannot be compared with the first.
    """
    reasons = [why_not_comparable(first, other) for other in others]
    refused = [reason for reason in reasons if reason is not None]
    if refused:
        raise ConfigurationError("\n".join(refused))
    comparisons = [compare(first, other) for other in others]
    corrected = {figure: holm([_p_to_correct(each, figure) for each in comparisons]) for figure in FIGURES}
    rows = [Row(first, None, {})]
    for index, comparison in enumerate(comparisons):
        rows.append(Row(comparison.after, comparison, {figure: corrected[figure][index] for figure in FIGURES}))
    rows.sort(key=lambda row: row.accuracy, reverse=True)
    return Overview(first, rows, chosen, list(notes))


def _p_to_correct(comparison: Comparison, figure: str) -> float:
    """Return the p of a figure; NaN of a mere repetition, in which chance has no say."""
    return math.nan if comparison.is_the_same else comparison.effects[figure].p


def overview_of_evening(runs_dirs: Sequence[Path]) -> Overview:
    """Return the overview of all finished runs that are comparable with the newest, against the oldest of them.

    Raises
    ------
    ConfigurationError
        If there are no two such runs; it says where was looked.
    """
    where = folders_in_words(runs_dirs)
    runs, notes = read_runs(*runs_dirs)
    notes = _first_few(notes)
    whole = [run for run in runs if len(run.folds) >= 2]
    diverged = [run for run in runs if len(run.folds) < 2]
    notes += [f"{path_from_here(run.path)} has too few folds that did not diverge." for run in diverged]
    if not whole:
        raise ConfigurationError("\n".join([f"There is no finished run in {where}.", *notes]))
    newest = whole[0]
    alike = [run for run in whole if comparable(run, newest)]
    notes += _notes_on_others([run for run in whole if run not in alike])
    if len(alike) == 1:
        only = f"There is nothing in {where} to compare {path_from_here(newest.path)} with."
        raise ConfigurationError("\n".join([only, *notes]))
    return overview_of(alike[-1], alike[:-1], f"the oldest of these {len(alike)} in {where}", notes)


def _first_few(reasons: list[str]) -> list[str]:
    shown = reasons[:REASONS_SHOWN]
    if len(reasons) > REASONS_SHOWN:
        shown.append(f"{len(reasons) - REASONS_SHOWN} more runs are unfinished or cannot be compared.")
    return shown


def _notes_on_others(others: Sequence[PastRun]) -> list[str]:
    """Return a line on the runs that the newest cannot be compared with."""
    if not others:
        return []
    datasets = Counter(run.identity.dataset for run in others)
    named = ", ".join(f"{count} on {name}" for name, count in datasets.items())
    return [f"Not here, since their folds are other images than the newest's: {named}. Name them to compare them."]


def text_of_overview(overview: Overview) -> str:
    """Return the table of an overview, a row a run and what differs below it, and what it says."""
    identity = overview.first.identity
    lines = [f"Against {path_from_here(overview.first.path)}"]
    about = f"{identity.dataset}, {identity.folds} folds, RNG_SEED {identity.rng_seed}"
    lines += _wrapped(f"{overview.chosen}; {about}" if overview.chosen else about, indent=2)
    lines += ["", _heading()]
    shared = Counter(text for each in overview.comparisons for text in _texts_of(each.differences))
    for place, row in enumerate(overview.rows):
        lines += _row_lines(row, shared, is_best=place == 0)
    lines += ["", *_closing_lines(overview), *[line for note in overview.notes for line in _wrapped(note)]]
    return _printable("\n".join(lines))


def _heading() -> str:
    columns = f"{'change':^18}{'p':>6}"
    return f"{'':8}{'accuracy':>8}{columns}{'loss':>8}{columns}{'took':>8}"


def _row_lines(row: Row, shared: Counter[str], is_best: bool) -> list[str]:
    when, time = _when(row.run.started)
    mark = "*" if is_best else " "
    first = f"{mark} {when:<6}"
    for figure in FIGURES:
        mean = _mean_of(row.run, figure)
        first += f"{mean:>8.{_decimals(mean)}f}{_difference_columns(row, figure)}"
    took = format_seconds(row.run.seconds)
    first += f"{'>' + took if row.run.resumed else took:>8}"
    below = _wrapped(_what_differs(row, shared), indent=8)
    if time:
        below[0] = f"  {time:<6}{below[0][8:]}"
    return [first, *below]


def _mean_of(run: PastRun, figure: str) -> float:
    return float(np.mean([getattr(fold, figure) for fold in run.folds.values()]))


def _when(started: datetime) -> tuple[str, str]:
    """Return the time of day, and nothing below it; of another day its date, and the time below it."""
    time = started.strftime("%H:%M")
    if started.date() == datetime.now().date():
        return time, ""
    return started.strftime("%d %b"), time


def _difference_columns(row: Row, figure: str) -> str:
    if row.comparison is None:
        return " " * 24
    effect = row.comparison.effects[figure]
    if effect.is_the_same:
        return f"{'the same':^18}{'':6}"
    p = row.p[figure]
    if math.isnan(p):
        shown = "–"
    elif p < 0.001:
        shown = "<0.001"
    else:
        shown = f"{p:.2g}"
    difference = f"{_signed(effect.mean, _decimals(effect.mean))} ± {effect.error:.{_decimals(effect.error)}f}"
    return f"{difference:>17} {shown:>6}"


def _decimals(value: float) -> int:
    """Return how many decimals keep a large number, such as the loss of a run that diverged, as narrow as others."""
    return max(0, 5 - len(f"{abs(value):.0f}"))


def _what_differs(row: Row, shared: Counter[str]) -> str:
    """Return what differs from the first run, in at most two lines or so, and what that is told to have done.

    What few rows share comes first: what all have in common tells none from another.
    """
    if row.comparison is None:
        text = "the one that all are compared with"
    else:
        text = changes_text(row.comparison.differences, CHANGES_ROOM, shared)
    if not _has_a_stamp(row.run.path):
        text = f"{row.run.path.name}: {text}"
    if row.run.diverged:
        text += f" ({', '.join(row.run.diverged)} diverged)"
    told = _told(row)
    return f"{text}: {told}" if told else text


def _has_a_stamp(path: Path) -> bool:
    """Return whether a folder has the name that the program gave it, which ends with a time."""
    return re.search(r"-\d{8}-\d{6}(-\d+)?$", path.name) is not None


def _texts_of(found: list[Difference]) -> list[str]:
    """Return each difference as a text, layers last."""
    texts = [f"{difference.name} {difference.text}" for difference in found if difference.name != "layer"]
    return texts + _layer_texts(found)


def changes_text(found: list[Difference], room: int, shared: Mapping[str, int] | None = None) -> str:
    """Return what differs as one text that takes about so much room; what finds none is counted.

    Parameters
    ----------
    found : list of Difference
    room : int
        In characters.
    shared : mapping of str to int, optional
        How many runs have each of the texts; those of the fewest come first.
    """
    if not found:
        return "a repetition"
    texts = _texts_of(found)
    if shared is not None:
        texts.sort(key=lambda text: shared[text])
    shown = [textwrap.shorten(texts[0], room, placeholder=" …")]
    for text in texts[1:]:
        if len(", ".join([*shown, text])) > room:
            return f"{', '.join(shown)} and {len(texts) - len(shown)} more"
        shown.append(text)
    return ", ".join(shown)


def _told(row: Row) -> str:
    """Return which figures are told to be better or worse, after the correction; "" for none."""
    if row.comparison is None:
        return ""
    told = []
    for figure, effect in row.comparison.effects.items():
        if row.p[figure] < SIGNIFICANT:
            told.append(f"{figure} {_better_or_worse(effect)}")
    return ", ".join(told)


def _closing_lines(overview: Overview) -> list[str]:
    sentences = ["± is the standard error."]
    corrected_for = max(_comparisons_with_p(overview, figure) for figure in FIGURES)
    if corrected_for > 1:
        sentences.append(f"p is corrected for {corrected_for} comparisons of each figure (Holm).")
    if any(row.run.resumed for row in overview.rows):
        sentences.append("> is the time since a run was resumed.")
    return _wrapped(" ".join(sentences)) + _wrapped(best_text(overview))


def _comparisons_with_p(overview: Overview, figure: str) -> int:
    """Return for how many comparisons `holm` corrects: it does not count NaN."""
    p_values = [row.p[figure] for row in overview.rows if row.comparison is not None]
    return sum(not math.isnan(p) for p in p_values)


def best_text(overview: Overview) -> str:
    """Return which run is the best, and what that is worth where the best of several was picked."""
    best = overview.rows[0]
    told = [each for each in overview.comparisons if not each.is_the_same]
    if best.comparison is None:
        said = "* No run has a higher accuracy than the one that all are compared with."
    else:
        lead = best.comparison.effects["accuracy"].mean
        said = f"* The highest accuracy, {lead:.4f} above the one that all are compared with."
    if len(told) < 2:
        return said
    chance = lead_by_chance([each.effects["accuracy"].error for each in told])
    return (
        f"{said} Had none of the {len(told)} done anything, the best of them would still be about {chance:.4f} above "
        "it: who picks the best picks luck, too."
    )


def _wrapped(text: str, indent: int = 0, width: int = WIDTH) -> list[str]:
    """Return the lines of a text; a minus or plus stays with what it belongs to."""
    margin = " " * indent
    glued = re.sub(r"([−+]) ", "\\1\u00a0", text)
    lines = textwrap.wrap(glued, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines] or [""]


# --- the pictures --------------------------------------------------------------------------------------------------


def draw_pair(comparison: Comparison) -> "Figure":
    """Draw how a run compares with an earlier one: accuracy and loss above, the F1 of each class below."""
    classes = list(comparison.f1.values())
    heights = [1.2, 0.32 * len(classes) + 0.4] if classes else [1.2]
    figure = new_figure(9, sum(heights) + 3.2)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, effect in enumerate(comparison.effects.values()):
        panel = figure.add_subplot(grid[0, column])
        _draw_effects(panel, [effect], [""], [effect.p])
        panel.set_title(f"{effect.figure}\n{_outcome(effect)}", **PANEL_TITLE)
    if classes:
        panel = figure.add_subplot(grid[1, :])
        names = [display_name(effect.figure) for effect in classes]
        _draw_effects(panel, classes, names, holm([effect.p for effect in classes]))
        panel.set_title("F1 of each class", **PANEL_TITLE)
    changes = "\n".join(_wrapped(changes_text(comparison.differences, 180)))
    _finish(figure, f"{changes}\n{comparison.after.path.name}\nagainst {comparison.before.path.name}")
    return figure


def _outcome(effect: Effect) -> str:
    if effect.is_the_same:
        return "the same, to the bit"
    said = _better_or_worse(effect) if effect.p < SIGNIFICANT else "cannot tell"
    return f"{_signed(effect.mean)} ± {effect.error:.4f}: {said}"


def draw_several(overview: Overview) -> "Figure":
    """Draw how runs compare with one and the same: accuracy and loss side by side, a row a run, the best at the top."""
    compared = [row for row in overview.rows if row.comparison is not None]
    rows = compared[:ROWS_DRAWN]
    comparisons = overview.comparisons[:ROWS_DRAWN]
    labels = [_label(comparison) for comparison in comparisons]
    figure = new_figure(10, 0.45 * len(rows) + 2.4)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, FIGURES, strict=True):
        effects = [comparison.effects[name] for comparison in comparisons]
        _draw_effects(panel, effects, labels, [row.p[name] for row in rows])
        panel.set_title(name, **PANEL_TITLE)
    runs = "1 run" if len(compared) == 1 else f"{len(compared)} runs"
    if len(rows) < len(compared):
        runs = f"The {len(rows)} best of {runs}"
    _finish(figure, f"{runs} against {overview.first.path.name}")
    return figure


def _label(comparison: Comparison) -> str:
    """Return what a row is called: when it was, and what differs."""
    when, time = _when(comparison.after.started)
    changes = changes_text(comparison.differences, 70)
    return "\n".join(_wrapped(f"{when} {time} {changes}".replace("  ", " "), width=46))


def _draw_effects(panel: "Axes", effects: Sequence[Effect], labels: Sequence[str], p_values: Sequence[float]) -> None:
    """Draw a row an effect: its folds as points, its mean and 95 % interval; 0 is in the middle.

    The mean is filled where p is below 0.05.
    """
    places = np.arange(len(effects))
    for place in places[1::2]:
        panel.axhspan(place - 0.5, place + 0.5, **BAND)  # leads the eye to the label
    panel.axvline(0, **NO_DIFFERENCE)
    points = np.concatenate([effect.in_folds for effect in effects])
    rows = np.repeat(places, [len(effect.in_folds) for effect in effects])
    panel.scatter(points, rows + 0.2, **FOLD_POINTS)
    means, reaches = np.array([(effect.mean, effect.reach) for effect in effects]).T
    panel.errorbar(means, places - 0.15, xerr=reaches, **INTERVALS)
    fills = [TOLD if p < SIGNIFICANT else NOT_TOLD for p in p_values]
    panel.scatter(means, places - 0.15, facecolors=fills, **MEANS)
    _lay_out_rows(panel, labels)
    _scale_differences(panel, [effect.farthest for effect in effects])
    _name_the_sides(panel, less_is_better=effects[0].figure == "loss")


def _lay_out_rows(panel: "Axes", labels: Sequence[str]) -> None:
    panel.set_yticks(range(len(labels)), [_printable(label) for label in labels], **LABELS)
    panel.set_ylim(len(labels) - 0.5, -0.5)  # the first row at the top
    panel.tick_params(**TICKS_OF_ROWS)


def _scale_differences(panel: "Axes", farthest: Sequence[float]) -> None:
    """Give a panel its axis, which ends beyond what lies farthest in each row.

    One run that diverged must not press all others onto 0: beyond what is usual the axis is then logarithmic.
    """
    changed = sorted(distance for distance in farthest if distance > 0) or [0.001]
    most = changed[-1]
    usual = float(f"{2 * changed[(len(changed) - 1) // 2]:.0e}")  # as the axis names it
    if most > FAR_OUT * usual:
        panel.set_xscale("symlog", linthresh=usual, linscale=2)
        panel.minorticks_off()
        places = [float(f"{place:.0e}") for place in (-most, -usual, 0, usual, most)]
        panel.set_xticks(places, [f"{place:g}".replace("-", "−") for place in places])
        panel.set_xlabel(f"difference (logarithmic beyond ±{usual:g})", **AXIS_LABEL)
        panel.set_xlim(-1.5 * most, 1.5 * most)
    else:
        panel.locator_params(**MOST_TICKS_BELOW)
        panel.set_xlabel("difference", **AXIS_LABEL)
        panel.set_xlim(-1.08 * most, 1.08 * most)
    panel.tick_params(**TICKS_BELOW)
    panel.grid(axis="x", **GRID)


def _name_the_sides(panel: "Axes", less_is_better: bool) -> None:
    left, right = ("better", "worse") if less_is_better else ("worse", "better")
    panel.text(s=f"← {left}", transform=panel.transAxes, **ABOVE_LEFT)
    panel.text(s=f"{right} →", transform=panel.transAxes, **ABOVE_RIGHT)


def _finish(figure: "Figure", title: str) -> None:
    """Give a figure its title, and the legend that its panels share."""
    from matplotlib.lines import Line2D

    fold = Line2D([], [], marker="o", linestyle="none", label="the difference in a fold", **FOLD_COLOUR)
    told = Line2D([], [], marker="D", color=TOLD, label="their mean and its 95 % interval")
    chance = "chance may have done it (p ≥ 0.05, corrected for the number of rows)"
    not_told = Line2D([], [], marker="D", color=ORANGE, markerfacecolor=NOT_TOLD, label=chance)
    figure.legend(handles=[fold, told, not_told], **LEGEND)
    figure.suptitle(_printable(title), **TITLE)


# --- the command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Compare the runs that are named, or all that are comparable with the newest."""
    arguments = _read_arguments()
    with user_errors():
        runs_dirs = [arguments.runs_dir] if arguments.runs_dir else default_runs_dirs()
        runs = [find_run(name, *runs_dirs) for name in arguments.runs]
        if len(runs) == 1:
            runs.insert(0, _nearest_to(runs[0], runs_dirs))
        if len(runs) == 2:
            _show_pair(compare(*runs))
        elif runs:
            _show_overview(overview_of(runs[0], runs[1:]))
        else:
            _show_overview(overview_of_evening(runs_dirs))


def _read_arguments() -> argparse.Namespace:
    paragraphs = [textwrap.fill(paragraph, WIDTH - 1) for paragraph in str(__doc__).split("\n\n")]
    parser = argparse.ArgumentParser(
        "python -m experiment.compare",
        description="\n\n".join(paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run's folder, or a part of its name that no other has, such as its time",
    )
    parser.add_argument(
        "--runs-dir", type=Path, metavar="FOLDER", help="where the runs lie (default: RUNS_DIR of the scripts)"
    )
    return parser.parse_args()


def _nearest_to(run: PastRun, runs_dirs: Sequence[Path]) -> PastRun:
    runs, _ = read_runs(*runs_dirs)
    found = nearest(run, runs)
    if found is None:
        where = folders_in_words(runs_dirs)
        raise ConfigurationError(f"There is nothing in {where} to compare {path_from_here(run.path)} with.")
    return found


def _show_pair(comparison: Comparison) -> None:
    say(f"{_printable(path_from_here(comparison.after.path))}\n{comparison.text}")
    _save_picture(comparison.after.path / PAIR_PICTURE, comparison.figure())


def _show_overview(overview: Overview) -> None:
    say(overview.text)
    newest = max((row.run for row in overview.rows), key=lambda run: run.finished)
    _save_picture(newest.path / OVERVIEW_PICTURE, overview.figure())


def _save_picture(path: Path, figure: "Figure") -> None:
    save_atomically(path, png_of(figure))
    say(f"\nWorth opening:\n  {_printable(path_from_here(path))}")


if __name__ == "__main__":
    main()
