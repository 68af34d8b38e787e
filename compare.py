"""Did it help? Compares finished runs fold by fold.

Runs with the same data, FOLDS and RNG_SEED have the same folds, so the difference of a metric is computed in each fold.
The mean of these differences is the effect of a change; ± is its standard error; p is the probability of a difference
at least as large if the change had no effect. Below 0.05 the run is called better or worse.

Without names: all runs that can be compared with the newest, one row per run; the oldest is the baseline. With several
names: the first is the baseline. With one name: that run is compared with the one that differs from it in the fewest
changes.

The test is the corrected paired t-test (Nadeau and Bengio, 2003). It asks whether the difference would also be found on
other data of the same kind. The training images of the folds overlap, so the standard error is larger than that of a
plain paired t-test, which asks only about other seeds on these very images.

Limits. "Not significant" does not mean "no effect": a few folds find only large effects. With 5 folds, an effect of 3.6
times its ± is found in 80 of 100 cases; with 2 folds, it must be 13 times its ± to be significant at all. If several
things were changed at once, nothing tells which of them had the effect. If several runs are compared, each p is
corrected for their number (Holm, 1979), since the best of many runs is partly the luckiest. The test images are not
used: after choosing a run by them, they would no longer be a test.
"""

import argparse
import textwrap
from pathlib import Path

from experiment.errors import ConfigurationError, user_errors
from experiment.files import write_atomically
from experiment.terminal import print_line

DEFAULT_RUNS_DIR = Path(__file__).resolve().parent / "runs"


def main() -> None:
    """Read the command line and print the comparison."""
    arguments = _read_arguments()
    with user_errors():
        if arguments.runs and len(arguments.runs) <= 2:
            _print_pair(arguments.runs, arguments.runs_dir)
        else:
            _print_overview(arguments.runs, arguments.runs_dir)


def _read_arguments() -> argparse.Namespace:
    paragraphs = [textwrap.fill(paragraph, 79) for paragraph in str(__doc__).split("\n\n")]
    parser = argparse.ArgumentParser(
        description="\n\n".join(paragraphs), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run directory, or a part of its name that no other has, such as its time",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=DEFAULT_RUNS_DIR,
        metavar="FOLDER",
        help="the folder with all runs (default: runs beside compare.py)",
    )
    return parser.parse_args()


def _print_pair(names: list[str], runs_dir: Path) -> None:
    from comparison.changes import nearest_run
    from comparison.pair import compare_runs
    from comparison.run_reader import FinishedRun, display_path, find_run, read_runs

    after = find_run(names[-1], runs_dir)
    if len(names) == 2:
        before: FinishedRun | None = find_run(names[0], runs_dir)
    else:
        before = nearest_run(after, read_runs(runs_dir)[0])
    if before is None:
        where = display_path(runs_dir)
        raise ConfigurationError(f"There is nothing in {where} to compare {display_path(after.path)} with.")
    print_line(display_path(after.path))
    print_line(compare_runs(before, after).text)


def _print_overview(names: list[str], runs_dir: Path) -> None:
    from comparison.overview import overview_of, overview_of_all
    from comparison.run_reader import display_path, find_run
    from experiment.plots import png_bytes

    if names:
        baseline, *others = [find_run(name, runs_dir) for name in names]
        overview = overview_of(baseline, others)
    else:
        overview = overview_of_all(runs_dir)
    print_line(overview.text)
    newest = max((row.run for row in overview.rows), key=lambda run: run.finished)
    path = newest.path / "overview.png"
    write_atomically(path, png_bytes(overview.figure()))
    print_line(f"\nSaved {display_path(path)}")


if __name__ == "__main__":
    main()
