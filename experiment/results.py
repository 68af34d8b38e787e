"""What a fit and an experiment came to: figures worked out from predictions."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_utils import Dataset
from train_utils import accuracy_of

MISTAKES_SHOWN = 24


@dataclass
class FitResult:
    """What a fit came to: `history` has a dict an epoch, all else is of the images that the fit was evaluated on.

    `confusion` counts images by true class (row) and predicted class (column), in the order of the report's classes.
    """

    name: str
    loss: float
    accuracy: float
    report: dict[str, Any]
    history: list[dict[str, float]]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds of this fit."""
        return {name: getattr(self, name) for name in ("name", "loss", "accuracy", "report", "history")}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the report and of `confusion`."""
        return [name for name, row in self.report.items() if isinstance(row, dict) and not name.endswith(" avg")]


@dataclass
class Mistake:
    """A test image (uint8, 28×28) that the final network takes for something else, and how sure it is of that."""

    image: Tensor
    true: str
    predicted: str
    probability: float


@dataclass(repr=False)
class ExperimentResult:
    """What a run came to; ``to_dict()`` is the content of results.json, which lies in `run_dir`.

    `failures` says of each fit that diverged what happened; such a fit is not among the folds, or final is None.
    """

    config: dict[str, Any]
    folds: list[FitResult]
    final: FitResult | None
    failures: dict[str, str]
    mistakes: list[Mistake]
    environment: dict[str, Any]
    run_dir: Path

    @property
    def cross_validation(self) -> dict[str, float]:
        """Mean and sample standard deviation (ddof = 1) over the folds of loss, accuracy and averages.

        Empty where all folds but one, or all, have failed.
        """
        if len(self.folds) < 2:
            return {}
        values = {
            "accuracy": [fold.accuracy for fold in self.folds],
            "loss": [fold.loss for fold in self.folds],
            "macro_f1": [fold.report["macro avg"]["f1-score"] for fold in self.folds],
            "weighted_f1": [fold.report["weighted avg"]["f1-score"] for fold in self.folds],
        }
        means = {f"{name}_mean": statistics.fmean(of_folds) for name, of_folds in values.items()}
        return means | {f"{name}_std": statistics.stdev(of_folds) for name, of_folds in values.items()}

    def __repr__(self) -> str:
        """Return three lines: where it lies, what the test said, what the folds said."""
        test = "no final fit: it diverged"
        if self.final:
            test = f"test accuracy {self.final.accuracy:.4f}, loss {self.final.loss:.4f}"
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
            "final": self.final and self.final.to_dict(),
            "failures": self.failures,
            "cross_validation": self.cross_validation,
            "environment": self.environment,
        }


def make_result(
    config: dict[str, Any],
    dataset: Dataset,
    checkpoints: dict[str, dict[str, Any]],
    environment: dict[str, Any],
    run_dir: Path,
) -> ExperimentResult:
    """Work out the figures of all fits from their checkpoints after the last epoch."""
    present = torch.cat([dataset.train_labels, dataset.test_labels]).unique().tolist()
    class_names = {label: dataset.class_names[label] for label in present}
    folds, final, mistakes, failures = [], None, [], {}
    for name, checkpoint in checkpoints.items():
        if checkpoint["failure"]:
            failures[name] = checkpoint["failure"]
        elif name == "final":
            final = _evaluate(name, checkpoint["history"], checkpoint["evaluation"], class_names)
            _, labels, probabilities = checkpoint["evaluation"]
            mistakes = _find_mistakes(dataset.test_images, labels, probabilities, dataset.class_names)
        else:
            folds.append(_evaluate(name, checkpoint["history"], checkpoint["evaluation"], class_names))
    return ExperimentResult(config, folds, final, failures, mistakes, environment, run_dir)


def _evaluate(
    name: str, history: list[dict[str, float]], evaluation: tuple[float, Tensor, Tensor], class_names: dict[int, str]
) -> FitResult:
    """Work out a fit's figures from what `test_loop` returned; a class without any image has no name and no row."""
    from sklearn.metrics import classification_report, confusion_matrix

    loss, labels, probabilities = evaluation
    predictions = probabilities.argmax(1)
    present, names = list(class_names), list(class_names.values())
    report = classification_report(
        labels, predictions, labels=present, target_names=names, output_dict=True, zero_division=0
    )
    report.pop("micro avg", None)  # stands in for the accuracy where a class was predicted that does not occur
    accuracy = report["accuracy"] = accuracy_of(labels, probabilities)
    confusion = confusion_matrix(labels, predictions, labels=present).tolist()
    return FitResult(name, loss, accuracy, report, history, confusion)


def _find_mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, class_names: list[str]) -> list[Mistake]:
    """Return the wrongly classified images that the network is most sure of, the surest first."""
    sureness, predictions = probabilities.max(1)
    wrong = (predictions != labels).nonzero().flatten()
    surest = wrong[sureness[wrong].argsort(descending=True, stable=True)][:MISTAKES_SHOWN]
    mistakes = []
    for i in surest.tolist():
        true, predicted = class_names[labels[i]], class_names[predictions[i]]
        mistakes.append(Mistake(images[i], true, predicted, sureness[i].item()))
    return mistakes
