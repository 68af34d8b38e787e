"""Data set on disk → tensors → normalised batches. Knows nothing of networks, results or logging."""

import contextlib
import gzip
import hashlib
import os
import socket
import struct
import tempfile
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
DOWNLOAD_STALL_SECONDS = 15  # a server that sends no byte for so long is given up
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILE_KINDS = {  # file name -> dimensions, as in http://yann.lecun.com/exdb/mnist (the IDX format)
    TRAIN_IMAGES: 3,
    TRAIN_LABELS: 1,
    TEST_IMAGES: 3,
    TEST_LABELS: 1,
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
    missing = [file for file, path in paths.items() if not _is_file(path)]

    contents: dict[str, bytes] = {}
    if missing:
        contents = _get_files(name, raw_dir, missing)
        with contextlib.suppress(OSError):  # they are only kept to spare the next process the work
            _save_files(contents, raw_dir)
    for file, path in paths.items():
        if file not in contents:
            contents[file] = _read(path)

    tensors = {file: _parse_idx(contents[file], FILE_KINDS[file], path) for file, path in paths.items()}
    _check_labels(tensors[TRAIN_LABELS], tensors[TRAIN_IMAGES], paths[TRAIN_LABELS])
    _check_labels(tensors[TEST_LABELS], tensors[TEST_IMAGES], paths[TEST_LABELS])
    return Dataset(
        train_images=tensors[TRAIN_IMAGES],
        train_labels=tensors[TRAIN_LABELS].long(),
        test_images=tensors[TEST_IMAGES],
        test_labels=tensors[TEST_LABELS].long(),
        class_names=CLASS_NAMES[name].split(", "),
    )


def path_of(path: str | Path) -> Path:
    """Return where a path in the settings is: relative ones start at this folder, ``~`` is the user's home.

    Raises
    ------
    OSError
        If the path begins with ``~`` and there is no such home.
    """
    try:
        return PROJECT_DIR / Path(path).expanduser()
    except RuntimeError:  # no HOME and no entry in /etc/passwd, as in some containers; or a user that is none
        raise OSError(f"{path}: there is no home directory for the ~. Write the path out.") from None


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


def split(dataset: Dataset, held_out_mask: bytes | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on, and those to evaluate on.

    Parameters
    ----------
    dataset : Dataset
    held_out_mask : bytes or None
        A byte a training image, 1 to evaluate on it, 0 to train on it: `tobytes` of a numpy array of bools. None: train
        on all of them and evaluate on the test images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if held_out_mask is None:
        return (images, labels), (dataset.test_images, dataset.test_labels)
    held_out = torch.from_numpy(np.frombuffer(held_out_mask, dtype=bool).copy())  # a tensor wants memory it may write
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the pixels of uint8 images, scaled to 0 … 1.

    Sums are of integers, so the result does not depend on their order or on the number of threads.
    """
    counts = torch.bincount(images.flatten(), minlength=256)
    values = torch.arange(256)
    total = (counts * values).sum().item()
    total_of_squares = (counts * values**2).sum().item()

    mean = total / images.numel()
    variance = total_of_squares / images.numel() - mean**2
    std = max(variance, 0.0) ** 0.5
    if std == 0:  # images of one single grey have no spread to divide by
        std = 255.0
    return mean / 255, std / 255


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
        self.images = self.images.to(self.device)
        self.labels = self.labels.to(self.device)
        self.batch_size = min(self.batch_size, len(self.labels))

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        least = 2 if self.training else 1
        return full + 1 if rest >= least else full

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.training else torch.arange(len(self.labels))
        indices = order.to(self.device).split(self.batch_size)
        for index in indices[: len(self)]:
            images = self.images[index].unsqueeze(1)
            if self.mirror:
                is_mirrored = torch.rand(len(index), 1, 1, 1).to(self.device) < 0.5
                images = torch.where(is_mirrored, images.flip(-1), images)
            yield images.float().sub_(255 * self.mean).div_(255 * self.std), self.labels[index]


def _lies_at(file: str, folder: Path) -> Path:
    """Return where a file lies: under its own name or, as some mirrors and unpackers have it, with a dot in it."""
    path = folder / file
    dotted = folder / file.replace("-idx", ".idx")
    if _is_file(dotted) and not _is_file(path):
        return dotted
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder that somebody else may not enter
        raise _unreadable(path, error) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"{path} cannot be read ({error.strerror}).")


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


def _check_labels(labels: Tensor, images: Tensor, path: Path) -> None:
    if len(labels) != len(images):
        raise _damaged(path, f"it holds {len(labels)} labels for {len(images)} images")
    if labels.max() > 9:
        raise _damaged(path, f"it holds the label {labels.max()}, but the last class is number 9")


def _damaged(path: Path, why: str) -> DatasetError:
    advice = "Delete this file and, unless they are your own, the other three beside it; then run again."
    return DatasetError(f"{path} is damaged: {why}. {advice}")


def _get_files(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Return the content of the missing files: from .gz files beside them, Debian's package, or by download."""
    if name == "Digits":
        return _make_digits()
    folders = [raw_dir]
    if name == "FashionMNIST" and len(missing) == len(FILE_KINDS):  # never to complete somebody's own files
        folders.append(DEBIAN_FASHION_MNIST)
    for folder in folders:
        packed = {file: _lies_at(f"{file}.gz", folder) for file in missing}
        if all(_is_file(path) for path in packed.values()):
            return {file: _unpack(path, FILE_KINDS[file]) for file, path in packed.items()}
    return _download(name, raw_dir, missing)


def _unpack(packed: Path, dimensions: int) -> bytes:
    try:
        content = gzip.decompress(_read(packed))
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
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").squeeze(1)
    images, labels = large.round().numpy(), digits.target
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    return {
        TRAIN_IMAGES: _to_idx(images[train]),
        TRAIN_LABELS: _to_idx(labels[train]),
        TEST_IMAGES: _to_idx(images[test]),
        TEST_LABELS: _to_idx(labels[test]),
    }


def _to_idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _download(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Let torchvision download into a folder of its own, so that nothing half-made is left."""
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"Downloading {name} …", flush=True)
    data_dir = raw_dir.parents[1]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unfinished-") as folder:
            _let_torchvision_download(name, folder)
            return {file: (Path(folder) / name / "raw" / file).read_bytes() for file in missing}
    except (OSError, RuntimeError) as error:  # also where DATA_DIR is a file, or cannot be written
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TimeoutError) or "timed out" in reason:
            reason = f"nothing arrived for {DOWNLOAD_STALL_SECONDS} seconds"
    raise DatasetError(f"{name} is not in {raw_dir} and could not be downloaded ({reason}). {_ways_out(name, raw_dir)}")


def _let_torchvision_download(name: str, folder: str) -> None:
    """Download, and give a silent server up: torchvision opens addresses without a timeout."""
    from torchvision import datasets  # takes as long to import as torch

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_SECONDS)
    try:
        getattr(datasets, name)(folder, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _ways_out(name: str, raw_dir: Path) -> str:
    """Return what somebody can do whose data set cannot be downloaded."""
    place = "there"
    for folder in (raw_dir.parent, raw_dir.parents[1]):
        if any(folder.glob("t*?idx?-ubyte*")):
            place = f"there from {folder}"  # they lie beside their place
            break
    debian = ""
    if name == "FashionMNIST":
        debian = ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu"
    files = ", ".join(FILE_KINDS)
    return (
        f"Copy its four files ({files}; .gz will do) {place}{debian}, "
        'or set DATASET = "Digits", which needs no download.'
    )
