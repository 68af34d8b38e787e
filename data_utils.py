"""Data set on disk → tensors → normalised batches. Knows nothing of networks, results or logging."""

import contextlib
import gzip
import hashlib
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PROJECT_DIR = Path(__file__).resolve().parent
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_STALL_SECONDS = 15  # a download that brings no byte for so long is given up; with imports, 30 s in all
FILE_KINDS = {  # file name -> dimensions, as in http://yann.lecun.com/exdb/mnist (the IDX format)
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}
CLASS_NAMES = {  # as torchvision has them
    "MNIST": "0 - zero, 1 - one, 2 - two, 3 - three, 4 - four, 5 - five, 6 - six, 7 - seven, 8 - eight, 9 - nine",
    "FashionMNIST": "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot",
    "KMNIST": "o, ki, su, tsu, na, ha, ma, ya, re, wo",
    "Digits": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
}


class DatasetError(OSError):
    """The data set is not there, cannot be had or is damaged; the message says what to do."""


class Dataset(NamedTuple):
    """A data set in memory: images uint8 (N, 28, 28), labels int64 (N,), a class name a label."""

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


def load_dataset(name: str, data_dir: str | Path) -> Dataset:
    """Load a data set into memory, getting it first where it is not on disk.

    Parameters
    ----------
    name : {"MNIST", "FashionMNIST", "KMNIST", "Digits"}
        "Digits" is made of what comes with scikit-learn; the others are torchvision's.
    data_dir : str or Path
        The files lie in ``<data_dir>/<name>/raw``, as torchvision lays them out.

    Returns
    -------
    Dataset
        Train and test images (uint8, N×28×28), labels (int64, N) and class names.

    Raises
    ------
    DatasetError
        If the files cannot be had, or one of them is damaged.
    """
    raw_dir = Path(data_dir) / name / "raw"
    paths = {file: _lies_at(file, raw_dir) for file in FILE_KINDS}
    missing = [file for file, path in paths.items() if not path.is_file()]
    got = _get_files(name, raw_dir, missing) if missing else {}
    with contextlib.suppress(OSError):  # they are only kept to spare the next process the work
        _save_files(got, raw_dir)
    images, labels, test_images, test_labels = (
        _parse_idx(got.get(file) or path.read_bytes(), FILE_KINDS[file], path) for file, path in paths.items()
    )
    for prefix, found, count in (("train", labels, len(images)), ("t10k", test_labels, len(test_images))):
        path = paths[f"{prefix}-labels-idx1-ubyte"]
        if len(found) != count:
            raise _damaged(path, f"it holds {len(found)} labels for {count} images")
        if found.max() > 9:
            raise _damaged(path, f"it holds the label {found.max()}, but the last class is number 9")
    return Dataset(images, labels.long(), test_images, test_labels.long(), CLASS_NAMES[name].split(", "))


def path_of(path: str | Path) -> Path:
    """Return where a path in the settings is: relative ones start at this folder, ``~`` is the user's home."""
    return PROJECT_DIR / Path(path).expanduser()


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


def split(dataset: Dataset, held_out: bytes | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on, and those to evaluate on.

    `held_out` says, as `numpy.packbits` has it, which training images to evaluate on; None: train on all of them and
    evaluate on the test images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if held_out is None:
        return (images, labels), (dataset.test_images, dataset.test_labels)
    held = torch.from_numpy(np.unpackbits(np.frombuffer(held_out, np.uint8), count=len(labels))).bool()
    return (images[~held], labels[~held]), (images[held], labels[held])


def pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the pixels of uint8 images, scaled to 0 … 1.

    Sums are of integers, so the result does not depend on their order or on the number of threads.
    """
    counts, values = torch.bincount(images.flatten(), minlength=256), torch.arange(256)
    total, squares = ((counts * values**power).sum().item() for power in (1, 2))
    mean = total / images.numel()
    std = max(squares / images.numel() - mean**2, 0.0) ** 0.5
    return mean / 255, (std or 255.0) / 255  # images of one single grey have no spread to divide by


@dataclass(eq=False)
class Batches:
    """Normalised float batches of images that stay uint8 in memory, made one at a time.

    Iterating yields (images, labels): float32 (B, 1, 28, 28) and int64 (B,).

    Attributes
    ----------
    images, labels : Tensor
        uint8 (N, 28, 28) and int64 (N,).
    batch_size : int
        Images in a batch; the last one may be smaller.
    mean, std : float
        Of the training images' pixels, scaled to 0 … 1.
    device : torch.device
        Where the batches shall be; the images go there at once, as bytes.
    training, mirror : bool
        Shuffle, and leave out a last batch of one image, on which batch norm cannot train; mirror each image left to
        right with probability ½. Both by torch's global generator.
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
        self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        self.batch_size = min(self.batch_size, len(self.labels))

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (rest > (1 if self.training else 0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = (torch.randperm if self.training else torch.arange)(len(self.labels))
        for index in order.to(self.labels.device).split(self.batch_size)[: len(self)]:
            images = self.images[index].unsqueeze(1)
            if self.mirror:
                images = torch.where(torch.rand(len(index), 1, 1, 1).to(images.device) < 0.5, images.flip(-1), images)
            yield images.float().sub_(255 * self.mean).div_(255 * self.std), self.labels[index]


def _lies_at(file: str, raw_dir: Path) -> Path:
    """Return where a file lies: under its own name or, as some mirrors and unpackers have it, with a dot in it."""
    dotted = raw_dir / file.replace("-idx", ".idx")
    return dotted if dotted.is_file() and not (raw_dir / file).is_file() else raw_dir / file


def _parse_idx(content: bytes, dimensions: int, path: Path) -> Tensor:
    """Return the unsigned bytes of an IDX file; raise unless it is whole and holds what this project takes."""
    header = content[: 4 + 4 * dimensions]
    if len(header) < 4 + 4 * dimensions:
        raise _damaged(path, f"it is only {len(header)} bytes long")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", header)
    if magic != 0x0800 + dimensions:
        raise _damaged(path, f"it begins with {header[:4].hex()} instead of {0x0800 + dimensions:08x}")
    expected = len(header) + int(np.prod(sizes, dtype=object))
    if len(content) != expected:
        raise _damaged(path, f"it is {len(content)} bytes long, but its header asks for {expected}")
    if sizes[0] == 0:
        raise _damaged(path, "it is empty")
    if dimensions == 3 and sizes[1:] != [28, 28]:
        raise _damaged(path, f"its images are {sizes[1]}×{sizes[2]}, but the networks take 28×28")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes).copy())


def _damaged(path: Path, why: str) -> DatasetError:
    advice = "Delete this file and, unless they are your own, the other three beside it; then run again."
    return DatasetError(f"{path} is damaged: {why}. {advice}")


def _get_files(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Return the content of the missing files: from .gz files beside them, Debian's package, or by download."""
    if name == "Digits":
        return _make_digits()
    debian = name == "FashionMNIST" and len(missing) == len(FILE_KINDS)  # never to complete somebody's own files
    for folder in [raw_dir, DEBIAN_FASHION_MNIST] if debian else [raw_dir]:
        packed = {file: _lies_at(f"{file}.gz", folder) for file in missing}
        if all(path.is_file() for path in packed.values()):
            return {file: _unpack(path, FILE_KINDS[file]) for file, path in packed.items()}
    return _download(name, raw_dir, missing)


def _unpack(packed: Path, dimensions: int) -> bytes:
    try:
        content = gzip.decompress(packed.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(packed, str(error)) from None
    _parse_idx(content, dimensions, packed)  # so that the packed file is named where its content is damaged
    return content


def _save_files(contents: dict[str, bytes], raw_dir: Path) -> None:
    for file, content in contents.items():
        raw_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw_dir, prefix=".unfinished-") as folder:
            (Path(folder) / file).write_bytes(content)
            os.replace(Path(folder) / file, raw_dir / file)  # whole or not at all


def _make_digits() -> dict[str, bytes]:
    """Return scikit-learn's 1,797 digits, 8×8 → 28×28, as IDX files; a stratified fifth is for testing."""
    from sklearn.datasets import load_digits  # slow to import, and needed only once
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").squeeze(1).round().numpy()
    parts = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    arrays = [array[part] for part in parts for array in (images, digits.target)]
    return {
        file: struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        for file, array in zip(FILE_KINDS, arrays, strict=True)
    }


def _download(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Let torchvision download, and give up where no byte arrives for a while: it opens URLs without a timeout."""
    from torchvision import datasets  # takes as long to import as torch

    reason: list[str] = []

    def download() -> None:
        try:
            getattr(datasets, name)(folder, download=True)
        except (OSError, RuntimeError) as error:
            reason.append(" ".join(str(error).split()) or type(error).__name__)

    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"Downloading {name} …", flush=True)
    data_dir = raw_dir.parents[1]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unfinished-", ignore_cleanup_errors=True) as folder:
            thread = threading.Thread(target=download, daemon=True)  # as a daemon it cannot keep us from ending
            thread.start()
            size, last_change = -1, time.monotonic()
            while thread.is_alive() and time.monotonic() - last_change < DOWNLOAD_STALL_SECONDS:
                thread.join(0.2)
                before, size = size, sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
                last_change = last_change if size == before else time.monotonic()
            reason += [f"nothing arrived for {DOWNLOAD_STALL_SECONDS} seconds"] if thread.is_alive() else []
            if not reason:
                return {file: (Path(folder) / name / "raw" / file).read_bytes() for file in missing}
    except OSError as error:  # DATA_DIR is a file, or cannot be written
        reason.append(str(error))
    debian = ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu" if name == "FashionMNIST" else ""
    astray = [f" from {folder}" for folder in (raw_dir.parent, data_dir) if any(folder.glob("t*?idx?-ubyte*"))]
    raise DatasetError(
        f"{name} is not in {raw_dir} and could not be downloaded ({reason[0]}). Copy its four files "
        f'({", ".join(FILE_KINDS)}; .gz will do) there{"".join(astray[:1])}{debian}, or set DATASET = "Digits", which '
        "needs no download."
    )
