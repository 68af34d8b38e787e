"""Did it help? Compares runs fold by fold: with the same data, FOLDS and RNG_SEED, the folds are the same images.

A difference is the mean over the folds, ± its standard error; p is that of a two-sided t-test. Both are corrected for
the overlap of the training sets (Nadeau and Bengio, 2003). Had a change done nothing, chance would bring as large a
difference in a share p of all cases: below 0.05 it is better or worse. The test images take no part, to stay honest.

What this cannot tell: that a change does nothing (few folds see only large effects; with two, the mean must be 13 times
its ±); which of many trials helped (of twenty that do nothing, one is "better"); what other seeds or data would say.
"""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from difflib import unified_diff
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from data_utils import PROJECT_DIR
from experiment.console import path_from_here, say
from experiment.errors import ConfigurationError, user_errors
from experiment.figures import BLUE, ORANGE, new_figure, png_of
from experiment.run_directory import save_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME_IMAGES = ("dataset", "data", "folds", "rng_seed")  # what makes the folds of two runs the same images


class Run(NamedTuple):
    """What is compared of a run: all that its results depend on, and the figures of the folds that did not diverge."""

    path: Path
    finished: float
    identity: dict[str, Any]
    folds: dict[str, dict[str, float]]


def compare_with_newest(run_dir: Path, results: dict[str, Any], identity: dict[str, Any]) -> str:
    """Return how a run that is about to be saved compares with the newest comparable one beside it; "" if none is."""
    after = _make_run(run_dir, np.inf, results, identity)
    return next((text_of(run, after) for run in finished_runs(run_dir.parent) if not reason_against(run, after)), "")


def finished_runs(runs_dir: Path) -> list[Run]:
    """Return the finished runs in a folder, the newest first; what is damaged or no run is passed over."""
    runs = []
    for path in runs_dir.glob("*/results.json"):
        with suppress(ConfigurationError, OSError):
            runs.append(read_run(path.parent))
    return sorted(runs, key=lambda run: run.finished, reverse=True)


def read_run(path: Path) -> Run:
    """Return a finished run, or raise a ConfigurationError that says why it is none."""
    where, results, config = path_from_here(path), path / "results.json", path / "config.json"
    if not results.is_file():
        raise ConfigurationError(f"{where} is {('not a run', 'unfinished')[config.exists()]}: it has no results.json.")
    try:
        identity = json.loads(config.read_text(encoding="utf-8"))["identity"]
        return _make_run(path, results.stat().st_mtime, json.loads(results.read_text(encoding="utf-8")), identity)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigurationError(f"{where}: results.json or config.json is damaged or too old ({error!r}).") from None


def _make_run(path: Path, finished: float, results: dict[str, Any], identity: dict[str, Any]) -> Run:
    folds = {}
    for fold in results["folds"]:
        rows = [(name, row) for name, row in fold.get("report", {}).items() if not name.endswith(" avg")]
        figures = {name: fold[name] for name in ("accuracy", "loss") if name in fold}
        figures |= {f"F1 of {name}": row["f1-score"] for name, row in rows if isinstance(row, dict)}
        if "accuracy" in figures and all(abs(figure) < 1e99 for figure in figures.values()):  # else it diverged
            folds[fold["name"]] = figures
    if len(folds) > identity["folds"] or not identity.keys() >= set(SAME_IMAGES):
        raise ValueError("it does not say what its folds are")
    return Run(path, finished, identity, folds)


def reason_against(before: Run, after: Run) -> str:
    """Return why two runs cannot be compared; "" if they can."""
    pair = f"{path_from_here(after.path)} cannot be compared with {path_from_here(before.path)}"
    for name in SAME_IMAGES:
        old, new = before.identity[name], after.identity[name]
        if old != new:
            return f"{pair}: other {name.upper()} ({str(new)[:12]}, not {str(old)[:12]}), so other images in each fold."
    return "" if len(before.folds.keys() & after.folds) > 1 else f"{pair}: fewer than two folds in common."


def paired_figures(before: Run, after: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Return "accuracy", "loss" and "F1 of <class>" of two runs, each in all the folds that both have."""
    pairs = [(figures, after.folds[name]) for name, figures in before.folds.items() if name in after.folds]
    names = [name for name in pairs[0][0] if all(name in figures for pair in pairs for figures in pair)]
    return {name: ([old[name] for old, _ in pairs], [new[name] for _, new in pairs]) for name in names}


def paired_difference(before: list[float], after: list[float], folds: int) -> tuple[float, float, float]:
    """Return mean, standard error and p of the differences in a figure, given in J ≥ 2 folds of two runs.

    The squared error is their variance times 1/J + 1/(K − 1), with K = `folds`, all that the experiment has: 1 to K − 1
    is a fold's test set to its training set. If all differ alike, no spread tells how far chance reaches: p is NaN.
    """
    differences = np.subtract(after, before)
    mean, variance = float(differences.mean()), differences.var(ddof=1) * (1 / len(after) + 1 / (folds - 1))
    if np.ptp(differences) <= 1e-12 * np.abs([before, after]).max():  # the same, but for rounding
        return mean, 0.0, np.nan if mean else 1.0
    return mean, float(variance**0.5), float(2 * stats.t.sf(abs(mean) / variance**0.5, len(after) - 1))


def text_of(before: Run, after: Run) -> str:
    """Return what differs between two runs, and whether it helped, as the terminal and report.md show it."""
    figures, folds = paired_figures(before, after), after.identity["folds"]
    count = len(figures["accuracy"][0])
    some = f", over the {count} of {folds} folds that both have" if count < folds else ""
    lines = [f"Against {path_from_here(before.path)}{some}", *_changes(before.identity, after.identity)]
    if "loss" in figures and all(old == new for old, new in figures.values()):
        lines, figures = [*lines, "  the same in every fold, to the bit"], {}
    for name in [name for name in ("accuracy", "loss") if name in figures]:
        old, new = figures.pop(name)
        mean, error, p = paired_difference(old, new, folds)
        shown = "all folds differ alike, so there is no p" if np.isnan(p) else f"p = {p:.2g}"
        verdict = f"no difference that these folds can tell ({shown})"
        if p < 0.05:
            better, alike = (mean > 0) == (name == "accuracy"), sum(np.subtract(new, old) * mean > 0)
            verdict = f"{'better' if better else 'worse'} ({shown}), in {alike} of {count} folds"
        lines.append(f"  {name:<15}{np.mean(old):.4f} → {np.mean(new):.4f}   {mean:+.4f} ± {error:.4f}   {verdict}")
    gains = {name.removeprefix("F1 of "): np.mean(new) - np.mean(old) for name, (old, new) in figures.items()}
    most = sorted((name for name in gains if abs(gains[name]) >= 0.0005), key=lambda name: -abs(gains[name]))[:3]
    lines += ["  F1, most changed: " + ", ".join(f"{name} {gains[name]:+.3f}" for name in most)] if most else []
    return "\n".join(lines).encode(errors="replace").decode()  # a folder's name may hold bytes that are no text


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each constant that differs (False: its version has it not), and the network's that do."""
    names = [name for name in old | new if old.get(name, False) != new.get(name, False)]
    shown = [name for name in names if name not in ("data", "network", "source", "digest")]
    lines = [f"  {name.upper():<15}{old.get(name, False)} → {new.get(name, False)}" for name in shown]
    printed = [str(run.get("network")).rpartition("\n\n")[2] for run in (old, new)]  # once its source stood above it
    before, after = (re.sub(r"(?m)^( *)\(\d+\): ", r"\1", network).splitlines() for network in printed)
    lines += [f"  {line}" for line in unified_diff(before, after, n=0, lineterm="") if line[1:2] not in "-+@"]
    if before == after and ("source" in old) == ("source" in new) and {"network", "source"} & set(names):
        lines.append(f"  {'network':<15}only its source differs")
    return lines


def draw(before: Run, *others: Run) -> "Figure":
    """Draw the differences of accuracy and F1 in each fold, with their mean and 95 % interval, a panel a run."""
    figure = new_figure(1 + 6 * len(others), 6)
    for plot, after in zip(figure.subplots(1, len(others), sharex=True, squeeze=False)[0], others, strict=True):
        figures = {name: pair for name, pair in paired_figures(before, after).items() if name != "loss"}
        mean, error, _ = np.transpose([paired_difference(*pair, after.identity["folds"]) for pair in figures.values()])
        in_folds = np.array([np.subtract(new, old) for old, new in figures.values()])
        reach, places = error * stats.t.ppf(0.975, in_folds.shape[1] - 1), -np.arange(len(figures))
        plot.errorbar(mean, places - 0.15, xerr=reach, fmt="D", color=ORANGE, label="their mean and its 95 % interval")
        plot.scatter(in_folds, 0.15 - np.indices(in_folds.shape)[0], color=BLUE, alpha=0.6, label="each fold")
        plot.axvline(0, color="black", linewidth=0.8)
        title = f"{after.path.name}\nagainst {before.path.name}".encode(errors="replace").decode()
        plot.set_title(title, fontsize=9, parse_math=False)
        plot.set(xlabel="difference (above 0 is better)", yticks=places, yticklabels=list(figures))
        plot.locator_params(axis="x", nbins=6)
        plot.grid(alpha=0.3)
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure


def find_run(name: str, runs_dir: Path) -> Run:
    """Return the run in a folder of that name, or the only one in `runs_dir` whose name begins so or has it in it."""
    found = [path for path in (Path(name), runs_dir / name) if path.is_dir()][:1]
    for fits in (str.startswith, str.__contains__):
        found = found or sorted(path for path in runs_dir.glob("*") if fits(path.name, name))
    if len(found) != 1:
        names = "".join(f"\n    {path.name}" for path in found) or " nothing"
        raise ConfigurationError(f"{name} must name one run, but in {path_from_here(runs_dir)} it is part of:{names}")
    return read_run(found[0])


def main() -> None:
    """Compare the runs that are named, or the two newest that are comparable."""
    parser = ArgumentParser("python -m experiment.compare", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders or parts of names; all against the first (default: newest 2)")
    parser.add_argument("--runs-dir", type=Path, default=PROJECT_DIR / "runs", help="where the runs lie")
    arguments = parser.parse_args()
    with user_errors():
        runs = [find_run(name, arguments.runs_dir) for name in arguments.runs] or finished_runs(arguments.runs_dir)
        if not arguments.runs:
            runs = next(([old, new] for new, old in combinations(runs, 2) if not reason_against(old, new)), [])
        if any(reasons := [reason_against(runs[0], run) for run in runs[1:]] or ["There are no two runs to compare."]):
            raise ConfigurationError("\n".join(filter(None, reasons)))
        say("\n\n".join(f"{path_from_here(run.path)}\n{text_of(runs[0], run)}" for run in runs[1:]))
        path = max(runs, key=lambda run: run.finished).path / "compare.png"
        save_atomically(path, png_of(draw(*runs), min(110, 9000 / len(runs))))  # no more pixels than a PNG can have
        say(f"\nWorth opening:\n  {path_from_here(path)}")


if __name__ == "__main__":
    main()
