"""What is known before training starts: the fits and their folds, the identity, the environment."""

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, SMALL, make_fit
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

import data_utils
import main_tutorial
from data_files import load_dataset
from data_utils import Dataset, split
from experiment.errors import ConfigurationError
from experiment.executors import SerialExecutor
from experiment.model_check import ModelSummary
from experiment.prepare import make_fits, make_identity, prepare
from experiment.resources import Resources, resolve_resources
from experiment.settings import TrainingConfig
from models import NeuralNetwork
from train_utils import CloudpickledFactory, Fit, code_digest, code_digests

Part = tuple[Tensor, Tensor]
SETTINGS: dict[str, Any] = {
    "dataset": "MNIST",
    "folds": 3,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.25,
    "lr_schedule": "cosine",
    "mirror": True,
    "rng_seed": 9,
}
RESOURCES = Resources("cuda", "bfloat16", threads=5, workers=1)


def make_config(**constants: Any) -> TrainingConfig:
    return TrainingConfig.from_constants(vars(main_tutorial) | constants)


def make_settings_config(**constants: Any) -> TrainingConfig:
    return make_config(**{name.upper(): value for name, value in SETTINGS.items()} | constants)


def make_dataset(labels: list[int]) -> Dataset:
    """Return a data set whose pixels are the numbers of the images."""
    images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
    return Dataset(images, torch.tensor(labels), images, torch.tensor(labels), ["a", "b", "c"])


def fits_on(dataset: Dataset, **constants: Any) -> list[Fit]:
    config = make_config(**constants)
    return make_fits(config, resolve_resources(config), NeuralNetwork, dataset)


def splits(dataset: Dataset, folds: int, seed: int = 7) -> list[tuple[Part, Part]]:
    """Return the images and labels that each fold trains on, and those that it is evaluated on."""
    fits = fits_on(dataset, FOLDS=folds, RNG_SEED=seed)
    parts = [split(dataset, fit.held_out_mask) for fit in fits if fit.name != "final"]
    return [(chosen(training), chosen(evaluation)) for training, evaluation in parts]


def chosen(part: data_utils.Part) -> Part:
    return part.images[part.rows], part.labels[part.rows]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def test_every_fit_has_the_settings_of_the_run() -> None:
    dataset = make_dataset([0, 1, 2] * 4)
    fits = make_fits(make_settings_config(DATA_DIR=Path("/data")), RESOURCES, NeuralNetwork, dataset)
    assert [(fit.name, fit.number) for fit in fits] == [("final", 0), ("fold-1", 1), ("fold-2", 2), ("fold-3", 3)]
    expected = {name: value for name, value in SETTINGS.items() if name != "folds"}
    expected |= {"model_class": NeuralNetwork, "data_dir": "/data", "data_digest": dataset.digest()}
    expected |= {"device": "cuda", "precision": "bfloat16", "threads": 5, "code_digest": code_digest()}
    expected["image_shape"] = (1, 28, 28)
    for fit in fits:
        own = {"name": fit.name, "number": fit.number, "held_out_mask": fit.held_out_mask}
        assert asdict(fit) == expected | own


def test_folds_cover_every_training_image_once() -> None:
    held_out = [images[:, 0, 0] for _, (images, _) in splits(make_dataset([0, 1, 2] * 20), 4)]
    assert torch.equal(torch.cat(held_out).sort().values.long(), torch.arange(60))


def test_a_fold_trains_on_all_images_except_its_own() -> None:
    (trained_on, _), (held_out, _) = splits(make_dataset([0, 1, 2] * 20), 4)[2]
    assert sorted(torch.cat([trained_on, held_out])[:, 0, 0].tolist()) == list(range(60))


def test_folds_are_stratified() -> None:
    dataset = make_dataset([0] * 40 + [1] * 20 + [2] * 8)
    assert [labels.bincount().tolist() for _, (_, labels) in splits(dataset, 4)] == [[10, 5, 2]] * 4


def test_another_seed_makes_other_folds() -> None:
    dataset = make_dataset([0, 1, 2] * 20)
    first, second = (splits(dataset, 4, seed)[0][1][0] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_folds_are_those_of_scikit_learn(digits: Dataset) -> None:
    splitter = StratifiedKFold(5, shuffle=True, random_state=7)
    expected = splitter.split(np.zeros(len(digits.train_labels)), digits.train_labels)
    for (train, held_out), ((images, _), (held_out_images, labels)) in zip(expected, splits(digits, 5), strict=True):
        assert torch.equal(images, digits.train_images[train])
        assert torch.equal(held_out_images, digits.train_images[held_out])
        assert torch.equal(labels, digits.train_labels[held_out])


def test_the_final_fit_trains_on_all_training_images_and_is_evaluated_on_the_test_images(digits: Dataset) -> None:
    (images, _, _), (test_images, _, _) = split(digits, make_fit(name="final").held_out_mask)
    assert images is digits.train_images and test_images is digits.test_images


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        ([0] * 9 + [1] * 3, 4, r"at most 3, the training images of the smallest class \(b\), got 4"),
        ([0] * 9 + [1] * 3, 10**30, "FOLDS must be at most 3"),
        ([0, 0], 2, "FOLDS must leave at least 2 images to train on"),
    ],
)
def test_too_many_folds_are_refused(labels: list[int], folds: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fits_on(make_dataset(labels), FOLDS=folds)


@pytest.mark.parametrize(("labels", "folds"), [([0] * 9 + [1] * 3, 3), ([0, 0, 0], 3)])
def test_as_many_folds_as_the_smallest_class_has_images_are_accepted(labels: list[int], folds: int) -> None:
    assert len(fits_on(make_dataset(labels), FOLDS=folds)) == folds + 1


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 100), (1, 20), (1, 19)])  # a last batch of one is left out
def test_one_cycle_with_one_step_is_refused(epochs: int, batch_size: int) -> None:
    constants = {"LR_SCHEDULE": "one_cycle", "FOLDS": 3, "EPOCHS": epochs, "BATCH_SIZE": batch_size}
    with pytest.raises(ConfigurationError, match='LR_SCHEDULE "one_cycle" needs at least two steps, but 20 images'):
        fits_on(make_dataset([0, 1, 2] * 10), **constants)


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 10), (2, 100), (1, 18)])
def test_one_cycle_with_two_steps_is_accepted(epochs: int, batch_size: int) -> None:
    constants = {"LR_SCHEDULE": "one_cycle", "FOLDS": 3, "EPOCHS": epochs, "BATCH_SIZE": batch_size}
    assert len(fits_on(make_dataset([0, 1, 2] * 10), **constants)) == 4


MODEL = ModelSummary("Network", "Network()", 12, {"logits": [0.5], "gradients": [1.0]})


def identity_on(dataset: Dataset, **constants: Any) -> dict[str, Any]:
    config = make_settings_config(**constants)
    fits = make_fits(config, RESOURCES, NeuralNetwork, dataset)
    return make_identity(config, RESOURCES, fits, MODEL, dataset)


def test_the_identity_is_everything_that_the_results_depend_on() -> None:
    identity = identity_on(make_dataset([0, 1, 2] * 4), WORKERS=1, RUNS_DIR="elsewhere")
    assert len(images := identity.pop("images")) == 64 and identity.pop("source") == images
    network: dict[str, Any] = {"name": "Network", "printed": "Network()", "parameters": 12}
    network |= {"fingerprint": {"logits": [0.5], "gradients": [1.0]}}
    expected: dict[str, Any] = {
        "device": "cuda",
        "precision": "bfloat16",
        "threads": 5,
        "torch": torch.__version__,
        "network": network,
        "image_shape": [1, 28, 28],
        "class_sizes": {"a": 4, "b": 4, "c": 4},
    }
    expected["code"] = code_digests()
    assert identity == SETTINGS | expected


def test_the_digest_of_the_folds_does_not_depend_on_how_they_are_trained() -> None:
    dataset = make_dataset([0, 1, 2] * 20)
    other = identity_on(dataset, EPOCHS=3, LEARNING_RATE=0.1, MIRROR=False)
    assert other["images"] == identity_on(dataset)["images"]


@pytest.mark.parametrize("constants", [{"FOLDS": 4}, {"RNG_SEED": 1}])
def test_other_folds_have_another_digest(constants: dict[str, int]) -> None:
    dataset = make_dataset([0, 1, 2] * 20)
    assert identity_on(dataset, **constants)["images"] != identity_on(dataset)["images"]


def test_other_images_have_another_digest() -> None:
    first, second = (identity_on(make_dataset([0, 1, 2] * repeats)) for repeats in (20, 21))
    assert first["images"] != second["images"]


def prepare_small(pool: Any, **constants: Any) -> Any:
    return prepare(
        NeuralNetwork, make_config(**SMALL | {"DATA_DIR": DATA_DIR, "PRECISION": "float32"} | constants), pool
    )


def test_the_plan_is_printed_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    prepare_small(SerialExecutor(), WORKERS=1, EPOCHS=1)
    assert " ".join(capsys.readouterr().out.split()) == (
        "NeuralNetwork, 669,706 trainable parameters, on Digits: 2 folds and a final fit, 1 epoch each, on cpu in "
        "float32, 1 at a time."
    )


def test_the_plan_names_an_executor_that_was_passed_in(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        experiment = prepare_small(pool, EPOCHS=3)
    assert "3 epochs each, on cpu in float32, by ThreadPoolExecutor." in " ".join(capsys.readouterr().out.split())
    assert experiment.environment["workers"] == experiment.executor_name == "ThreadPoolExecutor"


def test_a_network_is_sent_by_value_only_to_other_processes() -> None:
    assert prepare_small(SerialExecutor()).fits[0].model_class is NeuralNetwork
    with ThreadPoolExecutor(1) as pool:
        assert isinstance(prepare_small(pool).fits[0].model_class, CloudpickledFactory)


def test_the_environment_has_time_machine_and_versions() -> None:
    environment = prepare_small(SerialExecutor(), WORKERS=1).environment
    started = datetime.fromisoformat(environment["started"])
    assert abs(datetime.now(UTC) - started) < timedelta(minutes=1) and started.microsecond == 0
    assert environment["machine"].startswith(f"{platform.system()} {platform.machine()}, ")
    assert list(environment["versions"]) == ["python", "torch", "torchvision", "scikit-learn", "wandb", "numpy"]
    assert (environment["device"], environment["precision"], environment["workers"]) == ("cpu", "float32", 1)
