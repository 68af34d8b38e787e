"""Training speed of the network of main_cnn.py: ``python tests/benchmarks/training_speed.py`` (half an hour).

In one call, paired and repeated, the images per second of (a) the loop of PyTorch's tutorials over a DataLoader with
ToTensor, (b) skorch with scikit-learn's ``cross_validate(n_jobs=cores)`` on tensors in memory, (c) this project's
``run_experiment`` with 3 epochs, including start-up, evaluation, checkpoints and logging, in float32 and bfloat16
without MIRROR, as in the others, and in bfloat16 with it. Prints medians with minimum and maximum, their share of the
machine's matrix-product rate, and the ratios. The worker processes of (b) are started before its time begins, those
of (c) are not, so (a) and (b) lose nothing by training on fewer images. (a) runs in a fresh process before each of
the others, and is averaged, since it is short and machines drift.

With ``--against FOLDER`` (another checkout of this repository), only the training loops of both are compared, by the
CPU time of epochs of fold 1 on 2,400 images on one thread: two processes in turn, 15 epochs each, both started again
for each repeat. Prints the median of the repeats with minimum and maximum. Two copies of the same code show how exact
that is.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import skorch
import torch
from common import in_fresh_process, load_dataset, main_cnn, resolve_path, seconds_of_a_run
from sklearn.model_selection import StratifiedKFold, cross_validate
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from models import ConvolutionalNeuralNetwork
from train_utils import train_loop

FLOP_PER_IMAGE = 38.4e6  # forward and backward, counted from the layers
MATRIX = 2048
TUTORIAL_IMAGES, SKORCH_IMAGES = 12_000, 20_000
EPOCHS_PER_REPEAT = 15  # of each checkout


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
    dataset = datasets.FashionMNIST(str(resolve_path(main_cnn.DATA_DIR)), transform=transforms.ToTensor())
    model, loss_fn = ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=main_cnn.LEARNING_RATE)
    for count in (1000, images):
        start = time.perf_counter()
        loader = DataLoader(Subset(dataset, range(count)), batch_size=main_cnn.BATCH_SIZE, shuffle=True)
        train_loop(loader, model, loss_fn, optimizer)
    return images / (time.perf_counter() - start)


def skorch_rate(images: int) -> float:
    """Return the images trained on per second of skorch under scikit-learn's cross_validate, one epoch per fold."""
    train_images, train_labels, *_ = load_dataset("FashionMNIST", resolve_path(main_cnn.DATA_DIR))
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
    """Return the images trained on per second of a whole run, from preparation to its last file."""
    seconds = seconds_of_a_run(images, EPOCHS=epochs, PRECISION=precision, MIRROR=mirror, WANDB_MODE="offline")
    return images * main_cnn.FOLDS * epochs / seconds  # K folds of (K - 1) / K of the images, and all of them once


EPOCH_IN_CHECKOUT = """
import sys, time
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
import main_cnn, train_utils
from experiment.settings import TrainingConfig
from models import ConvolutionalNeuralNetwork
config = TrainingConfig.from_constants(vars(main_cnn) | {"DATA_DIR": sys.argv[2], "PRECISION": sys.argv[3]})
try:
    from data_files import load_dataset
    from experiment.prepare import make_fits
    from experiment.resources import resolve_resources
    dataset = load_dataset(config.dataset, sys.argv[2])
    make = lambda data: make_fits(config, resolve_resources(config), ConvolutionalNeuralNetwork, data)
except ImportError:  # up to version ada7b04
    from data_utils import load_dataset
    from experiment.plan import make_fits, make_plan
    dataset = load_dataset(config.dataset, sys.argv[2])
    make = lambda data: make_fits(make_plan(config, None), ConvolutionalNeuralNetwork, config, data)
fewer = dataset._replace(train_images=dataset.train_images[:2400], train_labels=dataset.train_labels[:2400])
train_utils.cached_dataset = lambda *_arguments: fewer
fit = replace(make(fewer)[1], threads=1)
if hasattr(fit, "code_digest"):
    fit = replace(fit, code_digest=train_utils.code_digest())
train_utils.run_epoch(fit, 1, None)
print("ready", flush=True)
for _line in sys.stdin:
    start = time.process_time()
    train_utils.run_epoch(fit, 1, None)
    print(time.process_time() - start, flush=True)
"""


def start_checkout(folder: Path, data_dir: str, precision: str) -> subprocess.Popen[str]:
    """Return a process that trains one epoch with the code of a checkout for each line that it is sent."""
    command = [sys.executable, "-c", EPOCH_IN_CHECKOUT, str(folder), data_dir, precision]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{folder} could not train: see above.")
    return process


def epoch_seconds(process: subprocess.Popen[str]) -> float:
    """Return the CPU time of one epoch in a process of `start_checkout`."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare_checkouts(other: Path, precision: str, repeats: int) -> None:
    """Print the training speed of this checkout divided by that of another one."""
    data_dir = str(resolve_path(main_cnn.DATA_DIR))
    load_dataset("FashionMNIST", data_dir)  # unpacks it if necessary
    this = Path(__file__).resolve().parents[2]
    medians = []
    for _ in range(repeats):
        with start_checkout(this, data_dir, precision) as here, start_checkout(other, data_dir, precision) as there:
            ratios = []
            for number in range(EPOCHS_PER_REPEAT):
                seconds = {}
                for process in (here, there) if number % 2 else (there, here):
                    seconds[process] = epoch_seconds(process)
                ratios.append(seconds[there] / seconds[here])
        medians.append(statistics.median(ratios))
        print(f"  {medians[-1]:.3f}", file=sys.stderr, flush=True)
    median = statistics.median(medians)
    print(f"speed here / there, {precision}: {median:.3f} ({min(medians):.3f}, {max(medians):.3f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000, help="training images of (c)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout to compare with")
    parser.add_argument("--precision", default="float32", help="of the comparison with another checkout")
    arguments = parser.parse_args()
    if arguments.against:
        compare_checkouts(arguments.against, arguments.precision, arguments.repeats)
        return
    rates: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats):
        tutorial_rates = []
        measures: dict[str, Callable[[], float]] = {
            "matrix product, float32": lambda: matrix_rate(torch.float32) / FLOP_PER_IMAGE,
            "matrix product, bfloat16": lambda: matrix_rate(torch.bfloat16) / FLOP_PER_IMAGE,
            "(b) skorch, cross_validate": lambda: skorch_rate(SKORCH_IMAGES),
            "(c) this project, float32": lambda: project_rate(arguments.images, "float32"),
            "(c) this project, bfloat16": lambda: project_rate(arguments.images, "bfloat16"),
            "(c) … bfloat16, with MIRROR": lambda: project_rate(arguments.images, "bfloat16", mirror=True),
        }
        for name, measure in measures.items():
            tutorial_rates.append(in_fresh_process(tutorial_rate, TUTORIAL_IMAGES))
            rates.setdefault(name, []).append(measure())
            done = f"(a) {tutorial_rates[-1]:.0f}, {name} {rates[name][-1]:.0f}"
            print(f"  repeat {repeat + 1}: {done}", file=sys.stderr, flush=True)
        rates.setdefault("(a) tutorial's loop", []).append(statistics.fmean(tutorial_rates))
    print(f"{'':<30}images/s: median (minimum, maximum)   GFLOP/s   share of its matrix product")
    for name, values in sorted(rates.items()):
        peak = rates["matrix product, " + ("bfloat16" if "bfloat16" in name else "float32")]
        share = statistics.median(value / maximum for value, maximum in zip(values, peak, strict=True))
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
