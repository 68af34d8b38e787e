"""Folders of pictures: which pictures are found, how they are decoded, what is refused, and runs on them."""

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    DATA_DIR,
    REPOSITORY,
    Configure,
    Start,
    checkpoints,
    computed,
    finish,
    saved_epochs,
    start_python,
    wait_for,
)
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import CIFAR10

import data_files
import main_cnn
import main_tutorial
from classify import load_network, read_picture
from comparison.run_reader import read_run
from data_files import DatasetError, cached_dataset, decode_picture, find_pictures, load_dataset, pictures_below
from data_utils import Dataset, light_background_share
from experiment.errors import ConfigurationError
from experiment.model_check import check_model
from models import NeuralNetwork

COLOUR = (3, 64, 64)
GREY = (1, 28, 28)
PHOTOGRAPHS = dict(zip(("china", "flower"), load_sample_images().images, strict=True))


def photograph() -> Image.Image:
    return Image.fromarray(PHOTOGRAPHS["china"])


def write_tiles(folder: Path, **numbers: int) -> Path:
    """Write tiles of the two photographs as JPEG files, one subfolder per class; a class is a part of a photograph."""
    generator = np.random.default_rng(0)
    for number, (name, count) in enumerate(numbers.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = PHOTOGRAPHS["china" if number % 2 == 0 else "flower"]
        for index in range(count):
            top, left = generator.integers(0, 360), generator.integers(0, 560)
            Image.fromarray(pixels[top : top + 60, left : left + 80]).save(folder / name / f"{index}.jpg")
    return folder


def write_digits(folder: Path, dataset: Dataset) -> Path:
    """Write a data set as PNG files in train/ and test/, named by the place of each image in the data set."""
    parts = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    for part, (images, labels) in parts.items():
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / part / str(label) / f"{index}.png", compress_level=1)
    return folder


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "tiles", cat=10, dog=15)


def load(folder: Path, shape: tuple[int, int, int] = GREY) -> Dataset:
    return load_dataset(folder, folder.parent / "data", shape)


# --- How a picture is decoded ---


def rotated(picture: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)


def two_frames(picture: Image.Image, path: Path) -> None:
    other = Image.new("RGB", picture.size).quantize(256)
    picture.quantize(256).save(path, save_all=True, append_images=[other])


SAVE: dict[str, Callable[[Image.Image, Path], None]] = {
    "plain.JPG": lambda picture, path: picture.save(path, "jpeg", quality=95),
    "progressive.jpg": lambda picture, path: picture.save(path, progressive=True, quality=95),
    "cmyk.jpg": lambda picture, path: picture.convert("CMYK").save(path, quality=95),
    "rotated.jpg": rotated,
    "palette.png": lambda picture, path: picture.quantize(256).save(path),
    "opaque.png": lambda picture, path: picture.convert("RGBA").save(path),
    "lossy.webp": lambda picture, path: picture.save(path, quality=95),
    "plain.bmp": lambda picture, path: picture.save(path),
    "plain.tiff": lambda picture, path: picture.save(path),
    "animated.gif": two_frames,
}


@pytest.mark.parametrize("name", SAVE)
def test_a_picture_of_any_format_is_the_same_image(name: str, tmp_path: Path) -> None:
    photograph().save(tmp_path / "reference.png")
    SAVE[name](photograph(), tmp_path / name)
    reference, image = (decode_picture(tmp_path / each, COLOUR).astype(int) for each in ("reference.png", name))
    assert image.shape == COLOUR and np.abs(image - reference).mean() < 2


@pytest.mark.parametrize("name", ["16bits.png", "float.tiff", "alpha.png"])
def test_a_grey_picture_of_any_depth_is_the_same_image(name: str, tmp_path: Path) -> None:
    grey = photograph().convert("L")
    pixels = np.asarray(grey)
    grey.save(tmp_path / "reference.png")
    alternatives = {
        "16bits.png": Image.fromarray(pixels.astype(np.uint16) * 257),
        "float.tiff": Image.fromarray((pixels / 255).astype(np.float32)),
        "alpha.png": grey.convert("LA"),
    }
    alternatives[name].save(tmp_path / name)
    reference, image = (decode_picture(tmp_path / each, (1, 48, 64)).astype(int) for each in ("reference.png", name))
    assert image.shape == (48, 64) and np.abs(image - reference).max() <= 2


@pytest.mark.parametrize(("ink", "background"), [(0, 255), (255, 0)])
def test_transparent_pixels_differ_from_what_is_visible(ink: int, background: int, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (28, 28), (ink, ink, ink, 0))
    picture.paste((ink, ink, ink, 255), (8, 8, 20, 20))
    picture.save(tmp_path / "drawing.png")
    image = decode_picture(tmp_path / "drawing.png", GREY)
    assert image[0, 0] == background and image[14, 14] == ink


@pytest.mark.parametrize(("size", "shape"), [((90, 30), (3, 30, 30)), ((30, 90), (3, 30, 30)), ((30, 30), (3, 30, 90))])
def test_what_does_not_fit_is_padded_with_the_colour_of_the_border(
    size: tuple[int, int], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    picture = Image.new("RGB", size, (200, 100, 50))
    picture.paste((0, 0, 255), (size[0] // 3, size[1] // 3, 2 * size[0] // 3, 2 * size[1] // 3))
    picture.save(tmp_path / "wide.png")
    image = decode_picture(tmp_path / "wide.png", shape)
    assert image.shape == shape
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == np.array([[200], [100], [50]])).all()
    assert image[2, shape[1] // 2, shape[2] // 2] == 255


def test_classify_decodes_a_picture_as_a_folder_does(tiles: Path) -> None:
    dataset = load(tiles, COLOUR)
    first, _ = find_pictures(tiles).train[0]
    assert torch.equal(read_picture(first, COLOUR), dataset.train_images[0])


@pytest.mark.slow
def test_decoding_48_megapixels_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    photograph().resize((8000, 6000)).convert("RGBA").save(tmp_path / "large.png", compress_level=1)
    code = (
        "import resource, data_files; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"data_files.decode_picture({str(tmp_path / 'large.png')!r}, (3, 64, 64)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**20  # kilobytes


# --- Which pictures are found ---


def test_a_folder_becomes_a_data_set_with_a_fifth_of_each_class_for_the_test(tiles: Path) -> None:
    dataset = load(tiles, COLOUR)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.train_labels.bincount().tolist() == [8, 12] and dataset.test_labels.bincount().tolist() == [2, 3]
    assert dataset.train_images.shape == (20, *COLOUR) and dataset.train_images.dtype == torch.uint8
    assert load(tiles).train_images.shape == (20, 28, 28)


def test_the_start_line_names_classes_and_test_pictures(tiles: Path) -> None:
    assert find_pictures(tiles).describe((1, 28, 28)) == (
        "25 pictures in 2 classes (cat 10, dog 15), 5 of them kept for the test; each is brought to 1 × 28 × 28."
    )


def test_of_many_classes_the_smallest_and_the_largest_are_named(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "many", a=5, b=9, c=5, d=5, e=5, f=4)
    assert "33 pictures in 6 classes (the smallest is f 4, the largest b 9)" in find_pictures(folder).describe(COLOUR)


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "val"), ("training", "Valid")])
def test_a_folder_with_test_pictures_of_its_own(train: str, test: str, tmp_path: Path) -> None:
    write_tiles(tmp_path / "split" / train, cat=4, dog=5)
    write_tiles(tmp_path / "split" / test, cat=2, dog=3)
    pictures = find_pictures(tmp_path / "split")
    assert (len(pictures.train), len(pictures.test)) == (9, 5)
    assert f"5 of them ({test}/) kept for the test" in pictures.describe(COLOUR)


def test_files_that_are_no_pictures_are_counted_and_ignored(tiles: Path) -> None:
    expected = load(tiles).digest()
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._0.jpg"):
        (tiles / "cat" / name).write_text("no picture")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tiles / name).mkdir()
        (tiles / name / "0.jpg").write_text("no picture")
    dataset = load(tiles)
    assert dataset.digest() == expected
    assert dataset.notes == ("Ignored: 4 files that are not pictures, for example cat/Thumbs.db.",)


def test_pictures_beside_the_class_folders_are_counted_as_pictures(tiles: Path) -> None:
    shutil.copy(next((tiles / "cat").iterdir()), tiles / "extra.png")
    assert load(tiles).notes == ("Ignored: 1 picture that is in no class's folder, for example extra.png.",)


def test_nested_folders_links_and_names_of_any_language(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "names", **{"Äpfel": 4, "犬": 3})
    shutil.move(folder / "犬", tmp_path / "elsewhere")
    (folder / "犬" / "2026" / "May").mkdir(parents=True)
    shutil.move(folder / "Äpfel" / "0.jpg", folder / "犬" / "2026" / "May" / "7.jpg")
    (folder / "犬" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "犬" / "circle").symlink_to(folder / "犬")
    pictures = find_pictures(folder)
    assert pictures.class_names == ["Äpfel", "犬"]
    assert sorted(label for _, label in [*pictures.train, *pictures.test]) == [0, 0, 0, 1, 1, 1, 1]


def test_numbers_in_names_are_sorted_as_numbers(tmp_path: Path) -> None:
    names = ["10.jpg", "9.jpg", "a2.jpg", "a10.jpg", "100.jpg"]
    assert sorted(names, key=data_files._natural_key) == ["9.jpg", "10.jpg", "100.jpg", "a2.jpg", "a10.jpg"]


def test_a_name_that_begins_with_another_whole_name_is_sorted_after_it() -> None:
    assert sorted(["cat1.jpg2.png", "cat1.jpg"], key=data_files._natural_key) == ["cat1.jpg", "cat1.jpg2.png"]


# --- What is refused, or worth a line ---


def test_a_pipe_named_like_a_picture_is_ignored(tiles: Path) -> None:
    os.mkfifo(tiles / "cat" / "pipe.png")
    assert len(load(tiles).files) == 25
    assert len(pictures_below(tiles)) == 25


@pytest.mark.parametrize("shape", [GREY, (3, 28, 28)])
def test_a_picture_in_lab_colours_is_decoded(shape: tuple[int, int, int], tmp_path: Path) -> None:
    Image.new("LAB", (30, 30), (200, 128, 128)).save(tmp_path / "lab.tif")
    assert decode_picture(tmp_path / "lab.tif", shape).min() > 150


def test_images_of_another_shape_stay_when_a_data_set_is_resized(tmp_path: Path) -> None:
    key = load_dataset("Digits", tmp_path).digest()[:16]
    for shape in ((1, 10, 100), (1, 10, 10)):
        load_dataset("Digits", tmp_path, shape)
    assert sorted(path.name for path in (tmp_path / "decoded").glob("*.npy")) == [
        f"Digits-1x10x10-idx-{key}.npy",
        f"Digits-1x10x100-idx-{key}.npy",
    ]


def refusal(folder: Path) -> str:
    with pytest.raises(DatasetError) as error:
        load(folder)
    return str(error.value)


def test_all_damaged_pictures_are_named_up_to_ten(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "damaged", cat=13, dog=3)
    paths = sorted((folder / "cat").iterdir())
    for path in paths[:12]:
        path.write_bytes(path.read_bytes()[:400])
    message = refusal(folder)
    assert message.startswith("12 pictures cannot be read. Delete or replace:")
    assert message.count("cat/") == 10 and message.endswith("and 2 more")
    assert not list((tmp_path / "data").rglob("*.npy")) and not list((tmp_path / "data").rglob("*unfinished*"))


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20), b"\xff\xd8\xff\xe0" + bytes(50)]
)
def test_a_file_that_is_no_picture_but_named_like_one_is_named(content: bytes, tiles: Path) -> None:
    (tiles / "cat" / "bad.png").write_bytes(content)
    assert "1 picture cannot be read" in refusal(tiles) and "cat/bad.png cannot be read: " in refusal(tiles)


def test_a_link_to_nowhere_is_named(tiles: Path) -> None:
    (tiles / "cat" / "lost.jpg").symlink_to("nowhere.jpg")
    assert "cat/lost.jpg cannot be read (No such file or directory)" in refusal(tiles)


def test_a_link_to_itself_is_named(tiles: Path) -> None:
    (tiles / "circle").symlink_to(tiles / "circle")
    assert refusal(tiles) == f"{tiles}/circle cannot be read (Too many levels of symbolic links)."


def test_an_empty_class_is_refused(tiles: Path) -> None:
    (tiles / "owl").mkdir()
    assert "the folder owl contains no picture" in refusal(tiles)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    assert "contains pictures of one class only (cat)" in refusal(write_tiles(tmp_path / "one", cat=9))


def test_a_folder_without_subfolders_is_refused(tmp_path: Path) -> None:
    write_tiles(tmp_path, flat=3)
    assert "contains no subfolder with pictures" in refusal(tmp_path / "flat")


def test_a_class_with_too_few_pictures_is_refused(tmp_path: Path) -> None:
    assert "cat has only 1 picture to train on" in refusal(write_tiles(tmp_path / "few", cat=2, dog=9))


def test_a_class_only_in_the_test_folder_is_refused(tmp_path: Path) -> None:
    write_tiles(tmp_path / "split" / "train", cat=4, dog=5)
    write_tiles(tmp_path / "split" / "test", cat=2, owl=3)
    assert "test/ contains the class owl, which has no pictures to train on" in refusal(tmp_path / "split")


def test_test_pictures_in_no_classs_folder_are_counted_and_refused(tmp_path: Path) -> None:
    folder = tmp_path / "split"
    write_tiles(folder / "train", cat=4, dog=5)
    (folder / "test").mkdir()
    assert refusal(folder) == f"{folder} contains no test pictures."
    write_tiles(folder, test=3)
    assert refusal(folder) == (
        f"{folder}/test has 3 pictures in no class's folder. Put each picture into a folder of its class, or move this "
        f"folder out of {folder}: a fifth of all pictures is then the test set."
    )
    (folder / "valid").mkdir()
    assert refusal(folder).endswith(": valid/ is then the test set.")


def test_a_class_called_like_a_metric_is_refused(tmp_path: Path) -> None:
    assert "a class cannot be called accuracy" in refusal(write_tiles(tmp_path / "names", accuracy=4, dog=5))


def test_a_folder_that_cannot_be_entered_is_one_line(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(tiles) == f"{tiles} cannot be read (Permission denied)."


def test_the_same_picture_in_training_and_test_or_in_two_classes_is_a_line_with_examples(tmp_path: Path) -> None:
    train, test = (write_tiles(tmp_path / "split" / part, cat=4, dog=4) for part in ("train", "test"))
    for path in test.rglob("*.jpg"):  # other pictures than those in train/
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    for number in range(3):
        shutil.copy(train / "cat" / f"{number}.jpg", test / "cat" / f"copy{number}.jpg")
    shutil.copy(train / "dog" / "0.jpg", train / "cat" / "dog.jpg")
    assert load(tmp_path / "split").notes == (
        "3 pictures are the same in training and in test, so the test is too easy: "
        "train/cat/0.jpg = test/cat/copy0.jpg, train/cat/1.jpg = test/cat/copy1.jpg.",
        "The same picture is in two classes: train/dog/0.jpg = train/cat/dog.jpg.",
    )


# --- The file of decoded pictures ---


def test_pictures_are_decoded_once(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = load(tiles).digest()
    monkeypatch.setattr(data_files, "decode_picture", lambda *_: pytest.fail("decoded again"))
    assert load(tiles).digest() == digest


def test_the_source_of_pictures_is_that_of_their_files_whatever_shape_they_are_brought_to(tiles: Path) -> None:
    source = load(tiles).source
    assert len(source) == 64 and load(tiles, COLOUR).source == load(tiles).source == source
    (tiles / "cat" / "0.jpg").write_bytes((tiles / "cat" / "1.jpg").read_bytes())
    assert load(tiles).source != source


@pytest.mark.parametrize("change", ["added", "removed", "changed", "renamed"])
def test_pictures_are_decoded_again_after_a_change(change: str, tiles: Path) -> None:
    before = load(tiles)
    path = tiles / "cat" / "0.jpg"
    if change == "added":
        shutil.copy(path, path.with_name("new.jpg"))
    elif change == "removed":
        path.unlink()
    elif change == "changed":
        shutil.copy(tiles / "dog" / "0.jpg", path)
    else:
        path.rename(path.with_name("zzz.jpg"))
    assert load(tiles).digest() != before.digest()
    assert len(list((tiles.parent / "data" / "decoded").glob("*.npy"))) == 1


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_a_damaged_file_of_decoded_pictures_is_written_again(content: bytes | None, tiles: Path) -> None:
    digest = load(tiles).digest()
    (path,) = (tiles.parent / "data" / "decoded").glob("*.npy")
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    assert load(tiles).digest() == digest


def test_a_data_directory_that_cannot_be_written_is_one_line(tiles: Path) -> None:
    (tiles.parent / "data").write_text("a file")
    assert "data/decoded cannot be written" in refusal(tiles)


def test_a_worker_without_the_folder_or_with_another_one_is_one_line(tiles: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder on .*: each machine that trains needs the same pictures"):
        cached_dataset(str(tiles / "nowhere"), tiles.parent / "data", "0" * 64)
    with pytest.raises(DatasetError, match="is not the data set that this run was started with"):
        cached_dataset(str(tiles), tiles.parent / "data", "0" * 64)


# --- Data sets by name ---


def test_a_data_set_by_name_is_brought_to_another_shape(tmp_path: Path) -> None:
    shutil.copytree(DATA_DIR / "Digits", tmp_path / "Digits")
    native, large = load_dataset("Digits", tmp_path), load_dataset("Digits", tmp_path, (3, 32, 40))
    assert large.source == native.digest() != large.digest()
    assert large.train_images.shape == (1437, 3, 32, 40) and torch.equal(large.test_labels, native.test_labels)
    small = torch.nn.functional.adaptive_avg_pool2d(large.test_images[:, :, :, 4:36].float(), 4)
    expected = torch.nn.functional.adaptive_avg_pool2d(native.test_images.unsqueeze(1).float(), 4)
    assert (small - expected).abs().mean() < 5


def test_a_data_set_by_name_is_resized_again_after_its_files_change(tiles: Path) -> None:
    data_dir, shape = tiles.parent / "data", (1, 10, 10)
    shutil.copytree(DATA_DIR / "Digits", data_dir / "Digits")
    load(tiles.rename(tiles.with_name("Digits")), shape)  # a folder of pictures with the same name
    before = load_dataset("Digits", data_dir, shape)
    path = data_dir / "Digits" / "raw" / data_files.TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-784] + bytes(784))
    after = load_dataset("Digits", data_dir, shape)
    assert not after.train_images[-1].any() and torch.equal(after.train_images[:-1], before.train_images[:-1])
    assert len(list((data_dir / "decoded").glob("Digits-1x10x10-*.npy"))) == 2
    cached = cached_dataset("Digits", data_dir, after.digest(), shape)
    assert torch.equal(cached.train_images, after.train_images)
    with pytest.raises(DatasetError, match="is not the data set that this run was started with"):
        cached_dataset("Digits", data_dir, before.digest(), shape)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files that torchvision downloads, with a few images, and return their folder."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    parts = []
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (20, 3072), np.uint8)
        parts.append(write(name, {"batch_label": name, "labels": [*range(10)] * 2, "data": data, "filenames": []}))
    _, md5 = write("batches.meta", {"label_names": data_files.CLASS_NAMES["CIFAR10"].split(", ")})
    monkeypatch.setattr(CIFAR10, "train_list", parts[:5])
    monkeypatch.setattr(CIFAR10, "test_list", parts[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5})
    return folder


def test_cifar10_is_read_from_torchvisions_files(cifar10: Path) -> None:
    dataset = load_dataset("CIFAR10", cifar10.parent, (3, 32, 32))
    with open(cifar10 / "test_batch", "rb") as file:
        expected = torch.from_numpy(pickle.load(file)["data"]).view(20, 3, 32, 32)
    assert torch.equal(dataset.test_images, expected) and dataset.class_names[:2] == ["airplane", "automobile"]
    assert dataset.test_labels.tolist() == [*range(10)] * 2
    assert load_dataset("CIFAR10", cifar10.parent).train_images.shape == (100, 28, 28)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_damaged_file_of_cifar10_without_a_connection_is_one_line(name: str, cifar10: Path) -> None:
    content = (cifar10 / name).read_bytes()
    (cifar10 / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"^CIFAR10 is missing or damaged in .* and could not be downloaded.*$"):
        load_dataset("CIFAR10", cifar10.parent)


def test_missing_cifar10_without_a_connection_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"CIFAR10 is missing or damaged in .* and could not be downloaded"):
        load_dataset("CIFAR10", tmp_path)


# --- Networks ---


def test_a_network_with_fewer_logits_than_classes_is_refused() -> None:
    message = r"^NeuralNetwork returns 10 logits, but pets has 37 classes: let the last Linear return 37$"
    with pytest.raises(ConfigurationError, match=message):
        check_model(NeuralNetwork, "cpu", "float32", classes=37, dataset="pets")


def test_a_network_with_more_logits_than_classes_is_accepted() -> None:
    assert check_model(NeuralNetwork, "cpu", "float32", classes=2).name == "NeuralNetwork"


def test_a_network_that_does_not_fit_the_shape_fails_with_the_shape() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as error:
        check_model(NeuralNetwork, "cpu", "float32", image_shape=COLOUR)
    assert "(N, 3, 64, 64), which IMAGE_SHAPE sets" in error.value.__notes__[0]


# --- Runs ---


class Small(torch.nn.Module):
    """A network for pictures in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.stack(images)


def test_a_run_on_pictures_in_colour(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiles(tmp_path / "pets", cat=15, dog=40)
    monkeypatch.setattr(main_cnn, "ConvolutionalNeuralNetwork", Small)
    constants = {"DATASET": str(folder), "IMAGE_SHAPE": (3, 32, 32), "DATA_DIR": tmp_path / "data"}
    result = configure(main_cnn, **constants, WORKERS=2).main()
    output = " ".join(capsys.readouterr().out.split())
    assert "55 pictures in 2 classes (cat 15, dog 40), 11 of them kept for the test" in output
    assert "dog has 2.7 times the training images of cat, so macro F1" in output and "loss macro F1 fold-1" in output
    assert result.run_dir.name.startswith("Small-pets-")
    trained = load_network(read_run(result.run_dir), f"{__file__}:Small")
    dataset = load_dataset(folder, tmp_path / "data", (3, 32, 32))
    accuracy = (trained.predict(dataset.test_images).argmax(1) == dataset.test_labels).double().mean().item()
    assert result.final is not None and accuracy == pytest.approx(result.final.accuracy, abs=0.1)
    assert trained.light_backgrounds == light_background_share(dataset.train_images)

    configure(main_cnn, **constants | {"IMAGE_SHAPE": (3, 24, 24)}).main()
    assert "IMAGE_SHAPE (3, 32, 32) → (3, 24, 24)" in capsys.readouterr().out

    write_tiles(folder, cat=16)
    other = configure(main_cnn, **constants, EPOCHS=1).main()
    assert other.run_dir != result.run_dir
    output = " ".join(capsys.readouterr().out.split())
    assert "First run with these images" in output and "(+1 training images: cat 12 → 13)" in output


@pytest.mark.slow
def test_digits_as_pictures_give_the_bits_of_digits(configure: Configure, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits", load_dataset("Digits", DATA_DIR))
    expected = configure(main_tutorial).main()
    result = configure(main_tutorial, DATASET=str(folder), DATA_DIR=tmp_path / "data").main()
    contents = [computed(each.run_dir) for each in (expected, result)]
    for content in contents:
        del content["config"]
    assert contents[0] == contents[1]
    states = [torch.load(each.run_dir / "model.pt") for each in (expected, result)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_digits_as_pictures_are_the_same_data_set(tmp_path: Path) -> None:
    digits = load_dataset("Digits", DATA_DIR)
    few = digits._replace(train_images=digits.train_images[:60], train_labels=digits.train_labels[:60])
    few = few._replace(test_images=digits.test_images[:30], test_labels=digits.test_labels[:30])
    assert load(write_digits(tmp_path / "digits", few)).digest() == few.digest()


@pytest.mark.slow
def test_a_run_killed_while_decoding_or_training_gives_the_same_bits(start_script: Start, tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "pets", cat=800, dog=900)
    constants: dict[str, Any] = {"DATASET": str(folder), "DATA_DIR": str(tmp_path / "data"), "EPOCHS": 4}
    decoded = tmp_path / "data" / "decoded"
    process = start_script("main_tutorial", **constants)
    wait_for(lambda: (decoded / ".unfinished").exists() and (decoded / ".unfinished").stat().st_size, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not list(decoded.glob("*.npy"))

    process = start_script("main_tutorial", **constants)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert saved_epochs(tmp_path / "runs") > 0 and not (decoded / ".unfinished").exists()

    output, _ = finish(start_script("main_tutorial", **constants))
    assert "Resuming" in output
    (resumed,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    finish(start_script("main_tutorial", **constants, WORKERS=1))
    (other,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir() and path != resumed]
    assert computed(resumed) == computed(other)


@pytest.mark.slow
def test_a_pretrained_network_with_a_frozen_backbone_is_trained_and_resumed(
    start_script: Start, tmp_path: Path
) -> None:
    write_tiles(tmp_path / "pets", cat=30, dog=30)
    (tmp_path / "frozen.py").write_text(FROZEN.format(folder=str(tmp_path)))
    finish(start_python(tmp_path, "frozen.py", "--epochs=1"))
    output, _ = finish(start_python(tmp_path, "frozen.py", "--epochs=2"))
    assert "Frozen, 1,026 trainable parameters" in output and "Compared with" in output and "EPOCHS 1 → 2" in output
    models = [torch.load(path) for path in (tmp_path / "runs").glob("*/model.pt")]
    assert torch.equal(models[0]["backbone.conv1.weight"], models[1]["backbone.conv1.weight"])
    assert not torch.equal(models[0]["backbone.fc.weight"], models[1]["backbone.fc.weight"])


@pytest.mark.slow
def test_a_frozen_backbone_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    write_tiles(tmp_path / "pets", cat=30, dog=30)
    (tmp_path / "frozen.py").write_text(FROZEN.format(folder=str(tmp_path)))
    process = start_python(tmp_path, "frozen.py", "--epochs=6")
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    (killed,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert 0 < saved_epochs(tmp_path / "runs") < 18

    output, _ = finish(start_python(tmp_path, "frozen.py", "--epochs=6"))
    assert "Resuming" in output
    finish(start_python(tmp_path, "frozen.py", "--epochs=6", "--workers=1"))
    (other,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir() and path != killed]
    assert computed(killed) == computed(other)
    models = [torch.load(path / "model.pt") for path in (killed, other)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


FROZEN = """
import os, torch, main_cnn
from torch import nn
from torchvision.models import resnet18
from experiment.settings import read_command_line

class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.load_state_dict(torch.load({folder!r} + "/weights.pt"))
        self.backbone.requires_grad_(False)
        self.backbone.fc = nn.Linear(512, 2)

    def forward(self, images):
        return self.backbone(images)

if __name__ == "__main__":
    if not os.path.exists({folder!r} + "/weights.pt"):
        torch.save(resnet18().state_dict(), {folder!r} + "/weights.pt")
    main_cnn.ConvolutionalNeuralNetwork = Frozen
    main_cnn.DATASET, main_cnn.DATA_DIR = {folder!r} + "/pets", {folder!r} + "/data"
    main_cnn.RUNS_DIR = {folder!r} + "/runs"
    main_cnn.IMAGE_SHAPE, main_cnn.FOLDS, main_cnn.WANDB_MODE = (3, 32, 32), 2, "disabled"
    vars(main_cnn).update(read_command_line(vars(main_cnn), None))
    main_cnn.main()
"""
