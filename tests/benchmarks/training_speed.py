"""How fast the network of main_cnn.py trains: ``python tests/benchmarks/training_speed.py`` (half an hour, two cores).

In one call, paired and repeated, images trained on per second of (a) the loop of PyTorch's tutorials over a DataLoader
with ToTensor, (b) skorch with scikit-learn's ``cross_validate(n_jobs=cores)`` on tensors in memory, (c) this project's
``run_experiment`` with 3 epochs, start-up, evaluation, checkpoints and logging included, in float32 and in bfloat16;
without MIRROR, as the others are, and with it in bfloat16.
Prints medians with the lowest and the highest, their share of the machine's matrix-product rate, and the ratios.
(b)'s worker processes are started before its clock is, (c)'s are not; so (a) and (b) lose nothing by getting fewer
images. (a) runs in a fresh process, as a script would, before each of the others, and is averaged, since it is short
and machines drift.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import joblib
import numpy as np
import skorch
import torch
from common import in_fresh_process, load_dataset, main_cnn, path_of, seconds_of_a_run
from sklearn.model_selection import StratifiedKFold, cross_validate
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from models import ConvolutionalNeuralNetwork
from train_utils import train_loop

FLOP_PER_IMAGE = 38.4e6  # forward and backward, counted from the layers
MATRIX = 2048
TUTORIAL_IMAGES, SKORCH_IMAGES = 12_000, 20_000


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a matrix product on all cores."""
    a, b = torch.randn(MATRIX, MATRIX).to(dtype), torch.randn(MATRIX, MATRIX).to(dtype)
    for _ in range(5):
        a @ b
    start = time.perf_counter()
    for _ in range(30):
        a @ b
    return 30 * 2 * MATRIX**3 / (time.perf_counter() - start)


def tutorial_rate(images: int) -> float:
    """Return the images per second of the tutorials' loop, after a warm-up."""
    dataset = datasets.FashionMNIST(str(path_of(main_cnn.DATA_DIR)), transform=transforms.ToTensor())
    model, loss_fn = ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=main_cnn.LEARNING_RATE)
    for count in (1000, images):
        start = time.perf_counter()
        loader = DataLoader(Subset(dataset, range(count)), batch_size=main_cnn.BATCH_SIZE, shuffle=True)
        train_loop(loader, model, loss_fn, optimizer)
    return images / (time.perf_counter() - start)


def skorch_rate(images: int) -> float:
    """Return the images trained on per second of skorch under scikit-learn's cross_validate, one epoch a fold."""
    train_images, train_labels, *_ = load_dataset("FashionMNIST", path_of(main_cnn.DATA_DIR))
    x, y = (train_images[:images].unsqueeze(1).float() / 255).numpy(), train_labels[:images].numpy()
    network = skorch.NeuralNetClassifier(
        ConvolutionalNeuralNetwork,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=main_cnn.LEARNING_RATE,
        batch_size=main_cnn.BATCH_SIZE,
        max_epochs=1,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    folds = StratifiedKFold(main_cnn.FOLDS)
    few = np.concatenate([np.flatnonzero(y == label)[:20] for label in range(10)])
    cross_validate(network, x[few], y[few], cv=folds, n_jobs=joblib.cpu_count())  # starts the processes
    start = time.perf_counter()
    cross_validate(network, x, y, cv=folds, n_jobs=joblib.cpu_count())
    return images * (main_cnn.FOLDS - 1) / (time.perf_counter() - start)


def project_rate(images: int, precision: str, mirror: bool = False, epochs: int = 3) -> float:
    """Return the images trained on per second of a whole small run, from nothing to its last file."""
    seconds = seconds_of_a_run(images, EPOCHS=epochs, PRECISION=precision, MIRROR=mirror, WANDB_MODE="offline")
    return images * main_cnn.FOLDS * epochs / seconds  # K folds of (K - 1) / K of the images, and all of them once


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000, help="training images of (c)")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats):
        bursts = []
        measures: dict[str, Callable[[], float]] = {
            "matrix product, float32": lambda: matrix_rate(torch.float32) / FLOP_PER_IMAGE,
            "matrix product, bfloat16": lambda: matrix_rate(torch.bfloat16) / FLOP_PER_IMAGE,
            "(b) skorch, cross_validate": lambda: skorch_rate(SKORCH_IMAGES),
            "(c) this project, float32": lambda: project_rate(arguments.images, "float32"),
            "(c) this project, bfloat16": lambda: project_rate(arguments.images, "bfloat16"),
            "(c) … bfloat16, with MIRROR": lambda: project_rate(arguments.images, "bfloat16", mirror=True),
        }
        for name, measure in measures.items():
            bursts.append(in_fresh_process(tutorial_rate, TUTORIAL_IMAGES))
            rates.setdefault(name, []).append(measure())
            done = f"(a) {bursts[-1]:.0f}, {name} {rates[name][-1]:.0f}"
            print(f"  repeat {repeat + 1}: {done}", file=sys.stderr, flush=True)
        rates.setdefault("(a) tutorial's loop", []).append(statistics.fmean(bursts))
    print(f"{'':<30}images/s: median (lowest, highest)   GFLOP/s   share of its matrix product")
    for name, values in sorted(rates.items()):
        peak = rates["matrix product, " + ("bfloat16" if "bfloat16" in name else "float32")]
        share = statistics.median(value / most for value, most in zip(values, peak, strict=True))
        median = statistics.median(values)
        print(
            f"{name:<30}{median:8.0f} ({min(values):.0f}, {max(values):.0f})".ljust(67)
            + f"{median * FLOP_PER_IMAGE / 1e9:7.0f}   {share:6.0%}"
        )
    for other in ("(a) tutorial's loop", "(b) skorch, cross_validate"):
        for name in ("(c) this project, float32", "(c) this project, bfloat16"):
            ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[other], strict=True)]
            print(f"{name} / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})")


if __name__ == "__main__":
    main()
