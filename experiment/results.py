"""Metrics of a run, computed from the predictions of its fits."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_utils import light_background_share
from experiment.formatting import format_metric
from experiment.identity import has_unequal_classes
from experiment.predictions import (
    DoubtfulLabel,
    Predictions,
    class_name,
    collect_predictions,
    find_doubtful_labels,
)
from train_utils import compute_accuracy

if TYPE_CHECKING:
    from experiment.prepare import Experiment
    from experiment.run_directory import RunDirectory
    from experiment.training import Checkpoint

History = list[dict[str, float]]  # the metrics of one fit, one dict per epoch
MAX_MISTAKES = 24


@dataclass
class FitResult:
    """Metrics of one fit on the images that it was evaluated on.

    Attributes
    ----------
    name : str
    loss, accuracy : float
    report : dict
        scikit-learn's `classification_report`.
    history : list of dict
        Metrics after each epoch.
    confusion : list of list of int
        Numbers of images by true class (row) and predicted class (column), in the order of `classes`.
    """

    name: str
    loss: float
    accuracy: float
    report: dict[str, Any]
    history: History
    confusion: list[list[int]]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of `report` and `confusion`."""
        return [name for name, row in self.report.items() if isinstance(row, dict) and not name.endswith(" avg")]

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds of this fit."""
        return {name: getattr(self, name) for name in ("name", "loss", "accuracy", "report", "history")}


@dataclass
class Mistake:
    """A test image (uint8, as in `Dataset`) that the final network classified wrongly, and the probability it gave."""

    image: Tensor
    true: str
    predicted: str
    probability: float


@dataclass(repr=False)
class ExperimentResult:
    """Results of a run; `to_dict()` is the content of results.json.

    Attributes
    ----------
    config : dict
    folds : list of FitResult
        Without the folds that diverged.
    final : FitResult or None
        None if the final fit diverged.
    failures : dict
        For each fit that diverged, by name, a sentence that says how.
    mistakes : list of Mistake
        On the test images, the most confident first.
    predictions : list of Predictions
        Of each fold, then for the test images; without the fits that diverged.
    doubtful_labels : list of DoubtfulLabel
        Of training images, the least probable label first.
    is_light_on_dark : bool
        Whether the training images are grey and the background of most is dark.
    environment : dict
        Time, machine, versions and W&B's ids.
    run_dir : Path
    """

    config: dict[str, Any]
    folds: list[FitResult]
    final: FitResult | None
    failures: dict[str, str]
    mistakes: list[Mistake]
    predictions: list[Predictions]
    doubtful_labels: list[DoubtfulLabel]
    is_light_on_dark: bool
    environment: dict[str, Any]
    run_dir: Path

    @property
    def cross_validation(self) -> dict[str, float]:
        """Mean and sample standard deviation (ddof = 1) over the folds; empty if fewer than two folds have a result."""
        if len(self.folds) < 2:
            return {}
        values = {
            "accuracy": [fold.accuracy for fold in self.folds],
            "loss": [fold.loss for fold in self.folds],
            "macro_f1": [fold.report["macro avg"]["f1-score"] for fold in self.folds],
            "weighted_f1": [fold.report["weighted avg"]["f1-score"] for fold in self.folds],
        }
        means = {f"{name}_mean": statistics.fmean(per_fold) for name, per_fold in values.items()}
        return means | {f"{name}_std": statistics.stdev(per_fold) for name, per_fold in values.items()}

    @property
    def has_unequal_classes(self) -> bool:
        """Whether macro F1 is shown beside the accuracy."""
        sizes: Counter[str] = Counter()
        for fold in self.folds:
            sizes.update({name: fold.report[name]["support"] for name in fold.classes})
        return has_unequal_classes(sizes)

    def __repr__(self) -> str:
        """Return three lines: the run directory, the test's metrics and those of the folds."""
        test = "no final fit: it diverged"
        if self.final:
            test = f"test accuracy {self.final.accuracy:.4f}, loss {format_metric(self.final.loss)}"
        folds = f"{len(self.folds)} folds"
        summary = self.cross_validation
        if summary:
            folds += f": accuracy {summary['accuracy_mean']:.4f} ± {summary['accuracy_std']:.4f} (standard deviation)"
        return f"ExperimentResult in {self.run_dir}\n  {test}\n  {folds}"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "config": self.config,
            "folds": [fold.to_dict() for fold in self.folds],
            "final": self.final.to_dict() if self.final else None,
            "failures": self.failures,
            "cross_validation": self.cross_validation,
            "environment": self.environment,
        }


def make_result(experiment: Experiment, checkpoints: dict[str, Checkpoint], folder: RunDirectory) -> ExperimentResult:
    """Compute the metrics of all fits from their last checkpoints."""
    dataset = experiment.dataset
    present = torch.cat([dataset.train_labels, dataset.test_labels]).unique().tolist()
    class_names = {label: dataset.class_names[label] for label in present}
    fits, mistakes, failures = {}, [], {}
    for name, checkpoint in checkpoints.items():
        if checkpoint["failure"]:
            failures[name] = checkpoint["failure"]
        else:
            fits[name] = _compute_metrics(name, checkpoint["history"], checkpoint["evaluation"], class_names)
    final = fits.pop("final", None)
    if final:
        _, labels, probabilities = checkpoints["final"]["evaluation"]
        mistakes = _find_mistakes(dataset.test_images, labels, probabilities, dataset.class_names)
    predictions = collect_predictions(experiment.fits, checkpoints)
    seconds = time.monotonic() - experiment.started
    is_grey = dataset.train_images.dim() == 3
    return ExperimentResult(
        config=experiment.config.to_dict(),
        folds=list(fits.values()),
        final=final,
        failures=failures,
        mistakes=mistakes,
        predictions=predictions,
        doubtful_labels=find_doubtful_labels(predictions, dataset),
        is_light_on_dark=is_grey and light_background_share(dataset.train_images) < 0.5,
        environment=experiment.environment | {"seconds": seconds, "resumed": folder.resumed},
        run_dir=folder.path,
    )


def _compute_metrics(
    name: str, history: History, evaluation: tuple[float, Tensor, Tensor], class_names: dict[int, str]
) -> FitResult:
    """Return the metrics of a fit.

    Parameters
    ----------
    name : str
    history : list of dict
    evaluation : tuple
        What `test_loop` returned: loss, labels and probabilities.
    class_names : dict
        Names by label of the classes that have images. Other classes have no row in the report.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    loss, labels, probabilities = evaluation
    predictions = probabilities.argmax(1)
    present = list(class_names)
    report = classification_report(
        labels, predictions, labels=present, target_names=list(class_names.values()), output_dict=True, zero_division=0
    )
    report.pop("micro avg", None)  # there instead of the accuracy if a class without images was predicted
    accuracy = report["accuracy"] = compute_accuracy(labels, probabilities)
    confusion = confusion_matrix(labels, predictions, labels=present).tolist()
    return FitResult(name, loss, accuracy, report, history, confusion)


def _find_mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, class_names: list[str]) -> list[Mistake]:
    """Return the wrongly classified images, the most confident first."""
    confidence, predictions = probabilities.max(1)
    wrong = (predictions != labels).nonzero().flatten()
    most_confident_first = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    mistakes = []
    for i in most_confident_first[:MAX_MISTAKES].tolist():
        true, predicted = class_names[labels[i]], class_name(class_names, int(predictions[i]))
        mistakes.append(Mistake(images[i], true, predicted, confidence[i].item()))
    return mistakes
