"""Which ranking finds wrong labels: ``python tests/benchmarks/label_errors.py`` (as long as main_cnn.py, or less).

Gives some training images of Fashion-MNIST a wrong label and trains the folds of main_cnn.py on them. Each image is
then evaluated by the network of the fold that holds it out, and all images are ranked by how doubtful their label is:

- probability: of the label, the lowest first (the program's ranking);
- margin: that probability minus the highest probability of another class;
- confident learning (Northcutt, Jiang and Chuang 2021): an image is listed if another class j has at least the
  probability that images labelled j have for it on average; those that are listed come first, by the margin.

``--kind random`` replaces 2 % of all labels by another class; ``--kind shirts`` calls 10 % of the shirts coats. Prints
the share of wrong labels among the first 24, the first N / 2 and the first N of each ranking, where N is the number of
wrong labels. (Among the first N, precision and recall are the same number.)
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
from common import fits_of, main_cnn, workers_for, write_fewer
from false_alarms import with_progress

from experiment.executors import WorkerProcesses
from train_utils import Fit, train_fit

LABELS_FILE = Path("FashionMNIST/raw/train-labels-idx1-ubyte")
HEADER_BYTES = 8
CLASSES, COAT, SHIRT = 10, 4, 6
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def main() -> None:
    """Train, and print one row per ranking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12_000, help="training images (default: 12000; all: 60000)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each fold (default: 3)")
    parser.add_argument("--kind", choices=("random", "shirts"), default="random")
    parser.add_argument("--seed", type=int, default=0, help="which labels are wrong (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_fewer(arguments.images, Path(folder))
        is_wrong = plant_wrong_labels(Path(folder) / LABELS_FILE, arguments.kind, np.random.default_rng(arguments.seed))
        fits = fits_of(main_cnn, EPOCHS=arguments.epochs, DATA_DIR=folder)[1:]
        labels, probabilities = out_of_fold(fits, len(is_wrong))
    count = int(is_wrong.sum())
    print(f"{arguments.images} images, {arguments.epochs} epochs, {arguments.kind}: N = {count} wrong labels\n")
    print(f"{'ranking':<20}{'first 24':>10}{'first N/2':>11}{'first N':>9}")
    listed = listed_by_confident_learning(labels, probabilities)
    margins = margin(labels, probabilities)
    rankings = {
        "probability": own_probability(labels, probabilities).argsort(kind="stable"),
        "margin": margins.argsort(kind="stable"),
        "confident learning": np.lexsort((margins, ~listed)),
    }
    for name, ranking in rankings.items():
        shares = [100 * is_wrong[ranking[:first]].mean() for first in (24, count // 2, count)]
        print(f"{name:<20}{shares[0]:>8.0f} %{shares[1]:>9.0f} %{shares[2]:>7.0f} %")
    found = is_wrong[listed].sum()
    print(
        f"\nConfident learning lists {listed.sum()} images; {100 * found / listed.sum():.0f} % of them are wrong: "
        f"{100 * found / count:.0f} % of all wrong ones."
    )


def plant_wrong_labels(path: Path, kind: str, rng: np.random.Generator) -> Bools:
    """Write wrong labels into a file of labels; return which are wrong."""
    content = path.read_bytes()
    labels = np.frombuffer(content[HEADER_BYTES:], dtype=np.uint8).copy()
    is_wrong = np.zeros(len(labels), dtype=bool)
    if kind == "random":
        is_wrong[rng.choice(len(labels), len(labels) // 50, replace=False)] = True
        others = rng.integers(1, CLASSES, size=int(is_wrong.sum()), dtype=np.uint8)
        labels[is_wrong] = (labels[is_wrong] + others) % CLASSES
    else:
        shirts = (labels == SHIRT).nonzero()[0]
        is_wrong[rng.choice(shirts, len(shirts) // 10, replace=False)] = True
        labels[is_wrong] = COAT
    path.write_bytes(content[:HEADER_BYTES] + labels.tobytes())
    return is_wrong


def train_fold(fit: Fit) -> tuple[Integers, Floats]:
    """Return labels and class probabilities of the images that a fold holds out."""
    _, history = train_fit(fit)
    _, labels, probabilities = history[-1]["evaluation"]
    return labels.numpy(), probabilities.double().numpy()


def out_of_fold(fits: list[Fit], images: int) -> tuple[Integers, Floats]:
    """Return the label of each training image, and its class probabilities by the fold that holds it out."""
    labels, probabilities = np.zeros(images, dtype=np.int64), np.zeros((images, CLASSES))
    with WorkerProcesses(workers_for(len(fits))) as pool:
        for fit, result in zip(fits, with_progress(pool.map(train_fold, fits), len(fits)), strict=True):
            held_out = np.frombuffer(fit.held_out_mask or b"", dtype=bool)
            labels[held_out], probabilities[held_out] = result
    return labels, probabilities


def own_probability(labels: Integers, probabilities: Floats) -> Floats:
    """Return the probability of each image's label."""
    return probabilities[np.arange(len(labels)), labels]


def margin(labels: Integers, probabilities: Floats) -> Floats:
    """Return the probability of each image's label minus the highest one of another class."""
    others = probabilities.copy()
    others[np.arange(len(labels)), labels] = -1
    return own_probability(labels, probabilities) - others.max(1)


def listed_by_confident_learning(labels: Integers, probabilities: Floats) -> Bools:
    """Return which labels are off the diagonal of the confident joint (section 3.1 of the paper)."""
    thresholds = np.array([probabilities[labels == label, label].mean() for label in range(CLASSES)])
    above = np.where(probabilities >= thresholds, probabilities, -1)
    confident = above.argmax(1)
    return (above.max(1) >= 0) & (confident != labels)


if __name__ == "__main__":
    main()
