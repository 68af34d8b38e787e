"""What a common order of images is worth in a comparison: ``python tests/benchmarks/data_order.py``.

Trains two different networks, that of main_cnn.py and one whose first `Linear` is twice as wide, on the folds of a
small recipe (3,000 images, 3 epochs), once for each of several seeds, in two ways:

- the random generators are seeded again after the network is built, as `run_epoch` does it: in the same fold and epoch,
  both networks see the same order of images and draw the same dropout from the start;
- they are seeded before it is built only, so that the order depends on how many random numbers the network needs.

Prints the standard deviation over seeds of the difference per fold (pooled over the folds), the correlation of the two
networks' results, and the ratio of the two variances with the interval of the F test. Ten seeds take ten minutes on two
cores.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
from common import workers_for
from false_alarms import METRICS, make_folds, train_fold, with_progress
from scipy import stats
from torch import nn

import train_utils
from experiment.executors import WorkerProcesses, pickle_by_value
from models import ConvolutionalNeuralNetwork
from train_utils import Fit, code_digest

Array = npt.NDArray[np.float64]


def wider_network() -> nn.Module:
    """Return the network of main_cnn.py with a first `Linear` twice as wide."""
    network = ConvolutionalNeuralNetwork()
    network.fc_stack[1] = nn.Linear(64 * 7 * 7, 512, bias=False)
    network.fc_stack[2] = nn.BatchNorm1d(512)
    network.fc_stack[5] = nn.Linear(512, 128, bias=False)
    return network


def train_with_own_order(fit: Fit) -> tuple[float, float]:
    """Return accuracy and loss of a fold whose order of images depends on the network."""
    with _seeded_only_before_building():
        return train_fold(replace(fit, code_digest=code_digest()))


@contextmanager
def _seeded_only_before_building() -> Iterator[None]:
    """Leave out every second call of `seed_generators`: in each epoch, the one after the network is built."""
    seed_generators = train_utils.seed_generators
    calls: list[int] = []  # a list, since a number would be part of the digest of this function

    def seed_every_second_time(seed: int) -> None:
        calls.append(seed)
        if len(calls) % 2:
            seed_generators(seed)

    train_utils.seed_generators = seed_every_second_time
    try:
        yield
    finally:
        train_utils.seed_generators = seed_generators


def train_table(fits: list[Fit], seeds: int, same_order: bool) -> Array:
    """Train both networks on every fold once per seed; return an array (2 networks, seeds, folds, 2 metrics)."""
    factories = [pickle_by_value(factory) for factory in (ConvolutionalNeuralNetwork, wider_network)]
    cells = [
        replace(fit, model_class=factory, rng_seed=seed)
        for factory in factories
        for seed in range(1, seeds + 1)
        for fit in fits
    ]
    with WorkerProcesses(workers_for(len(cells))) as pool:
        results = list(with_progress(pool.map(train_fold if same_order else train_with_own_order, cells), len(cells)))
    return np.array(results).reshape(2, seeds, len(fits), len(METRICS))


def main() -> None:
    """Train, and print one row per metric and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each network (default: 10)")
    parser.add_argument("--images", type=int, default=3000, help="training images (default: 3000)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each fit (default: 3)")
    parser.add_argument("--folds", type=int, default=5, help="number of folds (default: 5)")
    arguments = parser.parse_args()
    arguments.tutorial = False
    with tempfile.TemporaryDirectory() as folder:
        fits = make_folds(arguments, arguments.folds, Path(folder))
        tables = {same_order: train_table(fits, arguments.seeds, same_order) for same_order in (True, False)}
    print(f"{arguments.images} images, {arguments.epochs} epochs, {arguments.seeds} seeds x {arguments.folds} folds\n")
    print("metric     order of images       deviation of a fold's difference   correlation")
    degrees = (arguments.seeds - 1) * arguments.folds
    for index, metric in enumerate(METRICS):
        variances = {}
        for same_order, name in ((True, "the same"), (False, "its own per network")):
            first, second = tables[same_order][..., index]
            variances[same_order] = float((second - first).var(axis=0, ddof=1).mean())
            within_folds = [table - table.mean(axis=0) for table in (first, second)]
            correlation = np.corrcoef(within_folds[0].ravel(), within_folds[1].ravel())[0, 1]
            print(f"{metric:<11}{name:<22}{variances[same_order] ** 0.5:<35.4f}{correlation:.2f}")
        ratio, quantile = variances[False] / variances[True], stats.f.isf(0.025, degrees, degrees)
        print(f"{'':<11}ratio of the variances {ratio:.2f} (95 %: {ratio / quantile:.2f} to {ratio * quantile:.2f})")


if __name__ == "__main__":
    main()
