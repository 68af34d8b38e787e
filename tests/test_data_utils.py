"""Images in memory: batches, normalization and the split into training and evaluation."""

import numpy as np
import pytest
import torch
from conftest import DATA_DIR

from data_files import load_dataset
from data_utils import Batches, Dataset, pixel_statistics, split

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def make_batches(images: int, batch_size: int, training: bool) -> Batches:
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    return Batches(pixels, torch.arange(images), batch_size, 0.5, 0.25, CPU, training)


def test_training_batches_hold_every_image_once_in_another_order() -> None:
    labels = torch.cat([labels for _, labels in make_batches(100, 32, training=True)])
    assert torch.equal(labels.sort().values, torch.arange(100)) and not torch.equal(labels, torch.arange(100))


def test_evaluation_batches_hold_every_image_once_in_order() -> None:
    labels = torch.cat([labels for _, labels in make_batches(100, 32, training=False)])
    assert torch.equal(labels, torch.arange(100))


def test_the_labels_of_a_batch_belong_to_its_images() -> None:
    images, labels = next(iter(make_batches(100, 32, training=True)))
    torch.testing.assert_close(images[:, 0, 5, 5], (labels / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [1, 2, 31, 32, 33, 34, 64, 65])
def test_the_length_is_the_number_of_batches(images: int, training: bool) -> None:
    batches = make_batches(images, 32, training)
    assert len(batches) == len(list(batches))


def test_images_stay_unchanged_bytes_in_memory(digits: Dataset) -> None:
    before = digits.test_images.clone()
    batches = Batches(digits.test_images, digits.test_labels, 64, 0.5, 0.25, CPU, training=True, mirror=True)
    list(batches)
    assert batches.images.dtype == torch.uint8 and torch.equal(batches.images, before)


def test_mirroring_mirrors_another_half_of_the_images_each_time() -> None:
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


def test_without_mirroring_only_the_order_is_random() -> None:
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


def test_batches_are_normalized_floats_with_a_channel() -> None:
    images, labels = next(iter(make_batches(10, 4, training=False)))
    assert images.shape == (4, 1, 28, 28) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 0], (labels / 255 - 0.5) / 0.25)


def test_batch_size_above_the_images_gives_one_batch() -> None:
    assert [len(labels) for _, labels in make_batches(10, 10**30, training=True)] == [10]


def test_pixel_statistics_are_mean_and_standard_deviation() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5000, 28, 28), dtype=np.uint8))
    pixels = images.numpy() / 255
    assert pixel_statistics(images) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)


@pytest.mark.parametrize("grey", [0, 7, 255])
def test_images_of_a_single_grey_are_divided_by_one(grey: int) -> None:
    assert pixel_statistics(torch.full((3, 28, 28), grey, dtype=torch.uint8)) == (grey / 255, 1.0)


def test_held_out_images_are_evaluated_on_and_the_others_trained_on(digits: Dataset) -> None:
    held_out = np.random.default_rng(0).random(len(digits.train_labels)) < 0.3
    (images, labels), (other_images, other_labels) = split(digits, held_out.tobytes())
    assert torch.equal(images, digits.train_images[~held_out]) and torch.equal(labels, digits.train_labels[~held_out])
    assert torch.equal(other_images, digits.train_images[held_out])
    assert torch.equal(other_labels, digits.train_labels[held_out])


def test_without_a_mask_all_images_are_trained_on_and_the_test_images_evaluated_on(digits: Dataset) -> None:
    (images, _), (test_images, _) = split(digits, None)
    assert images is digits.train_images and test_images is digits.test_images


def test_batches_are_created_on_the_device() -> None:
    meta = torch.device("meta")  # available everywhere, and computes nothing
    pixels = torch.zeros(10, 28, 28, dtype=torch.uint8)
    batches = Batches(pixels, torch.arange(10), 4, 0.5, 0.25, meta, training=True, mirror=True)
    assert {part.device for batch in batches for part in batch} == {meta}
    assert batches.images.device == batches.labels.device == meta
