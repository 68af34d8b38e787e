"""What the networks predict for each image: predictions.csv, and the training images whose label is doubtful."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_files import folder_class_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from data_utils import Dataset
    from experiment.training import Checkpoint
    from train_utils import Fit

MAX_DOUBTFUL_LABELS = 24
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes a cell that begins with one of these


@dataclass(frozen=True)
class Predictions:
    """What one network predicts for images that it was not trained on.

    Attributes
    ----------
    split : str
        The fold that holds the images out, or "test".
    indices : Tensor
        int64 (N,): the positions of the images among the training images or among the test images.
    labels, probabilities : Tensor
        int64 (N,) and float32 (N, logits).
    """

    split: str
    indices: Tensor
    labels: Tensor
    probabilities: Tensor

    @property
    def predicted(self) -> Tensor:
        """The predicted labels, int64 (N,)."""
        return self.probabilities.argmax(1)

    @property
    def label_probability(self) -> Tensor:
        """The probability of each image's own label, float32 (N,)."""
        return self.probabilities.gather(1, self.labels[:, None]).squeeze(1)


@dataclass
class DoubtfulLabel:
    """A training image to whose label the network that was trained without it gives a low probability.

    Attributes
    ----------
    image : Tensor
        uint8, as in the data set.
    name : str
        Its file or, if the data set has no files, its index among the training images, as in predictions.csv.
    label, predicted : str
        The names of two classes.
    probability : float
        The probability that the network gives to the label.
    """

    image: Tensor
    name: str
    label: str
    predicted: str
    probability: float


def collect_predictions(fits: list[Fit], checkpoints: dict[str, Checkpoint]) -> list[Predictions]:
    """Return the predictions of each fold, then those for the test images; none of a fit that diverged."""
    folds, test = [], []
    for fit in fits:
        checkpoint = checkpoints[fit.name]
        if checkpoint["failure"]:
            continue
        _, labels, probabilities = checkpoint["evaluation"]
        if fit.held_out_mask is None:
            test.append(Predictions("test", torch.arange(len(labels)), labels, probabilities))
        else:
            indices = torch.from_numpy(np.frombuffer(fit.held_out_mask, dtype=bool).nonzero()[0])
            folds.append(Predictions(fit.name, indices, labels, probabilities))
    return folds + test


def predictions_csv(predictions: list[Predictions], dataset: Dataset) -> bytes:
    """Return the content of predictions.csv: a row for each training image, in their order, then for each test image.

    The columns are ``index`` (in a folder of pictures ``file``), ``split``, ``label``, ``prediction``, ``label_doubt``
    (1 − the probability of the label) and, for each class, ``p(class)``. Probabilities have nine significant digits, so
    that they can be read back as the same float32. An apostrophe is put before a name that a spreadsheet would take for
    a formula.
    """
    columns = _columns("file" if dataset.files else "index", dataset.class_names)
    folds = [part for part in predictions if part.split != "test"]
    lines = [",".join(map(_cell, columns))]
    if folds:
        fold_lines = [line for part in folds for line in _lines(part, dataset)]
        in_order = torch.cat([part.indices for part in folds]).argsort().tolist()
        lines += [fold_lines[position] for position in in_order]
    for part in predictions:
        if part.split == "test":
            lines += _lines(part, dataset)
    return _encode("\n".join([*lines, ""]))


def pictures_csv(paths: Sequence[Path], probabilities: Tensor, class_names: list[str]) -> bytes:
    """Return a table of pictures with the columns of predictions.csv.

    The label is the name of a picture's folder if that is a class, else empty. `split` is always empty.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_not_a_formula, _columns("file", class_names)))
    for path, row in zip(paths, probabilities.tolist(), strict=True):
        folder = folder_class_name(path.parent)
        label = folder if folder in class_names else ""
        doubt = f"{1 - row[class_names.index(label)]:.9g}" if label else ""
        prediction = class_names[row.index(max(row))]
        names = map(_not_a_formula, (str(path), "", label, prediction))
        writer.writerow([*names, doubt, *(f"{probability:.9g}" for probability in row)])
    return _encode(buffer.getvalue())


def _encode(table: str) -> bytes:
    """Return a table in UTF-8; if it is not ASCII, with a byte order mark, which spreadsheets need."""
    return table.encode("utf-8" if table.isascii() else "utf-8-sig", errors="replace")


def _columns(first: str, class_names: list[str]) -> list[str]:
    return [first, "split", "label", "prediction", "label_doubt", *(f"p({name})" for name in class_names)]


def _lines(part: Predictions, dataset: Dataset) -> list[str]:
    cells = [_cell(name) for name in dataset.class_names]
    names = [_cell(name) for name in _image_names(part, dataset)]
    doubts = 1 - part.label_probability.double()
    numbers = torch.column_stack([doubts, part.probabilities[:, : len(cells)]]).tolist()
    # One format for a whole row: five times as fast as the csv module.
    row_format = f"%s,{part.split},%s,%s" + ",%.9g" * (1 + len(cells))
    lines = []
    for name, label, predicted, row in zip(names, part.labels.tolist(), part.predicted.tolist(), numbers, strict=True):
        lines.append(row_format % (name, cells[label], class_name(cells, predicted), *row))
    return lines


def _image_names(part: Predictions, dataset: Dataset) -> list[str]:
    """Return the file of each picture or, if the data set has no files, its index."""
    if not dataset.files:
        return [str(index) for index in part.indices.tolist()]
    first = len(dataset.train_labels) if part.split == "test" else 0
    return [dataset.files[first + index] for index in part.indices.tolist()]


def _cell(value: str) -> str:
    """Return a value as a cell: with quotation marks if it needs them, and never as a formula."""
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_not_a_formula(value)])
    return buffer.getvalue().removesuffix("\r\n")


def _not_a_formula(value: str) -> str:
    return f"'{value}" if value.startswith(FORMULA_STARTS) else value


def class_name(names: list[str], label: int) -> str:
    """Return the name of a class; a network may have more logits than the data set has classes."""
    return names[label] if label < len(names) else f"no class (logit {label})"


def find_doubtful_labels(predictions: list[Predictions], dataset: Dataset) -> list[DoubtfulLabel]:
    """Return the wrongly predicted training images whose label is least probable, at most 24, the least probable first.

    Each is evaluated by the network of the fold that holds it out. This ranking ("self-confidence") is one of those
    that Northcutt, Jiang and Chuang (2021), *Confident Learning: Estimating Uncertainty in Dataset Labels*, compare;
    tests/benchmarks/label_errors.py shows that it finds most.
    """
    folds = [part for part in predictions if part.split != "test"]
    if not folds:
        return []
    indices = torch.cat([part.indices for part in folds])
    labels = torch.cat([part.labels for part in folds])
    predicted = torch.cat([part.predicted for part in folds])
    probability = torch.cat([part.label_probability for part in folds])
    names = [name for part in folds for name in _image_names(part, dataset)]
    least_probable_first = [row for row in probability.argsort(stable=True).tolist() if predicted[row] != labels[row]]
    return [
        DoubtfulLabel(
            image=dataset.train_images[indices[row]],
            name=names[row],
            label=dataset.class_names[labels[row]],
            predicted=class_name(dataset.class_names, int(predicted[row])),
            probability=probability[row].item(),
        )
        for row in least_probable_first[:MAX_DOUBTFUL_LABELS]
    ]
