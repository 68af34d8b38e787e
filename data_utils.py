"""Images in memory: the data set, its split, its normalization, and batches."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Dataset(NamedTuple):
    """A data set in memory: images uint8 (N, 28, 28), labels int64 (N,), and the name of each class."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, in hexadecimal."""
        sha = hashlib.sha256()
        for tensor in self[:4]:
            sha.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return sha.hexdigest()


def split(dataset: Dataset, held_out_mask: bytes | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on, and those to evaluate on.

    Parameters
    ----------
    dataset : Dataset
    held_out_mask : bytes or None
        One byte per training image, 1 to evaluate on it, 0 to train on it: `tobytes` of a numpy array of bools. None:
        train on all of them and evaluate on the test images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if held_out_mask is None:
        return (images, labels), (dataset.test_images, dataset.test_labels)
    held_out = torch.tensor(np.frombuffer(held_out_mask, dtype=bool))
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the pixels of uint8 images, scaled to 0 … 1.

    The sums are sums of integers, so the result does not depend on their order or on the number of threads.
    """
    counts = torch.bincount(images.flatten(), minlength=256)
    values = torch.arange(256)
    total = (counts * values).sum().item()
    total_of_squares = (counts * values**2).sum().item()

    mean = total / images.numel()
    variance = total_of_squares / images.numel() - mean**2
    std = max(variance, 0.0) ** 0.5
    if std == 0:  # all pixels are equal: do not divide by 0
        std = 255.0
    return mean / 255, std / 255


@dataclass(eq=False)
class Batches:
    """Normalized float batches, created one at a time from images that stay uint8 in memory.

    Iterating yields (images, labels): float32 (B, 1, 28, 28) and int64 (B,).

    Attributes
    ----------
    images, labels : Tensor
        uint8 (N, 28, 28) and int64 (N,).
    batch_size : int
        Images per batch; the last batch may be smaller.
    mean, std : float
        Of the pixels of the training images, scaled to 0 … 1.
    device : torch.device
        Where the batches are created; the images are moved there once, as bytes.
    training, mirror : bool
        `training` shuffles the images and leaves out a last batch of one image, on which batch norm cannot train;
        `mirror` mirrors each image left to right with probability ½. Both use torch's global generator.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    mean: float
    std: float
    device: torch.device
    training: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        self.images = self.images.to(self.device)
        self.labels = self.labels.to(self.device)
        self.batch_size = min(self.batch_size, len(self.labels))

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        smallest = 2 if self.training else 1
        return full + 1 if rest >= smallest else full

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.training else torch.arange(len(self.labels))
        indices = order.to(self.device).split(self.batch_size)
        for index in indices[: len(self)]:
            images = self.images[index].unsqueeze(1)
            if self.mirror:
                is_mirrored = torch.rand(len(index), 1, 1, 1).to(self.device) < 0.5
                images = torch.where(is_mirrored, images.flip(-1), images)
            yield images.float().sub_(255 * self.mean).div_(255 * self.std), self.labels[index]
