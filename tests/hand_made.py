"""A run whose metrics can be computed by hand: three classes, ten test images, two folds, two epochs.

No image has label 2, "Hat".
"""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_files import PROJECT_DIR
from data_utils import Dataset
from experiment.model_check import ModelSummary
from experiment.results import ExperimentResult, make_result

FIGURES = ("learning_curves.png", "per_class.png", "confusion_matrix.png", "mistakes.png")
CLASS_NAMES = ["Coat", "Shirt", "Hat", "Bag"]
COAT, SHIRT, HAT, BAG = range(4)
# For each image: the true class, the predicted class and its probability.
Predictions = list[tuple[int, int, float]]
TEST_PREDICTIONS: Predictions = [
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
FOLD_1_PREDICTIONS: Predictions = [(COAT, COAT, 0.9), (COAT, SHIRT, 0.9), (SHIRT, SHIRT, 0.9), (BAG, BAG, 0.9)]
FOLD_2_PREDICTIONS: Predictions = [(COAT, SHIRT, 0.9), (SHIRT, SHIRT, 0.9), (SHIRT, COAT, 0.9), (BAG, BAG, 0.9)]
# Of the ten training images, each fold holds out four.
FOLD_1_MASK = np.isin(range(10), [0, 1, 3, 7])
FOLD_2_MASK = np.isin(range(10), [2, 4, 5, 8])
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
    "image_shape": [1, 28, 28],
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
}
RUN_DIR = PROJECT_DIR / "runs" / "NeuralNetwork-FashionMNIST-20261126-183000"
SECONDS = 3723  # that the run took


def make_dataset(test_labels: Tensor) -> Dataset:
    """Return a data set with ten training images and distinct test images.

    The n-th test image is 0 except for one pixel in the first row and second column, which is n + 1.
    """
    train_labels = torch.tensor([COAT, COAT, COAT, SHIRT, SHIRT, SHIRT, SHIRT, BAG, BAG, BAG])
    test_images = torch.zeros(len(test_labels), 28, 28, dtype=torch.uint8)
    test_images[:, 0, 1] = torch.arange(1, len(test_labels) + 1, dtype=torch.uint8)
    return Dataset(torch.zeros(10, 28, 28, dtype=torch.uint8), train_labels, test_images, test_labels, CLASS_NAMES)


def make_experiment(network: str = "NeuralNetwork", test_predictions: Predictions = TEST_PREDICTIONS) -> Any:
    """Return what results and reports use of an `Experiment`."""
    return SimpleNamespace(
        config=SimpleNamespace(to_dict=lambda: CONFIG),
        dataset=make_dataset(torch.tensor([true for true, _, _ in test_predictions])),
        environment=ENVIRONMENT,
        fits=[
            SimpleNamespace(name="final", held_out_mask=None),
            SimpleNamespace(name="fold-1", held_out_mask=FOLD_1_MASK.tobytes()),
            SimpleNamespace(name="fold-2", held_out_mask=FOLD_2_MASK.tobytes()),
        ],
        model=ModelSummary(name=network, printed=f"{network}()", parameters=669706, fingerprint={}),
        started=time.monotonic() - SECONDS,
    )


def make_evaluation(loss: float, predictions: Predictions) -> tuple[float, Tensor, Tensor]:
    """Return what `test_loop` returns for these predictions."""
    labels = torch.tensor([true for true, _, _ in predictions])
    probabilities = torch.zeros(len(predictions), len(CLASS_NAMES))
    for row, (_, predicted, confidence) in zip(probabilities, predictions, strict=True):
        row[:] = (1 - confidence) / (len(CLASS_NAMES) - 1)
        row[predicted] = confidence
    return loss, labels, probabilities


def make_hand_made_result(
    test_predictions: Predictions = TEST_PREDICTIONS,
    failures: dict[str, str] | None = None,
    black_images: tuple[int, ...] | None = None,
) -> ExperimentResult:
    """Return the result of the run, computed by `make_result`.

    Parameters
    ----------
    test_predictions : list of tuple
    failures : dict, optional
        A sentence for each fit that diverged, by name.
    black_images : tuple of int, optional
        The shape of black training images that replace the others.
    """
    evaluations = {
        "final": make_evaluation(0.9, test_predictions),
        "fold-1": make_evaluation(0.5, FOLD_1_PREDICTIONS),
        "fold-2": make_evaluation(0.7, FOLD_2_PREDICTIONS),
    }
    checkpoints: dict[str, dict[str, Any]] = {}
    for name, evaluation in evaluations.items():
        checkpoints[name] = {"state": None, "history": HISTORIES[name], "evaluation": evaluation, "failure": None}
    for name, failure in (failures or {}).items():
        checkpoints[name] |= {"evaluation": None, "failure": failure}
    folder: Any = SimpleNamespace(path=RUN_DIR, resumed=False)
    experiment = make_experiment(test_predictions=test_predictions)
    if black_images is not None:
        images = torch.zeros(len(experiment.dataset.train_labels), *black_images, dtype=torch.uint8)
        experiment.dataset = experiment.dataset._replace(train_images=images)
    result = make_result(experiment, checkpoints, folder)
    result.environment["wandb_run_ids"] = {}  # added by `publish`
    return result


class Clock:
    """Replaces the `time` module; a test sets the time."""

    now = 1000.0

    def monotonic(self) -> float:
        """Return the time that the test has set."""
        return self.now
