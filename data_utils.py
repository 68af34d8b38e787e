"""Images in memory: the data set, its split, its normalization, and batches."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STATISTICS_CHUNK = 2**20  # pixels that are counted at a time, so that no copy of all images is needed


class Dataset(NamedTuple):
    """A data set in memory, or in a file that is mapped into memory.

    Images are uint8: (N, height, width) if they are grey, (N, 3, height, width) if they are in colour. Labels are int64
    (N,). `class_names` has the name of each class, `notes` what the user should know about the pictures, one sentence
    each, `files` the names of the pictures of a folder, those for training first. `source` is a digest of the images
    before they were resized; "" if they were not.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    source: str = ""

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, in hexadecimal."""
        sha = hashlib.sha256()
        for tensor in self[:4]:
            sha.update(f"{tuple(tensor.shape)}".encode())
            sha.update(np.ascontiguousarray(tensor.numpy()).data)
        return sha.hexdigest()


class Part(NamedTuple):
    """Some of the images of a data set: those with the indices `rows`, or all of them if `rows` is None."""

    images: Tensor
    labels: Tensor
    rows: Tensor | None


def split(dataset: Dataset, held_out_mask: bytes | None) -> tuple[Part, Part]:
    """Return the part of a data set to train on, and the one to evaluate on; no image is copied.

    Parameters
    ----------
    dataset : Dataset
    held_out_mask : bytes or None
        One byte per training image, 1 to evaluate on it, 0 to train on it: `tobytes` of a numpy array of bools. None:
        train on all of them and evaluate on the test images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if held_out_mask is None:
        return Part(images, labels, None), Part(dataset.test_images, dataset.test_labels, None)
    held_out = torch.tensor(np.frombuffer(held_out_mask, dtype=bool))
    return Part(images, labels, (~held_out).nonzero()[:, 0]), Part(images, labels, held_out.nonzero()[:, 0])


def pixel_statistics(images: Tensor, rows: Tensor | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels of uint8 images, per channel, scaled to 0 … 1.

    The sums are sums of integers, so the result does not depend on their order or on the number of threads.

    Parameters
    ----------
    images : Tensor
        As in `Dataset`.
    rows : Tensor, optional
        The indices of the images that count; by default, all do.
    """
    channels = 1 if images.dim() == 3 else images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    number = len(images) if rows is None else len(rows)
    chunk_size = max(1, STATISTICS_CHUNK // images[0].numel())
    for start in range(0, number, chunk_size):
        end = min(start + chunk_size, number)
        chunk = images[start:end] if rows is None else images[rows[start:end]]
        for channel in range(channels):
            pixels = chunk if images.dim() == 3 else chunk[:, channel]
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
    means, stds = zip(*[_mean_and_std(each) for each in counts], strict=True)
    return means, stds


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of pixels, given how many there are of each of the 256 values."""
    values = torch.arange(256)
    pixels = int(counts.sum())
    total = (counts * values).sum().item()
    total_of_squares = (counts * values**2).sum().item()

    mean = total / pixels
    variance = total_of_squares / pixels - mean**2
    std = max(variance, 0.0) ** 0.5
    if std == 0:  # all pixels are equal: do not divide by 0
        std = 255.0
    return mean / 255, std / 255


def light_background_share(images: Tensor) -> float:
    """Return the share of images whose background is light: the median of their outermost pixels is above 127."""
    edges = [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]]
    return (torch.cat(edges, dim=-1).flatten(1).median(dim=1).values > 127).double().mean().item()


@dataclass(eq=False)
class Batches:
    """Normalized float batches, created one at a time from images that stay uint8 in memory.

    Iterating yields (images, labels): float32 (B, channels, height, width) and int64 (B,).

    Attributes
    ----------
    images, labels : Tensor
        As in `Dataset`.
    rows : Tensor or None
        The indices of the images that the batches consist of; None: all of them.
    batch_size : int
        Images per batch; the last batch may be smaller.
    mean, std : tuple of float
        Of the pixels of the training images, per channel, scaled to 0 … 1.
    device : torch.device
        Where the batches are created; the images are moved there once, as bytes.
    training, mirror : bool
        `training` shuffles the images and leaves out a last batch of one image, on which batch norm cannot train;
        `mirror` mirrors each image left to right with probability ½. Both use torch's global generator.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor | None
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    training: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.rows is not None and self.device.type != "cpu":  # only what is needed is moved there
            self.images, self.labels, self.rows = self.images[self.rows], self.labels[self.rows], None
        self.images = self.images.to(self.device)
        self.labels = self.labels.to(self.device)
        self.batch_size = min(self.batch_size, self._number)

    @property
    def _number(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)

    def __len__(self) -> int:
        full, rest = divmod(self._number, self.batch_size)
        smallest = 2 if self.training else 1
        return full + 1 if rest >= smallest else full

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self._number) if self.training else torch.arange(self._number)
        if self.rows is not None:
            order = self.rows[order]
        indices = order.to(self.device).split(self.batch_size)
        for index in indices[: len(self)]:
            yield self._normalize(self.images[index]), self.labels[index]

    def _normalize(self, images: Tensor) -> Tensor:
        if images.dim() == 3:
            images = images.unsqueeze(1)
        if self.mirror:
            is_mirrored = torch.rand(len(images), 1, 1, 1).to(self.device) < 0.5
            images = torch.where(is_mirrored, images.flip(-1), images)
        images = images.float()
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            images[:, channel].sub_(255 * mean).div_(255 * std)
        return images
