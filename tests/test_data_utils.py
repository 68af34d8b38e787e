"""Images in memory: batches, normalization and the split into training and evaluation."""

import numpy as np
import pytest
import torch
from conftest import DATA_DIR

from data_files import load_dataset
from data_utils import Batches, Dataset, light_background_share, pixel_statistics, split

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def make_batches(images: int, batch_size: int, training: bool) -> Batches:
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    return Batches(pixels, torch.arange(images), None, batch_size, (0.5,), (0.25,), CPU, training)


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
    batches = Batches(*split(digits, None)[1], 64, (0.5,), (0.25,), CPU, training=True, mirror=True)
    list(batches)
    assert batches.images.dtype == torch.uint8 and torch.equal(batches.images, before)


def test_mirroring_mirrors_another_half_of_the_images_each_time() -> None:
    images = torch.arange(28 * 28).view(28, 28).repeat(2000, 1, 1).remainder(256).byte()
    batches = Batches(images, torch.arange(2000), None, 2000, (0.0,), (1 / 255,), CPU, training=True, mirror=True)
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
    (mean,), (std,) = pixel_statistics(images)
    assert (mean, std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)


@pytest.mark.parametrize("grey", [0, 7, 255])
def test_images_of_a_single_grey_are_divided_by_one(grey: int) -> None:
    assert pixel_statistics(torch.full((3, 28, 28), grey, dtype=torch.uint8)) == ((grey / 255,), (1.0,))


def test_held_out_images_are_evaluated_on_and_the_others_trained_on(digits: Dataset) -> None:
    held_out = np.random.default_rng(0).random(len(digits.train_labels)) < 0.3
    training, evaluation = split(digits, held_out.tobytes())
    for part, chosen in ((training, ~held_out), (evaluation, held_out)):
        images, labels = zip(*Batches(*part, 64, (0.0,), (1 / 255,), CPU), strict=True)
        assert torch.equal(torch.cat(images).squeeze(1).byte(), digits.train_images[chosen])
        assert torch.equal(torch.cat(labels), digits.train_labels[chosen])
        assert part.images is digits.train_images  # not copied


def test_without_a_mask_all_images_are_trained_on_and_the_test_images_evaluated_on(digits: Dataset) -> None:
    (images, _, _), (test_images, _, _) = split(digits, None)
    assert images is digits.train_images and test_images is digits.test_images


def test_batches_are_created_on_the_device() -> None:
    meta = torch.device("meta")  # available everywhere, and computes nothing
    pixels = torch.zeros(10, 28, 28, dtype=torch.uint8)
    batches = Batches(pixels, torch.arange(10), torch.arange(10), 4, (0.5,), (0.25,), meta, training=True, mirror=True)
    assert {part.device for batch in batches for part in batch} == {meta}
    assert batches.images.device == batches.labels.device == meta


@pytest.mark.parametrize("rows", [None, torch.arange(1, 12000, 2)])
def test_statistics_are_measured_per_channel_on_the_rows_that_count(rows: torch.Tensor | None) -> None:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, [[[40]], [[160]], [[256]]], (12000, 3, 8, 9)).astype(np.uint8))
    pixels = (images if rows is None else images[rows]).double() / 255
    means, stds = pixel_statistics(images, rows)
    assert means == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert stds == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_images_in_colour_are_normalized_per_channel_and_mirrored_left_to_right() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    mean, std = pixel_statistics(images)
    ((plain, _),) = Batches(images, torch.arange(2), None, 2, mean, std, CPU)
    assert plain.shape == (2, 3, 4, 5)
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.std((0, 2, 3), correction=0), torch.ones(3))
    torch.manual_seed(0)
    seen = {
        batch.sum(1)[0, 0, 0].item()
        for _ in range(20)
        for batch, _ in Batches(
            images[:1].repeat(2, 1, 1, 1), torch.arange(2), None, 2, mean, std, CPU, training=True, mirror=True
        )
    }
    assert len(seen) == 2


@pytest.mark.parametrize(("pixels", "share"), [([0, 0], 0.0), ([255, 0], 0.5), ([200, 128], 1.0)])
def test_share_of_light_backgrounds_is_that_of_the_borders(pixels: list[int], share: float) -> None:
    grey = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1).repeat(1, 6, 6)
    grey[:, 2:4, 2:4] = 255 - grey[:, 2:4, 2:4]
    assert light_background_share(grey) == share
    assert light_background_share(grey.unsqueeze(1).repeat(1, 3, 1, 1)) == share
