"""Time to the accuracy of the reference: ``python tests/benchmarks/time_to_accuracy.py`` (25 minutes).

For each of three seeds, in turn: the time to train and test one CNN on all of Fashion-MNIST, (a) by the loop of
PyTorch's tutorials with the settings of the reference and 10 epochs, (b) by this project with 3 epochs of a one-cycle
schedule. Each runs in a fresh process on all cores; the time includes reading the data but not the imports. The folds
alone chose the settings of (b): ``python tests/benchmarks/recipes.py --epochs 3 --batch-size 128 one_cycle:0.005``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import joblib
import torch
from common import compute_accuracy, final_metrics, fits_of, in_fresh_process, main_cnn
from seeds import SEEDS
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from data_files import resolve_path
from models import ConvolutionalNeuralNetwork
from train_utils import test_loop, train_fit, train_loop

REFERENCE_ACCURACY = 0.9184  # and its settings: 10 epochs, batches of 64, Adam with learning rate 0.001
SHORT: dict[str, Any] = {
    "EPOCHS": 3,
    "BATCH_SIZE": 128,
    "LEARNING_RATE": 0.005,
    "LR_SCHEDULE": "one_cycle",
    "MIRROR": False,  # as in the tutorials, and when the folds chose the rest
}


def tutorial_accuracy(seed: int) -> float:
    """Train and test as PyTorch's tutorials do; return the test accuracy."""
    torch.manual_seed(seed)
    train_set, test_set = (
        datasets.FashionMNIST(str(resolve_path(main_cnn.DATA_DIR)), train=part, transform=transforms.ToTensor())
        for part in (True, False)
    )
    model, loss_fn = ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(10):
        train_loop(DataLoader(train_set, batch_size=64, shuffle=True), model, loss_fn, optimizer)
    _, labels, probabilities = test_loop(DataLoader(test_set, batch_size=64), model, loss_fn)
    return compute_accuracy(labels, probabilities)


def project_accuracy(seed: int) -> float:
    """Train and test the final fit of main_cnn.py with the settings in SHORT; return the test accuracy."""
    final = fits_of(RNG_SEED=seed, **SHORT)[0]
    _, history = train_fit(replace(final, threads=joblib.cpu_count()))
    return final_metrics(history)[0]


def timed(train_and_test: Callable[[int], float], seed: int) -> tuple[float, float]:
    """Return the seconds and the accuracy of one fit."""
    start = time.perf_counter()
    accuracy = train_and_test(seed)
    return time.perf_counter() - start, accuracy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least 2")
    seeds = SEEDS[: parser.parse_args().seeds]
    print("seed   (a) tutorial's loop     (b) this project       (a) / (b)")
    ratios, accuracies = [], []
    for seed in seeds:
        slow, usual = in_fresh_process(timed, tutorial_accuracy, seed)
        fast, ours = in_fresh_process(timed, project_accuracy, seed)
        ratios.append(slow / fast)
        accuracies.append((usual, ours))
        print(
            f"{seed}    {slow:6.1f} s, {usual:.4f}       {fast:6.1f} s, {ours:.4f}       {ratios[-1]:.1f}", flush=True
        )
    for name, values in zip(("(a)", "(b)"), zip(*accuracies, strict=True), strict=True):
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        print(f"{name}: mean test accuracy {mean:.4f} ± {spread:.4f}; the reference has {REFERENCE_ACCURACY}")
    print(f"(a) / (b): median {statistics.median(ratios):.1f} ({min(ratios):.1f}, {max(ratios):.1f})")


if __name__ == "__main__":
    main()
