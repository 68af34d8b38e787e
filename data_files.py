"""Where images come from: files on disk, packed files, Debian's package, downloads, scikit-learn's digits."""

import contextlib
import gzip
import os
import socket
import struct
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_utils import Dataset

PROJECT_DIR = Path(__file__).resolve().parent
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_STALL_SECONDS = 15  # a download that receives nothing for this long is aborted
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILE_DIMENSIONS = {  # of each file, in the IDX format (http://yann.lecun.com/exdb/mnist)
    TRAIN_IMAGES: 3,
    TRAIN_LABELS: 1,
    TEST_IMAGES: 3,
    TEST_LABELS: 1,
}
CLASS_NAMES = {  # as in torchvision
    "MNIST": "0 - zero, 1 - one, 2 - two, 3 - three, 4 - four, 5 - five, 6 - six, 7 - seven, 8 - eight, 9 - nine",
    "FashionMNIST": "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot",
    "KMNIST": "o, ki, su, tsu, na, ha, ma, ya, re, wo",
    "Digits": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
}


class DatasetError(OSError):
    """The data set is missing, cannot be downloaded or is damaged; the message says what to do."""

    exit_status = 1


def load_dataset(name: str, data_dir: str | Path) -> Dataset:
    """Load a data set into memory; download or unpack it first if it is not on disk.

    Parameters
    ----------
    name : {"MNIST", "FashionMNIST", "KMNIST", "Digits"}
        "Digits" comes with scikit-learn, the others with torchvision.
    data_dir : str or Path
        The files are stored in ``<data_dir>/<name>/raw``, as torchvision stores them.

    Returns
    -------
    Dataset

    Raises
    ------
    DatasetError
        If the files cannot be found or downloaded, or if one of them is damaged.
    """
    raw_dir = Path(data_dir) / name / "raw"
    paths = {file: _find_file(file, raw_dir) for file in FILE_DIMENSIONS}
    missing = [file for file, path in paths.items() if not _is_file(path)]

    contents: dict[str, bytes] = {}
    if missing:
        contents = _get_files(name, raw_dir, missing)
        with contextlib.suppress(OSError):  # saved only so that the next process need not do it again
            _save_files(contents, raw_dir)
    for file, path in paths.items():
        if file not in contents:
            contents[file] = _read(path)

    tensors = {file: _parse_idx(contents[file], FILE_DIMENSIONS[file], path) for file, path in paths.items()}
    _check_labels(tensors[TRAIN_LABELS], tensors[TRAIN_IMAGES], paths[TRAIN_LABELS])
    _check_labels(tensors[TEST_LABELS], tensors[TEST_IMAGES], paths[TEST_LABELS])
    return Dataset(
        train_images=tensors[TRAIN_IMAGES],
        train_labels=tensors[TRAIN_LABELS].long(),
        test_images=tensors[TEST_IMAGES],
        test_labels=tensors[TEST_LABELS].long(),
        class_names=CLASS_NAMES[name].split(", "),
    )


def resolve_path(path: str | Path) -> Path:
    """Return a path from the settings as an absolute one: relative to this folder, ``~`` expanded.

    Raises
    ------
    OSError
        If the path begins with ``~`` and there is no such home directory.
    """
    try:
        return PROJECT_DIR / Path(path).expanduser()
    except RuntimeError:  # an unknown user; or no HOME and no entry in /etc/passwd, as in some containers
        raise OSError(f"{path}: there is no home directory for ~. Use an absolute path.") from None


@lru_cache(maxsize=1)
def cached_dataset(name: str, data_dir: str | Path, digest: str) -> Dataset:
    """Load a data set once per process.

    Raises
    ------
    DatasetError
        If the data set on this machine's disk has another digest.
    """
    dataset = load_dataset(name, data_dir)
    if dataset.digest() != digest:
        raise DatasetError(
            f"{name} in {data_dir} is not the data set that this run was started with. Run the same command again."
        )
    return dataset


def _find_file(file: str, folder: Path) -> Path:
    """Return the path of a file: with its own name or, as some unpackers name it, with a dot in it."""
    path = folder / file
    dotted = folder / file.replace("-idx", ".idx")
    if _is_file(dotted) and not _is_file(path):
        return dotted
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder without permission to enter
        raise _unreadable(path, error) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"{path} cannot be read ({error.strerror}).")


def _parse_idx(content: bytes, dimensions: int, path: Path) -> Tensor:
    """Return the content of an IDX file of unsigned bytes; raise if it is damaged or has another format."""
    header = content[: 4 + 4 * dimensions]
    if len(header) < 4 + 4 * dimensions:
        raise _damaged(path, f"it is only {len(header)} bytes long")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", header)
    if magic != 0x0800 + dimensions:
        raise _damaged(path, f"it begins with {header[:4].hex()} instead of {0x0800 + dimensions:08x}")
    expected = len(header) + int(np.prod(sizes, dtype=object))
    if len(content) != expected:
        raise _damaged(path, f"it is {len(content)} bytes long, but by its header it should be {expected}")
    if sizes[0] == 0:
        raise _damaged(path, "it is empty")
    if dimensions == 3 and sizes[1:] != [28, 28]:
        raise _damaged(path, f"its images are {sizes[1]}×{sizes[2]}, but must be 28×28")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes).copy())


def _check_labels(labels: Tensor, images: Tensor, path: Path) -> None:
    if len(labels) != len(images):
        raise _damaged(path, f"it contains {len(labels)} labels for {len(images)} images")
    if labels.max() > 9:
        raise _damaged(path, f"it contains the label {labels.max()}, but the largest is 9")


def _damaged(path: Path, why: str) -> DatasetError:
    advice = (
        "Delete this file and, unless they are your own, the other three beside it; then run the same command again."
    )
    return DatasetError(f"{path} is damaged: {why}. {advice}")


def _get_files(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Return the content of the missing files: from .gz files beside them, Debian's package, or by download."""
    if name == "Digits":
        return _make_digits()
    folders = [raw_dir]
    if name == "FashionMNIST":
        folders.append(DEBIAN_FASHION_MNIST)
    for folder in folders:
        packed = {file: _find_file(f"{file}.gz", folder) for file in missing}
        if all(_is_file(path) for path in packed.values()):
            return {file: _unpack(path, FILE_DIMENSIONS[file]) for file, path in packed.items()}
    return _download(name, raw_dir, missing)


def _unpack(packed: Path, dimensions: int) -> bytes:
    try:
        content = gzip.decompress(_read(packed))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(packed, str(error)) from None
    _parse_idx(content, dimensions, packed)  # to name the packed file if its content is damaged
    return content


def _save_files(contents: dict[str, bytes], raw_dir: Path) -> None:
    for file, content in contents.items():
        raw_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw_dir, prefix=".unfinished-") as folder:
            (Path(folder) / file).write_bytes(content)
            os.replace(Path(folder) / file, raw_dir / file)


def _make_digits() -> dict[str, bytes]:
    """Return scikit-learn's 1,797 digits, enlarged from 8×8 to 28×28, as IDX files; a fifth is for testing."""
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
    """Let torchvision download into a temporary folder, so that no incomplete file is left behind."""
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"Downloading {name} …", flush=True)
    data_dir = raw_dir.parents[1]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unfinished-") as folder:
            _download_with_torchvision(name, folder)
            return {file: (Path(folder) / name / "raw" / file).read_bytes() for file in missing}
    except (OSError, RuntimeError) as error:  # also if DATA_DIR is a file, or not writable
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TimeoutError) or "timed out" in reason:
            reason = f"nothing was received for {DOWNLOAD_STALL_SECONDS} seconds"
    raise DatasetError(f"{name} is not in {raw_dir} and could not be downloaded ({reason}). {_download_advice(name)}")


def _download_with_torchvision(name: str, folder: str) -> None:
    """Download with a timeout, which torchvision does not set."""
    from torchvision import datasets  # takes as long to import as torch

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_SECONDS)
    try:
        getattr(datasets, name)(folder, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _download_advice(name: str) -> str:
    """Return what the user can do if a data set cannot be downloaded."""
    debian = ""
    if name == "FashionMNIST":
        debian = ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu"
    files = ", ".join(FILE_DIMENSIONS)
    return (
        f"Copy its four files ({files}; or their .gz files) there{debian}, "
        'or set DATASET = "Digits", which needs no download.'
    )
