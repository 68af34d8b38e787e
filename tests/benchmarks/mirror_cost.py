"""What MIRROR costs: ``python tests/benchmarks/mirror_cost.py`` (two minutes).

In turn, on one thread, with the network, batch size and precision of main_cnn.py: 100 steps of the training loop and
the evaluation of as many images, without and with MIRROR. Prints the median of the paired ratios, lowest and highest.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import fits_of, load_dataset, path_of
from torch import nn

from data_utils import Batches, pixel_statistics
from train_utils import EVALUATION_BATCH_SIZE, build_network, test_loop, train_loop

STEPS, PAIRS = 100, 8


def seconds(work: Callable[[bool], None], mirror: bool) -> float:
    """Return how long the work takes."""
    start = time.perf_counter()
    work(mirror)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    fit = fits_of()[0]
    device, precision = torch.device(fit.device), getattr(torch, fit.precision)
    network = build_network(fit.model_class, device)
    optimizer, loss_fn = torch.optim.Adam(network.parameters(), fused=True), nn.CrossEntropyLoss()
    dataset = load_dataset(fit.dataset, path_of(fit.data_dir))
    images, labels = dataset.train_images[: STEPS * fit.batch_size], dataset.train_labels[: STEPS * fit.batch_size]
    normal = pixel_statistics(images)

    def train(mirror: bool) -> None:
        batches = Batches(images, labels, fit.batch_size, *normal, device, training=True, mirror=mirror)
        train_loop(batches, network, loss_fn, optimizer, precision=precision)

    def evaluate(mirror: bool) -> None:
        test_loop(Batches(images, labels, EVALUATION_BATCH_SIZE, *normal, device), network, loss_fn, precision, mirror)

    train(False)  # the first steps allocate
    for name, work in (("training speed with / without", train), ("evaluation speed with / without", evaluate)):
        ratios = []
        for pair in range(PAIRS):
            taken = {mirror: seconds(work, mirror) for mirror in ((False, True) if pair % 2 else (True, False))}
            ratios.append(taken[False] / taken[True])
        print(f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
