"""Load data sets: IDX files, downloads, CIFAR-10, scikit-learn's digits, and folders of pictures.

An *image* is a tensor, a *picture* is a file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import socket
import struct
import sys
import tempfile
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data_utils import Dataset

if TYPE_CHECKING:  # imported by the functions that decode pictures
    from PIL import Image

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
    "CIFAR10": "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
    "Digits": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
}
ImageShape = tuple[int, int, int]  # channels (1: grey, 3: RGB), height, width
DEFAULT_SHAPE: ImageShape = (1, 28, 28)
PICTURE_SUFFIXES = set(
    ".avif .bmp .dib .gif .heic .heif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pcx .pgm .png .pnm .ppm "
    ".tga .tif .tiff .webp".split()
)
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")  # the first that exists is the test set
TEST_SHARE = 0.2  # of each class, if there is no folder with test pictures
SPLIT_SEED = 0
MAX_NAMED = 10  # damaged pictures that a message names
DECODED_AT_A_TIME = 256  # pictures that are in memory while they are decoded
DECODING_MARGIN = 2  # a JPEG is decoded at no less than this multiple of the size that it is resized to


class DatasetError(OSError):
    """The data set is missing, cannot be downloaded or is damaged; the message says what to do."""

    exit_status = 1


def load_dataset(name: str | Path, data_dir: str | Path, image_shape: ImageShape = DEFAULT_SHAPE) -> Dataset:
    """Load a data set; download, unpack or decode it first if that was not done before.

    Parameters
    ----------
    name : str or Path
        "MNIST", "FashionMNIST", "KMNIST", "CIFAR10" (from torchvision), "Digits" (from scikit-learn), or the path of a
        folder of pictures.
    data_dir : str or Path
        The files are stored in ``<data_dir>/<name>``, as torchvision stores them; images that were decoded or resized
        in ``<data_dir>/decoded``.
    image_shape : tuple of int
        Channels, height and width to which every image is resized.

    Returns
    -------
    Dataset

    Raises
    ------
    DatasetError
        If the files cannot be found or downloaded, or if one of them is damaged.
    """
    data_dir = Path(data_dir)
    if name not in CLASS_NAMES:
        return _load_pictures(find_pictures(name), data_dir, image_shape)
    name = str(name)
    if name != "CIFAR10" and image_shape == DEFAULT_SHAPE:
        return _load_idx_files(name, data_dir)
    return _load_resized(name, data_dir, image_shape)


def class_names_of(name: str | Path) -> list[str]:
    """Return the names of the classes of a data set, without decoding or downloading anything.

    Raises
    ------
    DatasetError
        If it is a folder without pictures of at least two classes.
    """
    return CLASS_NAMES[str(name)].split(", ") if name in CLASS_NAMES else find_pictures(name).class_names


def dataset_label(name: str | Path) -> str:
    """Return the name of a data set for messages; of a folder only the last part of its path."""
    return str(name) if name in CLASS_NAMES else resolve_path(name).resolve().name


def _load_idx_files(name: str, data_dir: Path) -> Dataset:
    """Return one of the data sets of grey images of 28 × 28 pixels that are stored as four IDX files."""
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
def cached_dataset(name: str, data_dir: str | Path, digest: str, image_shape: ImageShape = DEFAULT_SHAPE) -> Dataset:
    """Load a data set once per process.

    Raises
    ------
    DatasetError
        If the data set on this machine's disk is missing or has another digest.
    """
    is_folder = name not in CLASS_NAMES
    if is_folder and not resolve_path(name).is_dir():
        raise DatasetError(
            f"{resolve_path(name)} is not a folder on {socket.gethostname()}: each machine that trains needs the same "
            "pictures at the same path."
        )
    dataset = load_dataset(name, data_dir, image_shape)
    if dataset.digest() != digest:
        where = f"{resolve_path(name)} on {socket.gethostname()}" if is_folder else f"{name} in {data_dir}"
        advice = " Each machine that trains needs the same pictures at the same path." if is_folder else ""
        raise DatasetError(
            f"{where} is not the data set that this run was started with. Run the same command again.{advice}"
        )
    return dataset


def _find_file(file: str, folder: Path) -> Path:
    """Return the path of a file as unpackers store it: with a dot, in capitals, or in a folder of its own name."""
    names = [file, file.replace("-idx", ".idx")]
    names += [name.upper() for name in names]
    stems = [name.removesuffix(".gz").removesuffix(".GZ") for name in names]
    paths = [folder / name for name in names]
    paths += [folder / stem / name for stem in (*stems, *names) for name in names]
    return next((path for path in paths if _is_file(path)), folder / file)


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


def _announce_download(name: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"Downloading {name} …", flush=True)


def _download(name: str, raw_dir: Path, missing: list[str]) -> dict[str, bytes]:
    """Let torchvision download into a temporary folder, so that no incomplete file is left behind."""
    _announce_download(name)
    data_dir = raw_dir.parents[1]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unfinished-") as folder:
            _download_with_torchvision(name, folder)
            return {file: (Path(folder) / name / "raw" / file).read_bytes() for file in missing}
    except (OSError, RuntimeError) as error:  # also if DATA_DIR is a file, or not writable
        reason = _download_problem(error)
    raise DatasetError(f"{name} is not in {raw_dir} and could not be downloaded ({reason}). {_download_advice(name)}")


def _download_problem(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError) or "timed out" in reason:
        return f"nothing was received for {DOWNLOAD_STALL_SECONDS} seconds"
    return reason


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


# --- Images of another shape: resized once, and kept in a file ---


def _load_resized(name: str, data_dir: Path, image_shape: ImageShape) -> Dataset:
    """Return a data set by name with its images resized to a shape, which is done again only after its files change."""
    folder, stem = data_dir / "decoded", f"{name}-{_shape_name(image_shape)}"
    if name == "CIFAR10":  # torchvision refuses files of another content
        path = folder / f"{stem}.npy"
        return _read_decoded(path) or _write_resized(name, _load_cifar10(data_dir), path, path.name, image_shape)
    native = _load_idx_files(name, data_dir)
    prefix = f"{stem}-idx-"  # not that of a folder of pictures with the same name
    path = folder / f"{prefix}{native.digest()[:16]}.npy"
    return _read_decoded(path) or _write_resized(name, native, path, prefix, image_shape)


def _write_resized(name: str, native: Dataset, path: Path, prefix: str, image_shape: ImageShape) -> Dataset:
    """Write the images of a data set, resized to a shape, into a file; return the data set that it contains."""
    images = itertools.chain(native.train_images.numpy(), native.test_images.numpy())
    jobs = [partial(_resize, each, image_shape) for each in images]
    labels = torch.cat([native.train_labels, native.test_labels]).tolist()
    contents = _Contents(len(native.train_labels), labels, native.class_names, (), native.digest())
    return _write_decoded(path, prefix, jobs, contents, image_shape, f"resizing {name}")


def _resize(image: np.ndarray, image_shape: ImageShape) -> np.ndarray:
    from PIL import Image

    return _resize_and_pad(Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)), image_shape)


def _load_cifar10(data_dir: Path) -> Dataset:
    """Return CIFAR-10 as torchvision stores it: in colour, 32 × 32 pixels."""
    from torchvision.datasets import CIFAR10

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_SECONDS)
    try:
        try:
            parts = [CIFAR10(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # missing or damaged
            _announce_download("CIFAR10")
            parts = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"CIFAR10 is missing or damaged in {data_dir} and could not be downloaded ({_download_problem(error)}). "
            'Copy cifar-10-python.tar.gz there, or set DATASET = "Digits", which needs no download.'
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    labels = [torch.tensor(part.targets, dtype=torch.int64) for part in parts]
    return Dataset(images[0], labels[0], images[1], labels[1], CLASS_NAMES["CIFAR10"].split(", "))


@dataclass(frozen=True)
class _Contents:
    """What is stored beside the images of a decoded data set, of which the first `train` are for training."""

    train: int
    labels: list[int]
    class_names: list[str]
    notes: tuple[str, ...]
    source: str


def _read_decoded(path: Path) -> Dataset | None:
    """Map a file that `_write_decoded` wrote into memory; None if there is none, or if it is damaged.

    Its pages are shared by all processes that read it.
    """
    try:
        images = torch.from_numpy(np.load(path, mmap_mode="c"))
        with open(path, "rb") as file:
            end_of_images = path.stat().st_size - struct.unpack("<Q", _last_bytes(file, 8))[0] - 8
            file.seek(end_of_images)
            contents = _Contents(**json.loads(file.read()[:-8]))
        labels = torch.tensor(contents.labels, dtype=torch.int64)
        if len(labels) != len(images):
            return None
    except (OSError, ValueError, TypeError, EOFError, struct.error):
        return None
    train = contents.train
    names, notes = contents.class_names, tuple(contents.notes)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], names, notes, source=contents.source)


def _last_bytes(file: BinaryIO, number: int) -> bytes:
    file.seek(-number, os.SEEK_END)
    return file.read()


def _write_decoded(
    path: Path,
    prefix: str,
    jobs: Sequence[Callable[[], np.ndarray | DatasetError]],
    contents: _Contents,
    image_shape: ImageShape,
    title: str,
    complete: Callable[[_Contents, list[bytes]], _Contents] | None = None,
) -> Dataset:
    """Decode all images into one file, and return the data set that it contains.

    The file is an .npy array of the images, the other contents as JSON, and the length of this JSON. It is written in
    order, through a temporary file and a rename, by one process at a time: others wait, and then read it.

    Parameters
    ----------
    path : Path
    prefix : str
        Of the names of the files of older versions of this data set, which are deleted.
    jobs : sequence of callable
        Each returns an image, or why there is none.
    contents : _Contents
    image_shape : tuple of int
    title : str
        What the progress bar shows.
    complete : callable, optional
        Takes `contents` and a digest of each image, and returns what is stored.

    Raises
    ------
    DatasetError
        If pictures are damaged, or the file cannot be written.
    """
    from filelock import FileLock

    temporary = path.parent / ".unfinished"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            dataset = _read_decoded(path)
            if dataset is not None:  # another process was faster
                return dataset
            try:
                with open(temporary, "wb") as file:
                    shape = image_shape if image_shape[0] > 1 else image_shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(jobs), *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                    digests = _decode_into(file, jobs, title)
                    record = complete(contents, digests) if complete else contents
                    encoded = json.dumps(vars(record)).encode()
                    file.write(encoded + struct.pack("<Q", len(encoded)))
                    file.flush()
                    os.fsync(file.fileno())
                for older in path.parent.glob(f"{_escape_glob(prefix)}*"):
                    older.unlink()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            dataset = _read_decoded(path)
    except DatasetError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(
            f"{path.parent} cannot be written ({reason}). Free disk space, fix the permissions, or change DATA_DIR."
        ) from None
    if dataset is None:
        raise DatasetError(f"{path} cannot be read. Run the same command again.")
    return dataset


def _escape_glob(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _decode_into(file: BinaryIO, jobs: Sequence[Callable[[], np.ndarray | DatasetError]], title: str) -> list[bytes]:
    """Write the image of each job to a file, in order, with a progress bar in a terminal; return their digests."""
    from PIL import Image
    from tqdm import tqdm

    digests: list[bytes] = []
    problems: list[str] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_decoding_threads()) as threads,
        tqdm(total=len(jobs), desc=title, unit=" pictures", disable=not sys.stderr.isatty(), leave=False) as bar,
    ):
        # Above twice the limit of this warning, decode_picture raises an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # odd metadata, which nothing here reads
        for start in range(0, len(jobs), DECODED_AT_A_TIME):
            for outcome in threads.map(_call, jobs[start : start + DECODED_AT_A_TIME]):
                bar.update()
                if isinstance(outcome, DatasetError):
                    problems.append(str(outcome))
                elif not problems:
                    content = outcome.tobytes()
                    file.write(content)
                    digests.append(hashlib.blake2b(content, digest_size=16).digest())
    if problems:
        lines = problems[:MAX_NAMED]
        if len(problems) > MAX_NAMED:
            lines.append(f"and {len(problems) - MAX_NAMED:,} more")
        count = "1 picture" if len(problems) == 1 else f"{len(problems):,} pictures"
        raise DatasetError("\n".join([f"{count} cannot be read. Delete or replace:", *(f"  {line}" for line in lines)]))
    return digests


def _call(job: Callable[[], np.ndarray | DatasetError]) -> np.ndarray | DatasetError:
    return job()


def _decoding_threads() -> int:
    """Return how many pictures are decoded at the same time: one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def _shape_name(image_shape: ImageShape) -> str:
    return "x".join(map(str, image_shape))


# --- Folders of pictures ---


@dataclass(frozen=True)
class Pictures:
    """The pictures in a folder with one subfolder per class, not yet decoded.

    Attributes
    ----------
    folder : Path
    class_names : list of str
    train, test : list of tuple
        The path of each picture and the number of its class.
    test_folder : str
        The name of the folder with the test pictures; "" if they were chosen from all pictures.
    notes : tuple of str
        What the user should know, one sentence each.
    key : str
        A digest of the names, sizes and modification times of all pictures.
    """

    folder: Path
    class_names: list[str]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    test_folder: str
    notes: tuple[str, ...]
    key: str

    def describe(self, image_shape: ImageShape) -> str:
        """Return in one sentence how many pictures there are of which classes, and what is done with them."""
        counts = Counter(label for _, label in [*self.train, *self.test])
        names = {label: f"{name} {counts[label]:,}" for label, name in enumerate(self.class_names)}
        smallest = min(counts, key=lambda label: counts[label])
        largest = max(counts, key=lambda label: counts[label])
        if len(names) <= 5:
            classes = ", ".join(names.values())
        else:
            classes = f"the smallest is {names[smallest]}, the largest {names[largest]}"
        where = f" ({self.test_folder})" if self.test_folder else ""
        return (
            f"{len(self.train) + len(self.test):,} pictures in {len(names)} classes ({classes}), {len(self.test):,} of "
            f"them{where} kept for the test; each is brought to {' × '.join(map(str, image_shape))}."
        )


@dataclass
class _Found:
    """The pictures below one folder: by class, with their names in it; and the files that are not pictures."""

    classes: dict[str, list[tuple[str, Path, os.stat_result]]]
    ignored: list[Path]


def find_pictures(folder: str | Path) -> Pictures:
    """Return the pictures in a folder: one subfolder per class, or train/ and test/ with one subfolder per class each.

    Pictures are in the order of their names, then of their classes, whatever order the file system has. Without test/
    (or val/, valid/), a fifth of each class, chosen with a fixed seed, is the test set.

    Raises
    ------
    DatasetError
        If it is not a folder with pictures of at least two classes, with a few of each for training.
    """
    root = resolve_path(folder).resolve()
    subfolders = {path.name.lower(): path for path in _visible_folders(root)}
    notes = []
    train_dir = next((subfolders[name] for name in TRAIN_FOLDERS if name in subfolders), None)
    test_dirs = [subfolders[name] for name in TEST_FOLDERS if name in subfolders]
    if train_dir is not None and (test_dirs or len(subfolders) == 1) and _visible_folders(train_dir):
        used = [train_dir, *test_dirs[:1]]
        unused = [path.name for path in subfolders.values() if path not in used]
        if unused:
            notes.append(
                f"In {root}, only {' and '.join(each.name for each in used)} are used, not {', '.join(unused)}."
            )
        parts = [_scan(path) for path in used]
    else:
        test_dirs = []
        parts = [_scan(root)]

    notes += _describe_ignored([path for part in parts for path in part.ignored], root)
    class_names = sorted(parts[0].classes)
    _check_classes(class_names, parts, root, test_dirs)
    numbers = {name: number for number, name in enumerate(class_names)}
    lists = [_in_order(part, numbers) for part in parts]
    test = lists[1] if test_dirs else []
    train = lists[0]
    if not test_dirs:
        train, test = _split_off_test(train)
    _check_sizes(class_names, train, test, root)
    return Pictures(
        folder=root,
        class_names=class_names,
        train=[(path, label) for _, path, label, _ in train],
        test=[(path, label) for _, path, label, _ in test],
        test_folder=f"{test_dirs[0].name}/" if test_dirs else "",
        notes=tuple(notes),
        key=_digest_of_listing([*train, *test], len(train), class_names),
    )


_Picture = tuple[str, Path, int, os.stat_result]  # name within its class, path, number of its class


def _visible_folders(folder: Path) -> list[Path]:
    """Return the subfolders, without those that the system or a notebook creates."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not _is_hidden(entry.name) and _is_folder(entry)]
    except NotADirectoryError:
        raise DatasetError(f"{folder} is not a folder.") from None
    except DatasetError:
        raise
    except OSError as error:
        raise _unreadable(folder, error) from None
    return [folder / name for name in sorted(names)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a symbolic link to itself
        raise _unreadable(Path(entry.path), error) from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__", "@eaDir")


def _scan(folder: Path) -> _Found:
    """Return all pictures in the subfolders of a folder, at any depth."""
    found = _Found({}, [path for path in _files(folder)])
    for class_folder in _visible_folders(folder):
        pictures = found.classes.setdefault(folder_class_name(class_folder), [])
        for path in _walk(class_folder, set()):
            if _is_picture(path):
                try:
                    status = path.stat()
                except OSError as error:  # a symbolic link to nowhere
                    raise _unreadable(path, error) from None
                pictures.append((path.relative_to(class_folder).as_posix(), path, status))
            else:
                found.ignored.append(path)
    return found


def folder_class_name(folder: Path) -> str:
    """Return the name of the class whose pictures are in a folder: the folder's name, also if the path is relative."""
    name = os.path.basename(os.path.abspath(folder))
    return unicodedata.normalize("NFC", name).encode(errors="backslashreplace").decode()


def pictures_below(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders, at any depth, by name.

    Raises
    ------
    DatasetError
        If a folder cannot be read.
    """
    return sorted(path for path in _walk(folder, set()) if _is_picture(path))


def _is_picture(path: Path) -> bool:
    """Return whether a file is named like a picture; not if it is a pipe or the like, which would be waited for."""
    if path.suffix.lower() not in PICTURE_SUFFIXES or _is_hidden(path.name):
        return False
    return _is_file(path) or not os.path.exists(path)  # a link to nowhere cannot be read, and is not ignored


def _files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / name for name in sorted(entry.name for entry in entries if not _is_folder(entry))]
    except DatasetError:
        raise
    except OSError as error:
        raise _unreadable(folder, error) from None


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders; each folder once, also if symbolic links form a circle."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield from _files(folder)
    for subfolder in _visible_folders(folder):
        yield from _walk(subfolder, seen)


def _describe_ignored(ignored: list[Path], root: Path) -> list[str]:
    """Return sentences on the files that are not used; hidden files are counted but not named."""
    sentences = []
    pictures: list[Path] = []
    others: list[Path] = []
    for path in ignored:
        (pictures if _is_picture(path) else others).append(path)
    if pictures:
        count = "1 picture that is" if len(pictures) == 1 else f"{len(pictures):,} pictures that are"
        sentences.append(f"Ignored: {count} in no class's folder, for example {_printable_path(pictures[0], root)}.")
    if others:
        count = "1 file that is not a picture" if len(others) == 1 else f"{len(others):,} files that are not pictures"
        named = [path for path in others if not _is_hidden(path.name)]
        example = f", for example {_printable_path(named[0], root)}" if named else ""
        sentences.append(f"Ignored: {count}{example}.")
    return sentences


def _printable_path(path: Path, root: Path) -> str:
    """Return a path relative to a folder; bytes of it that are not UTF-8 are escaped."""
    return str(path.relative_to(root)).encode(errors="backslashreplace").decode()


def _check_classes(class_names: list[str], parts: list[_Found], root: Path, test_dirs: list[Path]) -> None:
    for part, where in zip(parts, ["", *(f" in {path.name}/" for path in test_dirs)], strict=False):
        empty = [name for name, pictures in part.classes.items() if not pictures]
        if empty:
            raise DatasetError(
                f"{root}: the folder {empty[0]}{where} contains no picture. Put pictures there, or delete the folder."
            )
    if len(class_names) < 2:
        found = f"pictures of one class only ({class_names[0]})" if class_names else "no subfolder with pictures"
        raise DatasetError(f"{root} contains {found}. Put the pictures of each class, at least two, into a subfolder.")
    for part in parts[1:]:
        unknown = sorted(set(part.classes) - set(class_names))
        if unknown:
            raise DatasetError(
                f"{root}: {test_dirs[0].name}/ contains the class {unknown[0]}, which has no pictures to train on. Add "
                "some, or delete the folder."
            )
        if not part.classes:
            _refuse_unsorted(part, root, test_dirs)
    reserved = [name for name in class_names if name == "accuracy" or name.endswith(" avg")]
    if reserved:
        raise DatasetError(f"{root}: a class cannot be called {reserved[0]}, as a metric is. Rename the folder.")


def _refuse_unsorted(test: _Found, root: Path, test_dirs: list[Path]) -> None:
    """Raise if the folder with the test pictures has pictures, but no folder of a class."""
    pictures = [path for path in test.ignored if _is_picture(path)]
    if pictures:
        count = "1 picture" if len(pictures) == 1 else f"{len(pictures):,} pictures"
        other = f"{test_dirs[1].name}/" if len(test_dirs) > 1 else "a fifth of all pictures"
        raise DatasetError(
            f"{test_dirs[0]} has {count} in no class's folder. Put each picture into a folder of its class, or move "
            f"this folder out of {root}: {other} is then the test set."
        )


def _check_sizes(class_names: list[str], train: list[_Picture], test: list[_Picture], root: Path) -> None:
    counts = Counter(label for _, _, label, _ in train)
    for label, name in enumerate(class_names):
        if counts[label] < 2:
            number = "only 1 picture" if counts[label] else "no picture"
            raise DatasetError(
                f"{root}: {name} has {number} to train on besides those for the test. Each class needs at least 2: add "
                "pictures, or delete the folder."
            )
    if not test:
        raise DatasetError(f"{root} contains no test pictures.")


def _in_order(found: _Found, numbers: dict[str, int]) -> list[_Picture]:
    pictures = [
        (name, path, numbers[each], status) for each, files in found.classes.items() for name, path, status in files
    ]
    return sorted(pictures, key=lambda picture: (_natural_key(picture[0]), picture[2]))


def _natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts 2.jpg before 10.jpg."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, name


def _split_off_test(pictures: list[_Picture]) -> tuple[list[_Picture], list[_Picture]]:
    """Return pictures to train on, and a fifth of each class, at least one, to test on; chosen with a fixed seed."""
    generator = np.random.RandomState(SPLIT_SEED)
    labels = np.array([label for _, _, label, _ in pictures], dtype=np.int64)
    chosen = set()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen |= set(generator.permutation(rows)[: max(1, round(TEST_SHARE * len(rows)))].tolist())
    train = [picture for row, picture in enumerate(pictures) if row not in chosen]
    return train, [pictures[row] for row in sorted(chosen)]


def _digest_of_listing(pictures: list[_Picture], train: int, class_names: list[str]) -> str:
    """Return a digest of the pictures' names, classes, sizes and times, and of how many of them are to train on."""
    sha = hashlib.sha256(f"{train} {class_names}".encode())
    for name, _, label, status in pictures:
        sha.update(f"{name!r} {label} {status.st_size} {status.st_mtime_ns}\n".encode(errors="backslashreplace"))
    return sha.hexdigest()[:16]


def _load_pictures(pictures: Pictures, data_dir: Path, image_shape: ImageShape) -> Dataset:
    """Return a folder of pictures as a data set; each picture is decoded once."""
    place = hashlib.sha256(os.fsencode(pictures.folder)).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", pictures.folder.name)[:60]
    stem = f"{name}-{_shape_name(image_shape)}-{place}-"
    path = data_dir / "decoded" / f"{stem}{pictures.key}.npy"
    dataset = _read_decoded(path)
    if dataset is None:
        everything = [*pictures.train, *pictures.test]
        file_digests: dict[Path, bytes] = {}
        jobs = [partial(_decode_or_explain, file, image_shape, file_digests) for file, _ in everything]
        labels = [label for _, label in everything]
        contents = _Contents(len(pictures.train), labels, pictures.class_names, (), "")
        title = f"decoding {pictures.folder.name}"
        complete = partial(_complete_contents, pictures, file_digests)
        dataset = _write_decoded(path, stem, jobs, contents, image_shape, title, complete)
    files = tuple(_printable_path(file, pictures.folder) for file, _ in [*pictures.train, *pictures.test])
    return dataset._replace(notes=(*pictures.notes, *dataset.notes), files=files)


def _decode_or_explain(
    path: Path, image_shape: ImageShape, file_digests: dict[Path, bytes]
) -> np.ndarray | DatasetError:
    """Return a picture as an image, or why there is none; note the digest of its file."""
    try:
        image = decode_picture(path, image_shape)
        with open(path, "rb") as file:
            file_digests[path] = hashlib.file_digest(file, "sha256").digest()
    except DatasetError as error:
        return error
    except OSError as error:
        return _unreadable(path, error)
    return image


def _complete_contents(
    pictures: Pictures, file_digests: dict[Path, bytes], contents: _Contents, image_digests: list[bytes]
) -> _Contents:
    """Add the notes on duplicates, and the digest of all files in their order."""
    sha = hashlib.sha256(f"{contents.train} {contents.labels}".encode())
    for path, _ in [*pictures.train, *pictures.test]:
        sha.update(file_digests[path])
    return replace(contents, notes=_describe_duplicates(pictures, image_digests), source=sha.hexdigest())


def _describe_duplicates(pictures: Pictures, digests: list[bytes]) -> tuple[str, ...]:
    """Return a sentence if the same picture is in training and test, and one if it is in two classes."""
    everything = [*pictures.train, *pictures.test]
    first_of: dict[bytes, int] = {}
    leaks, contradictions = [], []
    for row, digest in enumerate(digests):
        first = first_of.setdefault(digest, row)
        if first == row:
            continue
        pair = " = ".join(_printable_path(everything[each][0], pictures.folder) for each in (first, row))
        if everything[first][1] != everything[row][1]:
            contradictions.append(pair)
        if first < len(pictures.train) <= row:
            leaks.append(pair)
    notes = []
    if leaks:
        notes.append(
            f"{_start_of_sentence(leaks)} in training and in test, so the test is too easy: {_examples(leaks)}."
        )
    if contradictions:
        notes.append(f"{_start_of_sentence(contradictions)} in two classes: {_examples(contradictions)}.")
    return tuple(notes)


def _start_of_sentence(pairs: list[str]) -> str:
    """Return "The same picture is" or, for example, "3 pictures are the same"."""
    return "The same picture is" if len(pairs) == 1 else f"{len(pairs):,} pictures are the same"


def _examples(pairs: list[str]) -> str:
    """Return the first two pairs of equal pictures."""
    return ", ".join(pairs[:2])


def decode_picture(path: str | Path, image_shape: ImageShape) -> np.ndarray:
    """Return a picture file as an image of a shape: uint8, (height, width) if it is grey, else (3, height, width).

    The picture is rotated according to its EXIF orientation. Transparent pixels become black or, if the opaque ones are
    dark, white. Of an animation, the first frame is taken. See `_resize_and_pad` for other aspect ratios.

    Raises
    ------
    DatasetError
        If it is not a picture, or damaged.
    """
    from PIL import Image, ImageOps

    mode = "L" if image_shape[0] == 1 else "RGB"
    try:
        with Image.open(path) as opened:
            opened.draft(mode, _size_to_decode(opened.size, image_shape))  # a JPEG is decoded at a fraction of its size
            picture = ImageOps.exif_transpose(opened)
            return _resize_and_pad(picture, image_shape)
    except OSError as error:
        is_incomplete = "truncated" in str(error)  # Pillow has no class of its own for this
        reason = "it is incomplete" if is_incomplete else "it is not a picture, or of an unknown format"
        reason = error.strerror or reason
        if Path(path).suffix.lower() in (".heic", ".heif"):
            reason = "Pillow does not read HEIC; convert it to JPEG"
    except (ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError) as error:
        reason = str(error)  # Pillow's, for damaged files
    except (Image.DecompressionBombError, MemoryError, OverflowError) as error:
        reason = str(error) or "it is too large"
    raise DatasetError(f"{path} cannot be read: {reason}")


def _size_to_decode(size: tuple[int, int], image_shape: ImageShape) -> tuple[int, int]:
    """Return the size at which a JPEG is decoded: enough to be resized well, whether it is turned or not."""
    _, height, width = image_shape
    scales = [min(width / size[0], height / size[1]), min(height / size[0], width / size[1])]
    scale = min(1.0, DECODING_MARGIN * max(scales))
    return max(1, math.ceil(scale * size[0])), max(1, math.ceil(scale * size[1]))


def _resize_and_pad(picture: Image.Image, image_shape: ImageShape) -> np.ndarray:
    """Return a picture of any mode and size, resized without cropping and padded with the median of its border."""
    from PIL import Image

    channels, height, width = image_shape
    if picture.mode == "LAB":  # which Pillow converts to RGB only
        picture = picture.convert("RGB")
    picture = _without_transparency(_to_8_bits(picture)).convert("L" if channels == 1 else "RGB")
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))
    if size != (width, height):
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        image = np.empty((height, width, *pixels.shape[2:]), np.uint8)
        image[:] = np.median(border, axis=0)
        top, left = (height - size[1]) // 2, (width - size[0]) // 2
        image[top : top + size[1], left : left + size[0]] = pixels
        pixels = image
    return np.ascontiguousarray(pixels if channels == 1 else pixels.transpose(2, 0, 1))


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Return a picture with 16 or 32 bits per pixel, which Pillow would clip at 255, with 8 bits."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.nan_to_num(np.asarray(picture).astype(np.float32), copy=False)
    largest = 65535 if values.max() > 255 else 255
    if picture.mode.startswith("F") and values.max() <= 1:  # floating-point TIFFs from 0 to 1
        largest = 1
    values.clip(0, largest, out=values)
    values *= 255 / largest
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def _without_transparency(picture: Image.Image) -> Image.Image:
    """Return a picture on a background that what is visible differs from: black or, if that is dark, white."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture
    coloured = picture.convert("RGBA")
    grey, alpha = np.asarray(coloured.convert("L")), np.asarray(coloured.getchannel("A"))
    visible = grey[alpha > 127]
    background = 255 if visible.size and visible.mean() < 127.5 else 0
    canvas = Image.new("RGBA", coloured.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, coloured)
