"""Data sets: where they come from, what is refused as damaged, and how they become batches and parts."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, Configure, all_fits, finish, slow, start_python
from torchvision import datasets

import data_utils
import main_tutorial
from data_utils import (
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    Batches,
    Dataset,
    DatasetError,
    load_dataset,
    path_of,
    pixel_statistics,
    split,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes as an IDX file holds it."""
    return np.array([0x800 + array.ndim, *array.shape], dtype=">u4").tobytes() + array.astype(np.uint8).tobytes()


def idx_files(dataset: Dataset) -> dict[str, bytes]:
    return dict(zip(data_utils.FILE_KINDS, (idx(tensor.numpy()) for tensor in dataset[:4]), strict=True))


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
    monkeypatch.setattr(data_utils, "DEBIAN_FASHION_MNIST", tmp_path / "none")


def assert_same(first: Dataset, second: Dataset) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_digits_are_bytes_of_28_by_28_pixels_with_a_fixed_split(digits: Dataset, tmp_path: Path) -> None:
    assert digits.train_images.shape == (1437, 28, 28) and digits.test_images.shape == (360, 28, 28)
    assert digits.train_images.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    assert digits.train_images.min() == 0 and digits.train_images.max() > 240
    assert digits.class_names == list("0123456789")
    assert load_dataset("Digits", tmp_path).digest() == digits.digest()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_files_on_disk_are_loaded_as_they_are(tmp_path: Path, digits: Dataset, name: str) -> None:
    folder = tmp_path / name / "raw"
    folder.mkdir(parents=True)
    for file, content in idx_files(digits).items():
        (folder / file).write_bytes(content)
    loaded = load_dataset(name, tmp_path)
    assert_same(loaded, digits)
    assert len(loaded.class_names) == 10


def test_a_users_own_uneven_subset_is_accepted(raw: Path, digits: Dataset) -> None:
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
def test_files_named_with_a_dot_are_taken_as_they_lie(raw: Path, digits: Dataset, packed: bool) -> None:
    for name in data_utils.FILE_KINDS:
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        dotted = raw / (name.replace("-idx", ".idx") + ".gz" * packed)
        dotted.write_bytes(gzip.compress(content) if packed else content)
    given = {path.name: path.read_bytes() for path in raw.iterdir()}
    assert_same(load_dataset("FashionMNIST", raw.parents[1]), digits)
    assert given.items() <= {path.name: path.read_bytes() for path in raw.iterdir()}.items()


def test_where_both_lie_there_the_file_without_a_dot_is_taken(raw: Path, digits: Dataset) -> None:
    (raw / TRAIN_IMAGES.replace("-idx", ".idx")).write_text("something else")
    assert_same(load_dataset("FashionMNIST", raw.parents[1]), digits)


def test_a_damaged_file_named_with_a_dot_is_named_so(raw: Path) -> None:
    dotted = raw / TRAIN_IMAGES.replace("-idx", ".idx")
    (raw / TRAIN_IMAGES).rename(dotted)
    dotted.write_bytes(dotted.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=f"{dotted.name} is damaged.*Delete"):
        load_dataset("FashionMNIST", raw.parents[1])


@pytest.mark.parametrize("place", [".", "FashionMNIST"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_that_lie_beside_their_place_are_said_to(raw: Path, no_network: None, place: str, ending: str) -> None:
    data_dir = raw.parents[1]
    for name in data_utils.FILE_KINDS:
        (raw / name).rename(data_dir / place / (name + ending))
    with pytest.raises(DatasetError, match=f"Copy its four files .* there from {data_dir / place}, or"):
        load_dataset("FashionMNIST", data_dir)


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path, no_network: None) -> None:
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
    monkeypatch.setattr(data_utils, "DEBIAN_FASHION_MNIST", package)
    assert_same(load_dataset("FashionMNIST", tmp_path / "data"), digits)


def test_debians_package_does_not_complete_a_users_own_files(
    raw: Path, tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name, content in idx_files(digits).items():
        (package / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data_utils, "DEBIAN_FASHION_MNIST", package)
    (raw / TEST_LABELS).unlink()
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load_dataset("FashionMNIST", raw.parents[1])


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (TRAIN_IMAGES, lambda content: content[:-1], "it is 1126623 bytes long, but its header asks for 1126624"),
        (TRAIN_IMAGES, lambda content: content + b"x", "it is 1126625 bytes long, but its header asks for 1126624"),
        (TEST_IMAGES, lambda content: b"\x1f\x8b" + content[2:], "it begins with 1f8b0803 instead of 00000803"),
        (TEST_LABELS, lambda content: b"", "it is only 0 bytes long"),
        (TEST_IMAGES, lambda content: content[:10], "it is only 10 bytes long"),
        (TEST_LABELS, lambda content: content[:-1], "it is 367 bytes long, but its header asks for 368"),
        (
            TRAIN_IMAGES,
            lambda content: content[:4] + b"\xff" * 12,
            f"it is 16 bytes long, but its header asks for {16 + (2**32 - 1) ** 3}",
        ),
        (TEST_IMAGES, lambda content: idx(np.zeros(360)), "it begins with 00000801 instead of 00000803"),
        (TRAIN_LABELS, lambda content: idx(np.zeros(5)), "it holds 5 labels for 1437 images"),
        (TEST_LABELS, lambda content: idx(np.zeros(361)), "it holds 361 labels for 360 images"),
        (
            TRAIN_LABELS,
            lambda content: content[:-1] + b"\xff",
            "it holds the label 255, but the last class is number 9",
        ),
        (TEST_LABELS, lambda content: content[:-1] + b"\x0a", "it holds the label 10, but the last class is number 9"),
        (
            TEST_IMAGES,
            lambda content: idx(np.zeros((360, 20, 24))),
            "its images are 20×24, but the networks take 28×28",
        ),
        (TEST_IMAGES, lambda content: idx(np.zeros((0, 28, 28))), "it is empty"),
    ],
    ids=[
        "cut off",
        "too long",
        "still packed",
        "no byte",
        "header cut off",
        "labels cut off",
        "header asks for the impossible",
        "labels in the place of images",
        "too few labels",
        "too many labels",
        "label 255",
        "label 10",
        "20x24",
        "no image",
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_to_do(
    raw: Path, name: str, change: Callable[[bytes], bytes], why: str
) -> None:
    (raw / name).write_bytes(change((raw / name).read_bytes()))
    with pytest.raises(DatasetError) as error:
        load_dataset("FashionMNIST", raw.parents[1])
    advice = "Delete this file and, unless they are your own, the other three beside it; then run again."
    assert str(error.value) == f"{raw / name} is damaged: {why}. {advice}"


def test_a_packed_file_that_was_cut_off_is_named_and_leaves_nothing_half_made(raw: Path) -> None:
    packed = raw / f"{TRAIN_IMAGES}.gz"
    packed.write_bytes(gzip.compress((raw / TRAIN_IMAGES).read_bytes())[:-100])
    (raw / TRAIN_IMAGES).unlink()
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES}.gz is damaged.*Delete"):
        load_dataset("FashionMNIST", raw.parents[1])
    assert not (raw / TRAIN_IMAGES).exists()


@pytest.mark.parametrize(
    "change",
    [lambda packed: b"<html>503</html>", lambda packed: packed[:-8] + bytes(8), lambda packed: packed + b"rest"],
    ids=["not packed at all", "wrong checksum", "too long"],
)
def test_a_damaged_packed_file_is_named_with_what_gzip_says_and_what_to_do(
    raw: Path, change: Callable[[bytes], bytes]
) -> None:
    (raw / f"{TRAIN_IMAGES}.gz").write_bytes(change(gzip.compress((raw / TRAIN_IMAGES).read_bytes())))
    (raw / TRAIN_IMAGES).unlink()
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES}.gz is damaged: .*(gzip|CRC).*Delete"):
        load_dataset("FashionMNIST", raw.parents[1])


def test_a_packed_file_with_damaged_content_is_the_one_to_delete(raw: Path) -> None:
    (raw / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress((raw / TRAIN_IMAGES).read_bytes()[:-5]))
    (raw / TRAIN_IMAGES).unlink()
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES}.gz"):
        load_dataset("FashionMNIST", raw.parents[1])


@pytest.mark.parametrize(
    ("name", "debian"),
    [("FashionMNIST", ", or `apt-get install dataset-fashion-mnist` on Debian and Ubuntu"), ("MNIST", "")],
)
def test_without_data_and_network_the_message_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, name: str, debian: str
) -> None:
    monkeypatch.setattr(getattr(datasets, name), "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DatasetError) as error:
        load_dataset(name, tmp_path / "data")
    assert str(error.value).startswith(f"{name} is not in {tmp_path}/data/{name}/raw and could not be downloaded (")
    assert str(error.value).endswith(
        "). Copy its four files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte; .gz will do) there{debian}, "
        'or set DATASET = "Digits", which needs no download.'
    )
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError("slow"), "nothing arrived for 15 seconds"),
        (OSError("<urlopen error timed out>"), "nothing arrived for 15 seconds"),
        (RuntimeError("no file\n  of that name"), "no file of that name"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_why_a_download_failed_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, error: Exception, reason: str
) -> None:
    def fail(folder: str, download: bool) -> None:
        raise error

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    with pytest.raises(DatasetError, match=re.escape(f"could not be downloaded ({reason}). Copy")):
        load_dataset("FashionMNIST", tmp_path / "data")


def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(data_utils, "DOWNLOAD_STALL_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        with pytest.raises(DatasetError, match="nothing arrived for 1 seconds"):
            load_dataset("FashionMNIST", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_download_that_stops_half_way_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(data_utils, "DOWNLOAD_STALL_SECONDS", 1)
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
        with pytest.raises(DatasetError, match="nothing arrived for 1 seconds"):
            load_dataset("FashionMNIST", tmp_path / "data")
        given_up.set()
        server.shutdown()
    assert set(sent) == {f"/{TRAIN_IMAGES}.gz"}
    assert meanwhile and all(name.startswith(".unfinished-") for name in meanwhile)
    assert not list((tmp_path / "data").iterdir())


def test_after_a_download_sockets_wait_as_long_as_before(tmp_path: Path, no_network: None) -> None:
    socket.setdefaulttimeout(7)
    try:
        with pytest.raises(DatasetError):
            load_dataset("FashionMNIST", tmp_path / "data")
        assert socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(None)


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"^{tmp_path}/x*/FashionMNIST/raw/.* cannot be read .File name too long"):
        load_dataset("FashionMNIST", tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that can be found but not read")
def test_a_file_that_cannot_be_read_is_named_with_the_reason(raw: Path) -> None:
    (raw / TRAIN_IMAGES).unlink()
    (raw / TRAIN_IMAGES).symlink_to("/proc/self/mem")
    with pytest.raises(DatasetError, match=f"^{raw / TRAIN_IMAGES} cannot be read .Input/output error.\\.$"):
        load_dataset("FashionMNIST", raw.parents[1])


def test_a_home_that_is_not_there_is_needed_only_for_a_path_that_names_it() -> None:
    assert path_of("data") == data_utils.PROJECT_DIR / "data"
    with pytest.raises(OSError, match="^~no-such-user/data: there is no home directory"):
        path_of("~no-such-user/data")


@pytest.mark.slow
def test_four_processes_that_start_at_once_without_data_all_load_it(tmp_path: Path, digits: Dataset) -> None:
    code = f"import data_utils; print(data_utils.load_dataset('Digits', {str(tmp_path / 'data')!r}).digest())"
    processes = [start_python(tmp_path, "-c", code) for _ in range(4)]
    assert [finish(process)[0] for process in processes] == [digits.digest() + "\n"] * 4
    assert sorted(path.name for path in (tmp_path / "data" / "Digits" / "raw").iterdir()) == sorted(
        data_utils.FILE_KINDS
    )


def test_a_data_set_is_made_where_there_is_no_folder_for_temporary_files(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert load_dataset("Digits", tmp_path / "data").digest() == digits.digest()
    assert (tmp_path / "data" / "Digits" / "raw" / TEST_LABELS).exists()


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
def test_a_run_on_an_odd_little_data_set_gives_finite_results(kind: str, tmp_path: Path, configure: Configure) -> None:
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
def test_a_download_arrives_whole(
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
        assert sorted(path.name for path in (data_dir / name / "raw").iterdir()) == sorted(data_utils.FILE_KINDS)
        assert capsys.readouterr().out == f"Downloading {name} …\n"


def test_a_download_is_made_though_nobody_reads_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        with pytest.raises(DatasetError, match="could not be downloaded"):
            load_dataset("FashionMNIST", tmp_path / "data")
        with contextlib.suppress(BrokenPipeError):
            nobody.close()


def test_a_download_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, file_server: str
) -> None:
    (tmp_path / "served" / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(b"other bytes"))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [file_server])
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load_dataset("FashionMNIST", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def make_batches(images: int, batch_size: int, training: bool) -> Batches:
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    return Batches(pixels, torch.arange(images), batch_size, 0.5, 0.25, CPU, training)


def test_training_batches_hold_every_image_once_in_another_order() -> None:
    labels = torch.cat([labels for _, labels in make_batches(100, 32, training=True)])
    assert torch.equal(labels.sort().values, torch.arange(100)) and not torch.equal(labels, torch.arange(100))


def test_evaluation_batches_hold_every_image_once_in_order() -> None:
    labels = torch.cat([labels for _, labels in make_batches(100, 32, training=False)])
    assert torch.equal(labels, torch.arange(100))


def test_a_batchs_labels_belong_to_its_images() -> None:
    images, labels = next(iter(make_batches(100, 32, training=True)))
    torch.testing.assert_close(images[:, 0, 5, 5], (labels / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [1, 2, 31, 32, 33, 34, 64, 65])
def test_the_length_is_the_number_of_batches(images: int, training: bool) -> None:
    batches = make_batches(images, 32, training)
    assert len(batches) == len(list(batches))


def test_images_stay_bytes_in_memory(digits: Dataset) -> None:
    batches = Batches(digits.train_images, digits.train_labels, 64, 0.5, 0.25, CPU, training=True)
    next(iter(batches))
    assert batches.images.dtype == torch.uint8


def test_making_batches_leaves_the_images_as_they_are(digits: Dataset) -> None:
    before = digits.test_images.clone()
    list(Batches(digits.test_images, digits.test_labels, 64, 0.5, 0.25, CPU))
    assert torch.equal(digits.test_images, before)


def test_mirroring_turns_half_of_the_images_left_to_right_anew_each_time() -> None:
    images = torch.arange(28 * 28).view(28, 28).repeat(2000, 1, 1).remainder(256).byte()
    batches = Batches(images, torch.arange(2000), 2000, 0.0, 1 / 255, CPU, training=True, mirror=True)
    mirrored = []
    for _ in range(2):
        pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        pixels = pixels[labels.argsort()].squeeze(1)
        is_mirrored = (pixels == images.flip(-1)).flatten(1).all(1)
        assert torch.equal(is_mirrored, (pixels != images).flatten(1).any(1))
        mirrored.append(is_mirrored)
    assert all(900 < each.sum() < 1100 for each in [*mirrored, mirrored[0] ^ mirrored[1]])


def test_without_mirroring_nothing_random_is_drawn_but_the_order() -> None:
    torch.manual_seed(0)
    list(make_batches(100, 32, training=True))
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randperm(100)
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize(("training", "sizes"), [(True, [32, 32]), (False, [32, 32, 1])])
def test_only_training_leaves_out_a_last_batch_of_one(training: bool, sizes: list[int]) -> None:
    assert [len(labels) for _, labels in make_batches(66, 32, training)] == [32, 32, 2]
    batches = make_batches(65, 32, training)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


def test_batches_are_normalised_floats_with_a_channel() -> None:
    images, labels = next(iter(make_batches(10, 4, training=False)))
    assert images.shape == (4, 1, 28, 28) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 0], (labels / 255 - 0.5) / 0.25)


def test_a_batch_size_above_the_images_gives_one_batch() -> None:
    assert [len(labels) for _, labels in make_batches(10, 10**30, training=True)] == [10]


def test_pixel_statistics_are_mean_and_standard_deviation(digits: Dataset) -> None:
    pixels = digits.train_images.numpy() / 255
    assert pixel_statistics(digits.train_images) == pytest.approx((pixels.mean(), pixels.std()))


def test_pixel_statistics_count_every_image_of_many() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5000, 28, 28), dtype=np.uint8))
    pixels = images.numpy() / 255
    assert pixel_statistics(images) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)


@pytest.mark.parametrize("grey", [0, 7, 255])
def test_images_of_one_grey_are_divided_by_one(grey: int) -> None:
    assert pixel_statistics(torch.full((3, 28, 28), grey, dtype=torch.uint8)) == (grey / 255, 1.0)


def test_what_is_held_out_is_evaluated_on_and_the_rest_is_trained_on(digits: Dataset) -> None:
    held = np.random.default_rng(0).random(len(digits.train_labels)) < 0.3
    (images, labels), (other_images, other_labels) = split(digits, held.tobytes())
    assert torch.equal(images, digits.train_images[~held]) and torch.equal(labels, digits.train_labels[~held])
    assert torch.equal(other_images, digits.train_images[held])
    assert torch.equal(other_labels, digits.train_labels[held])


def test_the_final_fit_trains_on_all_and_is_tested_on_the_test_images(digits: Dataset) -> None:
    (images, _), (test_images, _) = split(digits, None)
    assert images is digits.train_images and test_images is digits.test_images


def test_digits_are_kept_as_idx_files_and_read_from_there(tmp_path: Path, digits: Dataset) -> None:
    load_dataset("Digits", tmp_path)
    for name, content in idx_files(digits).items():
        assert (tmp_path / "Digits" / "raw" / name).read_bytes() == content


def test_digits_load_where_nothing_can_be_written(tmp_path: Path, digits: Dataset) -> None:
    (tmp_path / "file").write_text("no folder")
    assert_same(load_dataset("Digits", tmp_path / "file"), digits)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_the_class_names_are_torchvisions(name: str) -> None:
    assert data_utils.CLASS_NAMES[name].split(", ") == getattr(datasets, name).classes


def test_batches_are_made_on_the_device_that_trains() -> None:
    meta = torch.device("meta")  # which is on every machine, and computes nothing
    pixels = torch.zeros(10, 28, 28, dtype=torch.uint8)
    batches = Batches(pixels, torch.arange(10), 4, 0.5, 0.25, meta, training=True, mirror=True)
    assert {part.device for batch in batches for part in batch} == {meta}
    assert batches.images.device == batches.labels.device == meta
