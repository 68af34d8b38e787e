"""Data set on disk → tensors → batches. Knows nothing of networks, folds' results or logging."""

import gzip
import hashlib
import os
import shutil
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torch.nn import functional
from torchvision import datasets

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_STALL_SECONDS = 15  # a download that brings no byte for so long is given up; with imports, 30 s in all
FILE_KINDS = {  # file name -> dimensions, as in http://yann.lecun.com/exdb/mnist (the IDX format)
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


class DatasetError(OSError):
    """The data set is not there, cannot be had or is damaged; the message says what to do."""


class Dataset(NamedTuple):
    """A data set in memory: images uint8 (N, 28, 28), labels int64 (N,), one class name a label."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]

    def labels_present(self) -> list[int]:
        """Return the labels that occur, in order."""
        return torch.cat([self.train_labels, self.test_labels]).unique().tolist()

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, in hexadecimal."""
        sha = hashlib.sha256()
        for tensor in self[:4]:
            sha.update(f"{tuple(tensor.shape)}".encode())
            sha.update(tensor.numpy().data)
        return sha.hexdigest()


def load_dataset(name: str, data_dir: str | Path) -> Dataset:
    """Load a data set into memory, getting it first where it is not on disk.

    Parameters
    ----------
    name : {"MNIST", "FashionMNIST", "KMNIST", "Digits"}
        "Digits" comes with scikit-learn and needs no file; the others are torchvision's.
    data_dir : str or Path
        Where torchvision keeps its data sets: the files lie in ``<data_dir>/<name>/raw``.

    Returns
    -------
    Dataset
        Train and test images (uint8, N×28×28), labels (int64, N) and class names.

    Raises
    ------
    DatasetError
        If the files cannot be had, or one of them is damaged.
    """
    if name == "Digits":
        return _load_digits()
    torchvision_class = getattr(datasets, name)
    raw_dir = Path(data_dir) / name / "raw"
    if not all((raw_dir / file).is_file() for file in FILE_KINDS):
        _get_files(torchvision_class, Path(data_dir), raw_dir)
    for file, dimensions in FILE_KINDS.items():
        _check_idx_file(raw_dir / file, dimensions)
    train, test = (torchvision_class(str(data_dir), train=train) for train in (True, False))
    for part, prefix in ((train, "train"), (test, "t10k")):
        labels_path = raw_dir / f"{prefix}-labels-idx1-ubyte"
        if len(part.data) != len(part.targets):
            raise _damaged(labels_path, f"it holds {len(part.targets)} labels for {len(part.data)} images")
        if part.targets.max() >= len(train.classes):
            raise _damaged(labels_path, f"it holds the label {part.targets.max()}, but the last class is number 9")
    return Dataset(train.data, train.targets.long(), test.data, test.targets.long(), list(train.classes))


@lru_cache(maxsize=1)
def cached_dataset(name: str, data_dir: str | Path, digest: str) -> Dataset:
    """Load a data set once a process, and again only when its digest is another.

    Raises
    ------
    DatasetError
        If what lies on this machine's disk is not the data set with that digest.
    """
    dataset = load_dataset(name, data_dir)
    if dataset.digest() != digest:
        raise DatasetError(f"{name} in {data_dir} is not the data set that this run began with. Start the run again.")
    return dataset


def folds_problem(dataset: Dataset, folds: int) -> str | None:
    """Return what is wrong with that many folds of the training images, or None."""
    labels, counts = dataset.train_labels.unique(return_counts=True)
    smallest, images = int(counts.argmin()), len(dataset.train_labels)
    if folds > int(counts[smallest]):  # int: a tensor compares no integer beyond 64 bits
        name = dataset.class_names[labels[smallest]]
        return (
            f"FOLDS must be at most {counts[smallest]}, the training images of the smallest class ({name}), got {folds}"
        )
    if images - -(-images // folds) < 2:
        return f"FOLDS must leave at least 2 images to train on, but of {images} training images {folds} folds leave 1"
    return None


def split(
    dataset: Dataset, folds: int, fold: int | None, rng_seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) that a fit trains on, and those that it is evaluated on.

    Parameters
    ----------
    dataset : Dataset
    folds : int
        Parts of the training images, stratified and shuffled.
    fold : int or None
        The part held out, counted from 0; None: train on all, evaluate on the test images.
    rng_seed : int
        Seed of the shuffle.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if fold is None:
        return (images, labels), (dataset.test_images, dataset.test_labels)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=rng_seed)
    train, held_out = (torch.from_numpy(part) for part in list(splitter.split(labels, labels))[fold])
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the pixels of uint8 images, scaled to 0 … 1.

    Sums are of integers, so the result does not depend on their order or on the number of threads.
    """
    counts, values = torch.bincount(images.flatten(), minlength=256), torch.arange(256)
    total, squares = ((counts * values**power).sum().item() for power in (1, 2))
    mean = total / images.numel()
    std = max(squares / images.numel() - mean**2, 0.0) ** 0.5
    return mean / 255, (std or 255.0) / 255  # images of one single grey have no spread to divide by


class Batches:
    """Normalised float batches of images that stay uint8 in memory, made one at a time.

    Iterating yields (images, labels): float32 (B, 1, 28, 28) and int64 (B,).

    Parameters
    ----------
    images, labels : Tensor
        uint8 (N, 28, 28) and int64 (N,).
    batch_size : int
        Images in a batch; the last one may be smaller.
    mean, std : float
        Of the training images' pixels, scaled to 0 … 1.
    device : torch.device
        Where the batches shall be; the images go there at once, as bytes.
    training : bool
        Shuffle (with torch's global generator), and leave out a last batch of one image: batch norm cannot train on it.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: float,
        std: float,
        device: torch.device,
        training: bool = False,
    ) -> None:
        self.images, self.labels, self.training = images.to(device), labels.to(device), training
        self.batch_size = min(batch_size, len(labels))
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (rest > (1 if self.training else 0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count) if self.training else torch.arange(count)
        for index in order.to(self.labels.device).split(self.batch_size)[: len(self)]:
            pixels = self.images[index].unsqueeze(1).float()
            yield pixels.sub_(255 * self.mean).div_(255 * self.std), self.labels[index]


def _load_digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8×8 → 28×28, a fifth of them (stratified, fixed) for testing."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    images = functional.interpolate(small, size=(28, 28), mode="bilinear").squeeze(1).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return Dataset(
        images[train], labels[train], images[test], labels[test], [str(name) for name in digits.target_names]
    )


def _get_files(torchvision_class: type[datasets.MNIST], data_dir: Path, raw_dir: Path) -> None:
    """Put the four unpacked files into raw_dir: from .gz files beside them, Debian's package, or by download."""
    missing = [file for file in FILE_KINDS if not (raw_dir / file).is_file()]
    sources = [raw_dir]
    if raw_dir.parent.name == "FashionMNIST" and len(missing) == len(FILE_KINDS):
        sources.append(DEBIAN_FASHION_MNIST)  # never to complete somebody's own files
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unfinished-", ignore_cleanup_errors=True) as temporary:
        source = next((path for path in sources if all((path / f"{file}.gz").is_file() for file in missing)), None)
        if source is not None:
            ready_dir = Path(temporary)
            for file in missing:
                _unpack(source / f"{file}.gz", ready_dir / file)
                _check_idx_file(ready_dir / file, FILE_KINDS[file], blame=source / f"{file}.gz")
        else:
            _download(torchvision_class, Path(temporary), raw_dir)
            ready_dir = Path(temporary) / raw_dir.parent.name / "raw"
        raw_dir.mkdir(parents=True, exist_ok=True)
        for file in missing:
            os.replace(ready_dir / file, raw_dir / file)  # whole or not at all


def _unpack(packed: Path, unpacked: Path) -> None:
    try:
        with gzip.open(packed) as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(packed, str(error)) from None


def _download(torchvision_class: type[datasets.MNIST], folder: Path, raw_dir: Path) -> None:
    """Let torchvision download into folder, and give up where no byte arrives for a while.

    torchvision opens its URLs without a timeout, and no socket timeout covers a name server that does not answer.
    """
    name = torchvision_class.__name__
    reason: list[str] = []

    def download() -> None:
        try:
            torchvision_class(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            reason.append(" ".join(str(error).split()) or type(error).__name__)

    print(f"Downloading {name} …", flush=True)
    thread = threading.Thread(target=download, daemon=True)  # daemon: a hanging download must not keep us from ending
    thread.start()
    size, last_change = -1, time.monotonic()
    while thread.is_alive() and time.monotonic() - last_change < DOWNLOAD_STALL_SECONDS:
        thread.join(0.2)
        new_size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if new_size != size:
            size, last_change = new_size, time.monotonic()
    if thread.is_alive():
        reason.append(f"nothing arrived for {DOWNLOAD_STALL_SECONDS} seconds")
    if reason:
        debian = ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu" if name == "FashionMNIST" else ""
        raise DatasetError(
            f"{name} is not in {raw_dir} and could not be downloaded ({reason[0]}). Copy its four files "
            f'({", ".join(FILE_KINDS)}; .gz will do) there{debian}, or set DATASET = "Digits", which needs no download.'
        )


def _check_idx_file(path: Path, dimensions: int, blame: Path | None = None) -> None:
    """Raise unless the header of an IDX file of unsigned bytes fits its length and this project's 28×28 images.

    `blame` is the file to name where `path` was only unpacked from it.
    """
    with open(path, "rb") as file:
        header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions:
        raise _damaged(blame or path, f"it is only {len(header)} bytes long")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", header)
    if magic != 0x0800 + dimensions:
        raise _damaged(blame or path, f"it begins with {header[:4].hex()} instead of {0x0800 + dimensions:08x}")
    expected, found = len(header) + int(np.prod(sizes, dtype=object)), path.stat().st_size
    if found != expected:
        raise _damaged(blame or path, f"it is {found} bytes long, but its header asks for {expected}")
    if sizes[0] == 0:
        raise _damaged(blame or path, "it is empty")
    if dimensions == 3 and sizes[1:] != [28, 28]:
        raise _damaged(blame or path, f"its images are {sizes[1]}×{sizes[2]}, but the networks take 28×28")


def _damaged(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"{path} is damaged: {why}. Delete this file and, unless they are your own, the other three beside it; "
        "then run again."
    )
