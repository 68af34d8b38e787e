"""A run of which every figure can be worked out by hand: three classes, ten test images, two folds, two epochs.

The final network's answers to the test images (true class → what it took the image for, and how sure it was):

    Coat → Coat 0.9, Coat → Coat 0.8, Coat → Shirt 0.6, Coat → Shirt 0.95,
    Shirt → Shirt 0.7, Shirt → Shirt 0.7, Shirt → Coat 0.5, Shirt → Shirt 0.75, Bag → Bag 1.0, Bag → Bag 0.9

Of label 2, "Hat", there is no image at all.
"""

from typing import Any

import torch
from torch import Tensor

from data_utils import PROJECT_DIR, Dataset
from experiment.results import ExperimentResult, make_result

CLASS_NAMES = ["Coat", "Shirt", "Hat", "Bag"]
COAT, SHIRT, HAT, BAG = range(4)
TEST_ANSWERS = [
    (COAT, COAT, 0.9),
    (COAT, COAT, 0.8),
    (COAT, SHIRT, 0.6),
    (COAT, SHIRT, 0.95),
    (SHIRT, SHIRT, 0.7),
    (SHIRT, SHIRT, 0.7),
    (SHIRT, COAT, 0.5),
    (SHIRT, SHIRT, 0.75),
    (BAG, BAG, 1.0),
    (BAG, BAG, 0.9),
]
FOLD_1_ANSWERS = [(COAT, COAT, 0.9), (COAT, SHIRT, 0.9), (SHIRT, SHIRT, 0.9), (BAG, BAG, 0.9)]
FOLD_2_ANSWERS = [(COAT, SHIRT, 0.9), (SHIRT, SHIRT, 0.9), (SHIRT, COAT, 0.9), (BAG, BAG, 0.9)]
HISTORIES: dict[str, list[dict[str, float]]] = {
    "fold-1": [
        {"epoch": 1, "train/loss": 1.0, "train/accuracy": 0.5, "validation/loss": 0.8, "validation/accuracy": 0.5},
        {"epoch": 2, "train/loss": 0.6, "train/accuracy": 0.7, "validation/loss": 0.5, "validation/accuracy": 0.75},
    ],
    "fold-2": [
        {"epoch": 1, "train/loss": 1.2, "train/accuracy": 0.4, "validation/loss": 1.0, "validation/accuracy": 0.25},
        {"epoch": 2, "train/loss": 0.8, "train/accuracy": 0.6, "validation/loss": 0.7, "validation/accuracy": 0.5},
    ],
    "final": [
        {"epoch": 1, "train/loss": 0.9, "train/accuracy": 0.625},
        {"epoch": 2, "train/loss": 0.5, "train/accuracy": 0.8125},
    ],
}
CONFIG: dict[str, Any] = {
    "dataset": "FashionMNIST",
    "folds": 2,
    "epochs": 2,
    "batch_size": 64,
    "learning_rate": 0.001,
    "lr_schedule": "cosine",
    "mirror": True,
    "rng_seed": 314,
    "device": "auto",
    "precision": "auto",
    "workers": 3,
}
ENVIRONMENT: dict[str, Any] = {
    "started": "2026-11-26T18:30:00+00:00",
    "machine": "Linux x86_64, 2 cores",
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "device": "cpu",
    "precision": "bfloat16",
    "threads_per_fit": 1,
    "workers": 2,
    "seconds": 3723.4,
    "resumed": False,
    "wandb_run_ids": {},
}
NETWORK: dict[str, Any] = {
    "name": "NeuralNetwork",
    "printed": "NeuralNetwork()",
    "weights": 669706,
    "answers": [],
}
RUN_NAME = "NeuralNetwork-FashionMNIST-20261126-183000"


def make_evaluation(loss: float, answers: list[tuple[int, int, float]]) -> tuple[float, Tensor, Tensor]:
    """Return what `test_loop` returns, given a true label, a predicted one and its probability for each image."""
    labels = torch.tensor([true for true, _, _ in answers])
    probabilities = torch.zeros(len(answers), len(CLASS_NAMES))
    for row, (_, predicted, sureness) in zip(probabilities, answers, strict=True):
        row[:] = (1 - sureness) / (len(CLASS_NAMES) - 1)
        row[predicted] = sureness
    return loss, labels, probabilities


def make_dataset(test_labels: Tensor) -> Dataset:
    """Return a data set with ten training images and these test images, no two of which are the same.

    The n-th test image is black but for one pixel, of brightness n + 1, in its first row and second column.
    """
    train_labels = torch.tensor([COAT, COAT, COAT, SHIRT, SHIRT, SHIRT, SHIRT, BAG, BAG, BAG])
    test_images = torch.zeros(len(test_labels), 28, 28, dtype=torch.uint8)
    test_images[:, 0, 1] = torch.arange(1, len(test_labels) + 1, dtype=torch.uint8)
    return Dataset(torch.zeros(10, 28, 28, dtype=torch.uint8), train_labels, test_images, test_labels, CLASS_NAMES)


def make_checkpoints(test_answers: list[tuple[int, int, float]] = TEST_ANSWERS) -> dict[str, dict[str, Any]]:
    """Return the last checkpoint of each fit, as `train_all` does: the final fit comes first."""
    evaluations = {
        "final": make_evaluation(0.9, test_answers),
        "fold-1": make_evaluation(0.5, FOLD_1_ANSWERS),
        "fold-2": make_evaluation(0.7, FOLD_2_ANSWERS),
    }
    return {
        name: {"state": None, "history": HISTORIES[name], "evaluation": evaluation, "failure": None}
        for name, evaluation in evaluations.items()
    }


def make_hand_made_result(checkpoints: dict[str, dict[str, Any]] | None = None) -> ExperimentResult:
    """Return what the run came to, worked out by `make_result`."""
    checkpoints = checkpoints or make_checkpoints()
    _, test_labels, _ = checkpoints["final"]["evaluation"] or make_evaluation(0.9, TEST_ANSWERS)
    return make_result(
        CONFIG, make_dataset(test_labels), checkpoints, dict(ENVIRONMENT), PROJECT_DIR / "runs" / RUN_NAME
    )
