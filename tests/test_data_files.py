"""Data sets on disk and from downloads: what is loaded, and what is refused as damaged."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, Configure, all_fits, finish, slow, start_python
from torchvision import datasets

import data_files
import main_tutorial
from data_files import (
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    DatasetError,
    load_dataset,
    resolve_path,
)
from data_utils import Dataset


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes as an IDX file holds it."""
    return np.array([0x800 + array.ndim, *array.shape], dtype=">u4").tobytes() + array.astype(np.uint8).tobytes()


def idx_files(dataset: Dataset) -> dict[str, bytes]:
    return dict(zip(data_files.FILE_DIMENSIONS, (idx(tensor.numpy()) for tensor in dataset[:4]), strict=True))


@pytest.fixture
def raw(tmp_path: Path, digits: Dataset) -> Path:
    """Return the folder of a whole FashionMNIST that is really the digits."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in idx_files(digits).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(data_files, "DEBIAN_FASHION_MNIST", tmp_path / "none")


def assert_same(first: Dataset, second: Dataset) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_digits_are_bytes_of_28_by_28_pixels_with_a_fixed_split(digits: Dataset, tmp_path: Path) -> None:
    assert digits.train_images.shape == (1437, 28, 28) and digits.test_images.shape == (360, 28, 28)
    assert digits.train_images.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    assert digits.train_images.min() == 0 and digits.train_images.max() > 240
    assert digits.class_names == list("0123456789")
    assert load_dataset("Digits", tmp_path).digest() == digits.digest()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_files_on_disk_are_loaded_unchanged(tmp_path: Path, digits: Dataset, name: str) -> None:
    folder = tmp_path / name / "raw"
    folder.mkdir(parents=True)
    for file, content in idx_files(digits).items():
        (folder / file).write_bytes(content)
    loaded = load_dataset(name, tmp_path)
    assert_same(loaded, digits)
    assert len(loaded.class_names) == 10


def test_users_own_uneven_subset_is_accepted(raw: Path, digits: Dataset) -> None:
    keep = (digits.train_labels < 3) | (torch.arange(len(digits.train_labels)) % 7 == 0)
    (raw / TRAIN_IMAGES).write_bytes(idx(digits.train_images[keep].numpy()))
    (raw / TRAIN_LABELS).write_bytes(idx(digits.train_labels[keep].numpy()))
    assert len(load_dataset("FashionMNIST", raw.parents[1]).train_labels) == int(keep.sum())


def test_packed_files_beside_the_unpacked_ones_are_unpacked(raw: Path, digits: Dataset) -> None:
    for name in (TRAIN_IMAGES, TEST_LABELS):
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    assert_same(load_dataset("FashionMNIST", raw.parents[1]), digits)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("capitals", [False, True])
def test_files_named_with_a_dot_or_in_capitals_are_loaded(
    raw: Path, digits: Dataset, packed: bool, capitals: bool
) -> None:
    for name in data_files.FILE_DIMENSIONS:
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        file = name.replace("-idx", ".idx") + ".gz" * packed
        (raw / (file.upper() if capitals else file)).write_bytes(gzip.compress(content) if packed else content)
    given = {path.name: path.read_bytes() for path in raw.iterdir()}
    assert_same(load_dataset("FashionMNIST", raw.parents[1]), digits)
    assert given.items() <= {path.name: path.read_bytes() for path in raw.iterdir()}.items()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_files_each_in_a_folder_of_its_own_name_are_loaded(
    raw: Path, digits: Dataset, packed: bool, dotted: bool
) -> None:
    for name in data_files.FILE_DIMENSIONS:
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        file = name.replace("-idx", ".idx") if dotted else name
        (raw / file).mkdir()
        (raw / file / (file + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    assert_same(load_dataset("FashionMNIST", raw.parents[1]), digits)


def test_damaged_file_named_with_a_dot_is_named_in_the_message(raw: Path) -> None:
    dotted = raw / TRAIN_IMAGES.replace("-idx", ".idx")
    (raw / TRAIN_IMAGES).rename(dotted)
    dotted.write_bytes(dotted.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=f"{dotted.name} is damaged.*Delete"):
        load_dataset("FashionMNIST", raw.parents[1])


def test_data_folder_that_is_a_file_is_named(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(DatasetError, match=f"could not be downloaded .*{tmp_path / 'data'}"):
        load_dataset("FashionMNIST", tmp_path / "data")


def test_debians_package_fills_an_empty_folder(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name, content in idx_files(digits).items():
        (package / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data_files, "DEBIAN_FASHION_MNIST", package)
    assert_same(load_dataset("FashionMNIST", tmp_path / "data"), digits)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (
            TRAIN_IMAGES,
            lambda content: content[:-1],
            "it is 1126623 bytes long, but by its header it should be 1126624",
        ),
        (TEST_LABELS, lambda content: content + b"x", "it is 369 bytes long, but by its header it should be 368"),
        (TEST_IMAGES, lambda content: content[:4] + b"\xff" * 12, f"it should be {16 + (2**32 - 1) ** 3}"),
        (TEST_IMAGES, lambda content: content[:10], "it is only 10 bytes long"),
        (TEST_LABELS, lambda content: b"", "it is only 0 bytes long"),
        (TEST_IMAGES, lambda content: b"\x1f\x8b" + content[2:], "it begins with 1f8b0803 instead of 00000803"),
        (TEST_IMAGES, lambda content: idx(np.zeros(360)), "it begins with 00000801 instead of 00000803"),
        (TEST_IMAGES, lambda content: idx(np.zeros((360, 20, 24))), "its images are 20×24, but must be 28×28"),
        (TEST_IMAGES, lambda content: idx(np.zeros((0, 28, 28))), "it is empty"),
        (TRAIN_LABELS, lambda content: idx(np.zeros(5)), "it contains 5 labels for 1437 images"),
        (TEST_LABELS, lambda content: idx(np.zeros(361)), "it contains 361 labels for 360 images"),
        (TRAIN_LABELS, lambda content: content[:-1] + b"\x0a", "it contains the label 10, but the largest is 9"),
    ],
)
def test_damaged_file_is_named_with_the_reason_and_what_to_do(
    raw: Path, name: str, change: Callable[[bytes], bytes], why: str
) -> None:
    (raw / name).write_bytes(change((raw / name).read_bytes()))
    with pytest.raises(DatasetError) as error:
        load_dataset("FashionMNIST", raw.parents[1])
    message = str(error.value)
    assert message.startswith(f"{raw / name} is damaged: ") and why in message
    assert "Delete this file and, unless they are your own, the other three beside it" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: b"<html>503</html>",
        lambda packed: packed[:-100],
        lambda packed: packed[:-8] + bytes(8),  # another checksum
        lambda packed: packed + b"rest",
        lambda packed: gzip.compress(gzip.decompress(packed)[:-5]),
    ],
)
def test_damaged_packed_file_is_named_and_leaves_no_incomplete_file(
    raw: Path, change: Callable[[bytes], bytes]
) -> None:
    (raw / f"{TRAIN_IMAGES}.gz").write_bytes(change(gzip.compress((raw / TRAIN_IMAGES).read_bytes())))
    (raw / TRAIN_IMAGES).unlink()
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES}.gz is damaged: .*Delete"):
        load_dataset("FashionMNIST", raw.parents[1])
    assert not (raw / TRAIN_IMAGES).exists()


@pytest.mark.parametrize(
    ("name", "debian"),
    [("FashionMNIST", ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu"), ("MNIST", "")],
)
def test_the_message_without_data_and_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, name: str, debian: str
) -> None:
    monkeypatch.setattr(getattr(datasets, name), "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DatasetError) as error:
        load_dataset(name, tmp_path / "data")
    assert str(error.value).startswith(f"{name} is not in {tmp_path}/data/{name}/raw and could not be downloaded (")
    assert str(error.value).endswith(
        "). Copy its four files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte; or their .gz files) there{debian}, "
        'or set DATASET = "Digits", which needs no download.'
    )
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError("slow"), "nothing was received for 15 seconds"),
        (OSError("<urlopen error timed out>"), "nothing was received for 15 seconds"),
        (RuntimeError("no file\n  of that name"), "no file of that name"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_failed_download_is_one_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, error: Exception, reason: str
) -> None:
    def fail(folder: str, download: bool) -> None:
        raise error

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    with pytest.raises(DatasetError, match=re.escape(f"could not be downloaded ({reason}). Copy")):
        load_dataset("FashionMNIST", tmp_path / "data")


def test_download_from_a_silent_server_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(data_files, "DOWNLOAD_STALL_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        with pytest.raises(DatasetError, match="nothing was received for 1 seconds"):
            load_dataset("FashionMNIST", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_download_that_stalls_leaves_no_incomplete_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(data_files, "DOWNLOAD_STALL_SECONDS", 1)
    given_up = threading.Event()
    sent: list[str] = []
    meanwhile: list[str] = []

    class SendsHalf(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "200000")
            self.end_headers()
            self.wfile.write(bytes(100000))
            sent.append(self.path)
            meanwhile.extend(path.name for path in (tmp_path / "data").iterdir())
            given_up.wait(30)

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SendsHalf) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        with pytest.raises(DatasetError, match="nothing was received for 1 seconds"):
            load_dataset("FashionMNIST", tmp_path / "data")
        given_up.set()
        server.shutdown()
    assert set(sent) == {f"/{TRAIN_IMAGES}.gz"}
    assert meanwhile and all(name.startswith(".unfinished-") for name in meanwhile)
    assert not list((tmp_path / "data").iterdir())


def test_download_restores_the_socket_timeout(tmp_path: Path, no_network: None) -> None:
    socket.setdefaulttimeout(7)
    try:
        with pytest.raises(DatasetError):
            load_dataset("FashionMNIST", tmp_path / "data")
        assert socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(None)


def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"^{tmp_path}/x*/FashionMNIST/raw/.* cannot be read .File name too long"):
        load_dataset("FashionMNIST", tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that can be found but not read")
def test_file_that_cannot_be_read_is_named_with_the_reason(raw: Path) -> None:
    (raw / TRAIN_IMAGES).unlink()
    (raw / TRAIN_IMAGES).symlink_to("/proc/self/mem")
    with pytest.raises(DatasetError, match=f"^{raw / TRAIN_IMAGES} cannot be read .Input/output error.\\.$"):
        load_dataset("FashionMNIST", raw.parents[1])


def test_only_a_path_with_a_tilde_needs_a_home_directory() -> None:
    assert resolve_path("data") == data_files.PROJECT_DIR / "data"
    with pytest.raises(OSError, match="^~no-such-user/data: there is no home directory"):
        resolve_path("~no-such-user/data")


@pytest.mark.slow
def test_four_processes_that_start_without_data_all_load_it(tmp_path: Path, digits: Dataset) -> None:
    code = f"import data_files; print(data_files.load_dataset('Digits', {str(tmp_path / 'data')!r}).digest())"
    processes = [start_python(tmp_path, "-c", code) for _ in range(4)]
    assert [finish(process)[0] for process in processes] == [digits.digest() + "\n"] * 4
    assert sorted(path.name for path in (tmp_path / "data" / "Digits" / "raw").iterdir()) == sorted(
        data_files.FILE_DIMENSIONS
    )


SMALL_SETS = {  # classes of the training images, of the test images
    "two classes": (np.arange(40) % 2, np.arange(10) % 2),
    "ten images": (np.arange(10) % 5, np.arange(10) % 5),
    "one class tested": (np.arange(40) % 4, np.full(10, 2)),
    "a class that only the test has": (np.arange(40) % 4, np.full(10, 7)),
    "one test image": (np.arange(40) % 4, np.array([1])),
    "one class in all": (np.full(40, 3), np.full(10, 3)),
    "black": (np.arange(40) % 4, np.arange(10) % 4),
}


@pytest.mark.parametrize("kind", ["two classes", *slow(*list(SMALL_SETS)[1:])])
def test_run_on_a_tiny_data_set_has_finite_results(kind: str, tmp_path: Path, configure: Configure) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for labels, images_file, labels_file in zip(
        SMALL_SETS[kind], (TRAIN_IMAGES, TEST_IMAGES), (TRAIN_LABELS, TEST_LABELS), strict=True
    ):
        images = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28))
        (raw / images_file).write_bytes(idx(images * (kind != "black")))
        (raw / labels_file).write_bytes(idx(labels))
    result = configure(main_tutorial, DATASET="MNIST", DATA_DIR=tmp_path / "data", EPOCHS=1).main()
    assert len(result.folds) == 2
    for fit in all_fits(result):
        assert np.isfinite(fit.loss) and 0 <= fit.accuracy <= 1


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_download_is_loaded(
    tmp_path: Path,
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_network: None,
    file_server: str,
    name: str,
) -> None:
    resources = []
    for file, content in idx_files(digits).items():
        packed = gzip.compress(content)
        (tmp_path / "served" / f"{file}.gz").write_bytes(packed)
        resources.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(getattr(datasets, name), "mirrors", [file_server])
    monkeypatch.setattr(getattr(datasets, name), "resources", resources)
    for data_dir in (tmp_path / "new" / "data", tmp_path):
        assert_same(load_dataset(name, data_dir), digits)
        assert sorted(path.name for path in (data_dir / name / "raw").iterdir()) == sorted(data_files.FILE_DIMENSIONS)
        assert capsys.readouterr().out == f"Downloading {name} …\n"


def test_download_works_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        with pytest.raises(DatasetError, match="could not be downloaded"):
            load_dataset("FashionMNIST", tmp_path / "data")
        with contextlib.suppress(BrokenPipeError):
            nobody.close()


def test_download_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, file_server: str
) -> None:
    (tmp_path / "served" / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(b"other bytes"))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [file_server])
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load_dataset("FashionMNIST", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_digits_are_stored_as_idx_files_and_read_from_there(tmp_path: Path, digits: Dataset) -> None:
    load_dataset("Digits", tmp_path)
    for name, content in idx_files(digits).items():
        assert (tmp_path / "Digits" / "raw" / name).read_bytes() == content


def test_digits_load_from_a_read_only_folder(tmp_path: Path, digits: Dataset) -> None:
    (tmp_path / "file").write_text("no folder")
    assert_same(load_dataset("Digits", tmp_path / "file"), digits)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_the_class_names_are_torchvisions(name: str) -> None:
    assert data_files.CLASS_NAMES[name].split(", ") == getattr(datasets, name).classes
