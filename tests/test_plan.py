"""What will be trained and how: precision, threads, workers, the folds."""

import platform
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, make_fit
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

import main_tutorial
from data_utils import Dataset, load_dataset, split
from experiment import plan
from experiment.errors import ConfigurationError
from experiment.plan import Plan, describe_machine, digest_of_images, identity_of, make_fits, make_plan, sentence_on
from experiment.settings import TrainingConfig
from models import NeuralNetwork
from train_utils import Fit

Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def config_of(**constants: Any) -> TrainingConfig:
    return TrainingConfig.from_constants(vars(main_tutorial) | constants)


def plan_of(**constants: Any) -> Plan:
    return make_plan(config_of(**constants), None)


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Core i7", "avx2": True}, "float32"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "sve_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "neon": True}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_is_faster_in_it(
    features: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert plan_of(PRECISION="auto").precision == precision


def test_where_pytorch_has_no_fast_bfloat16_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC", "avx512_bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert plan_of(PRECISION="auto").precision == "float32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_is_bfloat16_on_a_gpu_from_ampere_on(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"cuda:0": (1, 0), "cuda:1": capability}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked[device])
    assert plan_of(DEVICE="cuda:1", PRECISION="auto").precision == precision


@pytest.mark.parametrize("cores", [1, 2, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("workers", ["auto", 1, 2, 100])
def test_workers_times_threads_never_exceed_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int | str
) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: cores)
    planned = plan_of(FOLDS=5, WORKERS=workers)
    assert planned.threads == max(1, cores // min(cores, 6))
    assert 1 <= planned.workers <= 6 and planned.workers * planned.threads <= cores
    assert workers != "auto" or planned.workers == min(cores, 6)


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("folds", [2, 10])
def test_threads_do_not_depend_on_workers(monkeypatch: pytest.MonkeyPatch, cores: int, folds: int) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: cores)
    assert len({plan_of(FOLDS=folds, WORKERS=workers).threads for workers in ("auto", 1, 2, 3, 100)}) == 1


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_no_more_workers_than_fits(monkeypatch: pytest.MonkeyPatch, folds: int) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 16)
    assert plan_of(FOLDS=folds, WORKERS=100).workers <= folds + 1


def test_the_environment_can_take_cores_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert (plan_of().threads, plan_of().workers) == (1, 1)


def test_a_gpu_trains_one_fit_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert plan_of(DEVICE="cuda", PRECISION="float32").workers == 1


def test_auto_is_the_processor_where_there_is_nothing_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert plan_of(DEVICE="auto").device == "cpu"


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert plan_of(DEVICE="auto", PRECISION="float32").device == "cuda"


def test_with_one_worker_nothing_is_sent_and_with_two_or_an_executor_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 2)
    assert not plan_of(WORKERS=1).is_sent and plan_of(WORKERS=2).is_sent
    with ThreadPoolExecutor(1) as executor:
        handed_over = make_plan(config_of(WORKERS=1), executor)
    assert handed_over.is_sent and handed_over.executor == "ThreadPoolExecutor"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("Digits", DATA_DIR)


def numbered(labels: list[int]) -> Dataset:
    """Return a data set whose images are their own numbers."""
    images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    images = images.contiguous()
    return Dataset(images, torch.tensor(labels), images, torch.tensor(labels), ["a", "b", "c"])


def fits_of(dataset: Dataset, **constants: Any) -> list[Fit]:
    config = config_of(**constants)
    return make_fits(make_plan(config, None), NeuralNetwork, config, dataset)


def splits(dataset: Dataset, folds: int, seed: int = 7) -> list[Split]:
    """Return what each fold trains on and what it is evaluated on."""
    fits = {fit.name: fit for fit in fits_of(dataset, FOLDS=folds, RNG_SEED=seed)}
    return [split(dataset, fits[f"fold-{number}"].held_out_mask) for number in range(1, folds + 1)]


def parts_held_out(dataset: Dataset, folds: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [held_out for _, held_out in splits(dataset, folds)]


def folds_problem(dataset: Dataset, folds: int) -> str | None:
    """Return what `make_fits` says about that many folds."""
    try:
        fits_of(dataset, FOLDS=folds)
    except ConfigurationError as error:
        return str(error)
    return None


def test_every_fit_has_the_settings_of_the_run_and_folds_are_numbered_from_1() -> None:
    constants: dict[str, Any] = {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 4, "BATCH_SIZE": 8, "LEARNING_RATE": 0.25}
    constants |= {"LR_SCHEDULE": "cosine", "MIRROR": True, "RNG_SEED": 9, "DATA_DIR": Path("/data")}
    dataset, planned = numbered([0, 1, 2] * 4), Plan("cuda", "bfloat16", 5, 1, None)
    fits = make_fits(planned, NeuralNetwork, config_of(**constants), dataset)
    assert [(fit.name, fit.number) for fit in fits] == [("final", 0), ("fold-1", 1), ("fold-2", 2), ("fold-3", 3)]
    for fit in fits:
        assert fit == Fit(
            name=fit.name,
            number=fit.number,
            model_class=NeuralNetwork,
            dataset="MNIST",
            data_dir="/data",
            data_digest=dataset.digest(),
            held_out_mask=fit.held_out_mask,
            epochs=4,
            batch_size=8,
            learning_rate=0.25,
            lr_schedule="cosine",
            mirror=True,
            rng_seed=9,
            device="cuda",
            precision="bfloat16",
            threads=5,
        )


def test_folds_cover_every_training_image_once() -> None:
    numbers = torch.cat([images[:, 0, 0] for images, _ in parts_held_out(numbered([0, 1, 2] * 20), 4)])
    assert torch.equal(numbers.sort().values.long(), torch.arange(60))


def test_a_fold_trains_on_all_images_but_its_own() -> None:
    (trained_on, _), (kept_back, _) = splits(numbered([0, 1, 2] * 20), 4)[2]
    assert sorted(torch.cat([trained_on, kept_back])[:, 0, 0].tolist()) == list(range(60))


def test_folds_hold_each_class_in_the_same_share() -> None:
    counts = [labels.bincount().tolist() for _, labels in parts_held_out(numbered([0] * 40 + [1] * 20 + [2] * 8), 4)]
    assert counts == [[10, 5, 2]] * 4


def test_another_seed_makes_other_folds() -> None:
    dataset = numbered([0, 1, 2] * 20)
    assert not torch.equal(splits(dataset, 4, seed=1)[0][1][0], splits(dataset, 4, seed=2)[0][1][0])


def test_folds_are_scikit_learns_stratified_ones(digits: Dataset) -> None:
    splitter = StratifiedKFold(5, shuffle=True, random_state=7)
    expected = list(splitter.split(np.zeros(len(digits.train_labels)), digits.train_labels))
    for (train, held_out), ((images, labels), (other_images, other_labels)) in zip(
        expected, splits(digits, 5), strict=True
    ):
        assert torch.equal(images, digits.train_images[train]) and torch.equal(labels, digits.train_labels[train])
        assert torch.equal(other_images, digits.train_images[held_out])
        assert torch.equal(other_labels, digits.train_labels[held_out])


def test_the_final_fit_trains_on_all_and_is_tested_on_the_test_images(digits: Dataset) -> None:
    (images, _), (test_images, _) = split(digits, make_fit(name="final").held_out_mask)
    assert images is digits.train_images and test_images is digits.test_images


def test_more_folds_than_images_of_a_class_are_a_problem(digits: Dataset) -> None:
    smallest = int(digits.train_labels.bincount().min())
    assert folds_problem(digits, smallest) is None
    assert "FOLDS must be at most" in str(folds_problem(digits, smallest + 1))


def test_the_problem_with_the_folds_names_the_smallest_class() -> None:
    assert "3, the training images of the smallest class (b), got 4" in str(
        folds_problem(numbered([0] * 9 + [1] * 3), 4)
    )


def test_folds_that_leave_one_image_to_train_on_are_a_problem() -> None:
    assert "FOLDS must leave at least 2 images" in str(folds_problem(numbered([0, 0]), 2))
    assert folds_problem(numbered([0, 0, 0]), 3) is None


@pytest.mark.parametrize("folds", [10**19, 10**30])
def test_folds_beyond_64_bits_are_a_problem(digits: Dataset, folds: int) -> None:
    assert "FOLDS must be at most" in str(folds_problem(digits, folds))


@pytest.mark.parametrize(  # a last batch of one image is left out
    ("epochs", "batch_size", "is_refused"),
    [(1, 100, True), (1, 10, False), (2, 100, False), (1, 20, True), (1, 19, True), (1, 18, False)],
)
def test_one_cycle_needs_two_steps(epochs: int, batch_size: int, is_refused: bool) -> None:
    constants = {"LR_SCHEDULE": "one_cycle", "FOLDS": 3, "EPOCHS": epochs, "BATCH_SIZE": batch_size}
    dataset = numbered([0, 1, 2] * 10)
    if is_refused:
        with pytest.raises(ConfigurationError, match='LR_SCHEDULE "one_cycle" needs at least two steps, but 20 images'):
            fits_of(dataset, **constants)
    else:
        assert len(fits_of(dataset, **constants)) == 4


def test_the_digest_of_the_images_changes_with_the_folds_alone() -> None:
    dataset = numbered([0, 1, 2] * 20)
    digest = digest_of_images(fits_of(dataset))
    assert digest == digest_of_images(fits_of(dataset, EPOCHS=3, LEARNING_RATE=0.1, MIRROR=True))
    others = [fits_of(dataset, FOLDS=4), fits_of(dataset, RNG_SEED=1), fits_of(numbered([0, 1, 2] * 21))]
    assert len({digest, *(digest_of_images(fits) for fits in others)}) == 4


@pytest.mark.parametrize(
    ("epochs", "executor", "expected"),
    [
        (1, None, "5 folds and a final fit, 1 epoch each, on cpu in float32, 2 at a time."),
        (3, "Client", "5 folds and a final fit, 3 epochs each, on cpu in float32, by Client."),
    ],
)
def test_what_will_be_trained_is_said_in_a_sentence(epochs: int, executor: str | None, expected: str) -> None:
    config = config_of(DATASET="MNIST", EPOCHS=epochs)
    said = sentence_on(Plan("cpu", "float32", 1, 2, executor), config, "NeuralNetwork", 669706)
    assert said == f"NeuralNetwork, 669,706 weights, on MNIST: {expected}"


def test_the_number_of_workers_is_an_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 3)
    assert str(plan_of().workers) == "3"


def test_a_runs_identity_is_all_that_its_results_depend_on_but_the_network() -> None:
    constants: dict[str, Any] = {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 4, "BATCH_SIZE": 8, "LEARNING_RATE": 0.25}
    config = config_of(**constants, LR_SCHEDULE="cosine", MIRROR=True, RNG_SEED=9, WORKERS=1, RUNS_DIR="elsewhere")
    planned = Plan("cpu", "float32", 5, 1, None)
    fits = make_fits(planned, NeuralNetwork, config, numbered([0, 1, 2] * 4))
    assert identity_of(planned, config, fits) == {
        "dataset": "MNIST",
        "folds": 3,
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 0.25,
        "lr_schedule": "cosine",
        "mirror": True,
        "rng_seed": 9,
        "device": "cpu",
        "precision": "float32",
        "threads": 5,
        "torch": torch.__version__,
        "images": digest_of_images(fits),
    }


@pytest.mark.parametrize(("executor", "workers"), [(None, 2), ("Client", "Client")])
def test_results_say_when_and_on_which_machine_with_which_versions_they_were_made(
    executor: str | None, workers: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 4)
    environment = describe_machine(Plan("cpu", "float32", 5, 2, executor))
    started, versions = datetime.fromisoformat(environment.pop("started")), environment.pop("versions")
    assert abs(datetime.now(UTC) - started) < timedelta(minutes=1) and started.microsecond == 0
    assert environment == {
        "machine": f"{platform.system()} {platform.machine()}, 4 cores",
        "device": "cpu",
        "precision": "float32",
        "threads_per_fit": 5,
        "workers": workers,
    }
    assert list(versions) == ["python", "torch", "torchvision", "scikit-learn", "wandb", "numpy"]
    assert versions["python"] == platform.python_version() and versions["numpy"] == np.__version__
