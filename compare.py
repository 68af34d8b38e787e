"""Did it help? Compares finished runs fold by fold.

Runs with the same data, FOLDS and RNG_SEED have the same folds, so the difference of a metric is computed in each fold.
The mean of these differences is the effect of a change. ± is half the width of its 95 % confidence interval: if ± is
larger than the mean, there may be no effect. p is the probability of a difference at least as large if the change had
no effect. Below 0.05 the run is called better or worse.

Without names: the newest runs with the same folds, one row per run; the oldest of them is the baseline. With several
names: the first is the baseline. With one name: that run is compared with the one that differs from it in the fewest
changes. The comparison of two runs is also written as a page into the folder of the second, and the page of all runs,
index.html, is written whenever several are compared.

The test is the corrected paired t-test (Nadeau and Bengio, 2003). It asks whether the difference would also be found on
other data of the same kind. The training images of the folds overlap, so the interval is wider than that of a plain
paired t-test, which asks only about other seeds on these very images. The variance is moderated (Smyth, 2004): a few
folds alone give a poor estimate, so all runs with the same folds are used. The more there are, the smaller the
differences that can be found.

Limits. "Not significant" does not mean "no effect": a few folds find only large effects. How large is printed with each
comparison of two runs. If several things were changed at once, nothing tells which of them had the effect. p and ± are
corrected for everything that is shown together (Holm, 1979), runs and metrics, because the best of many results is
partly due to chance. The test images are not used: after choosing a run by them, they would no longer be a test.
"""

import argparse
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.errors import ConfigurationError, nonfatal, user_errors
from experiment.terminal import print_line

if TYPE_CHECKING:
    from comparison.run_reader import FinishedRun

DEFAULT_RUNS_DIR = Path(__file__).resolve().parent / "runs"


def main() -> None:
    """Read the command line and print the comparison."""
    arguments = _read_arguments()
    names = arguments.runs
    if names and arguments.baseline is not None:
        names = [arguments.baseline, *names]
    with user_errors():
        if names and len(names) <= 2:
            _print_pair(names, arguments.runs_dir)
        else:
            _print_overview(names, arguments)


def _read_arguments() -> argparse.Namespace:
    paragraphs = [textwrap.fill(paragraph, 79) for paragraph in str(__doc__).split("\n\n")]
    parser = argparse.ArgumentParser(
        description="\n\n".join(paragraphs), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run directory, or a part of its name that no other has, such as its time (18:30)",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=DEFAULT_RUNS_DIR,
        metavar="FOLDER",
        help="the folder with all runs (default: runs beside compare.py)",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="the run that all others are compared with, also on the page of its folder (default: the oldest)",
    )
    parser.add_argument(
        "--last",
        type=_at_least_two,
        metavar="N",
        help="without names: how many runs are shown (default: 20)",
    )
    arguments = parser.parse_args()
    if arguments.runs and arguments.last is not None:
        parser.error("--last cannot be combined with the names of runs")
    return arguments


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 2, got {text}")
    return int(text)


def _print_pair(names: list[str], runs_dir: Path) -> None:
    from comparison.changes import nearest_run, why_nothing_comparable
    from comparison.pair import compare_runs
    from comparison.pair_page import write_pair_page
    from comparison.run_reader import display_path, read_runs

    *first, after = _find_runs(names, runs_dir)
    history, _ = read_runs(after.path.parent)
    before = first[0] if first else nearest_run(after, history)
    if before is None:
        raise ConfigurationError(f"{display_path(after.path)}: {why_nothing_comparable(after, history)}")
    print_line(display_path(after.path))
    comparison = compare_runs(before, after, history)
    print_line(comparison.text)
    with nonfatal("the page"):
        print_line(f"\nPage: {display_path(write_pair_page(comparison))}")


def _print_overview(names: list[str], arguments: argparse.Namespace) -> None:
    from comparison.overview import DEFAULT_LAST, overview_of, overview_of_all
    from comparison.run_reader import display_path, find_run, read_runs, run_folders

    chosen = None if arguments.baseline is None else find_run(arguments.baseline, arguments.runs_dir)
    page = _write_index(arguments.runs_dir, chosen)
    if names:
        baseline, *others = _find_runs(names, arguments.runs_dir)
        history, _ = read_runs(baseline.path.parent)
        text = overview_of(baseline, others, arguments.runs_dir, history).text
    else:
        try:
            text = overview_of_all(arguments.runs_dir, arguments.last or DEFAULT_LAST, chosen).text
        except ConfigurationError as error:
            if page is None or chosen is not None or not run_folders(arguments.runs_dir):
                raise
            text = str(error)  # there is nothing to compare yet, but the page has a row for each run
    print_line(text)
    if page is not None:
        print_line(f"\nPage of all runs: {display_path(page)}")


def _write_index(runs_dir: Path, baseline: "FinishedRun | None") -> Path | None:
    """Write the page of all runs and return its path; None if there is no folder, or if it cannot be written."""
    from comparison.index import write_index

    if not os.path.isdir(runs_dir):  # Path.is_dir raises if the name is too long
        return None
    page = None
    with nonfatal("the page of all runs"):
        page = write_index(runs_dir, baseline)
    return page


def _find_runs(names: list[str], runs_dir: Path) -> "list[FinishedRun]":
    """Return the runs of these names.

    Raises
    ------
    ConfigurationError
        If one of them is not found, or if two names mean the same run.
    """
    from comparison.run_reader import display_path, find_run

    runs = [find_run(name, runs_dir) for name in names]
    for number, run in enumerate(runs):
        for earlier, name in zip(runs[:number], names, strict=False):
            if earlier.path == run.path:
                where = display_path(run.path)
                raise ConfigurationError(f"{name} and {names[number]} are the same run, {where}. Name different runs.")
    return runs


if __name__ == "__main__":
    main()
