"""What will be trained, and how: device, precision, threads, workers and the fits; resolved once."""

import hashlib
import platform
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from data_utils import Dataset
from experiment.errors import ConfigurationError
from experiment.settings import HYPERPARAMETERS, TrainingConfig, device_is_here
from train_utils import Fit


@dataclass(frozen=True)
class Plan:
    """How the fits are trained.

    Attributes
    ----------
    device, precision : str
        As PyTorch names them; no longer "auto".
    threads : int
        That each fit gets.
    workers : int
        Fits that are trained side by side on this machine.
    executor : str or None
        The name of what computes the epochs instead, where something else was handed over.
    """

    device: str
    precision: str
    threads: int
    workers: int
    executor: str | None

    @property
    def is_sent(self) -> bool:
        """Whether other processes than this one may train."""
        return self.workers > 1 or self.executor is not None


def make_plan(config: TrainingConfig, executor: Executor | None) -> Plan:
    """Return how the fits of a configuration are trained on this machine.

    The threads can change the last bits of a result, so they do not depend on WORKERS. Workers × threads never exceeds
    the cores; on a GPU one fit is trained at a time.
    """
    device = config.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if device_is_here(name))
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if _is_fast_in_bfloat16(device) else "float32"

    fits = config.folds + 1
    cores = joblib.cpu_count()  # those that this process may use: a container may have fewer than the machine
    threads = max(1, cores // min(cores, fits))
    workers = 1
    if device == "cpu":
        workers = min(fits, cores // threads)
        if config.workers != "auto":
            workers = min(workers, int(config.workers))
    return Plan(device, precision, threads, workers, None if executor is None else type(executor).__name__)


def _is_fast_in_bfloat16(device: str) -> bool:
    """Return whether a device trains faster in bfloat16 than in float32: docs/speed.md."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # PyTorch has no fast code, as on macOS
        return False
    features = torch.cpu.get_capabilities()
    is_intel = str(features.get("cpu_name")).startswith("Intel")  # which without AMX is slower in it
    names_on_x86 = ["amx_bf16"] if is_intel else ["avx512_bf16"]
    names_on_arm = ["bf16", "sve_bf16"]
    return any(features.get(name) for name in names_on_x86 + names_on_arm)


def make_fits(plan: Plan, model_class: Callable[[], nn.Module], config: TrainingConfig, dataset: Dataset) -> list[Fit]:
    """Return the final fit, which takes longest, and the folds.

    Raises
    ------
    ConfigurationError
        If the data set has too few images of a class for that many folds, or too few at all; or if the schedule needs
        more steps than there are.
    """
    from sklearn.model_selection import StratifiedKFold

    _check_folds(dataset, config.folds)
    final = Fit(
        name="final",
        number=0,
        model_class=model_class,
        dataset=config.dataset,
        data_dir=str(config.data_dir),
        data_digest=dataset.digest(),
        held_out_mask=None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        mirror=config.mirror,
        rng_seed=config.rng_seed,
        device=plan.device,
        precision=plan.precision,
        threads=plan.threads,
    )
    folds = []
    labels = dataset.train_labels.numpy()
    splitter = StratifiedKFold(config.folds, shuffle=True, random_state=config.rng_seed)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels), start=1):
        mask = np.zeros(len(labels), dtype=bool)
        mask[held_out] = True
        folds.append(replace(final, name=f"fold-{number}", number=number, held_out_mask=mask.tobytes()))
    _check_steps(config, len(labels))
    return [final, *folds]


def _check_folds(dataset: Dataset, folds: int) -> None:
    labels, counts = dataset.train_labels.unique(return_counts=True)
    smallest = int(counts.argmin())
    most_folds = int(counts[smallest])  # no tensor, which cannot be compared with integers beyond 64 bits
    if folds > most_folds:
        name = dataset.class_names[labels[smallest]]
        raise ConfigurationError(
            f"FOLDS must be at most {most_folds}, the training images of the smallest class ({name}), got {folds}"
        )
    images = len(dataset.train_labels)
    if images - _largest_fold(images, folds) < 2:
        raise ConfigurationError(
            f"FOLDS must leave at least 2 images to train on, but of {images} training images {folds} folds leave 1"
        )


def _largest_fold(images: int, folds: int) -> int:
    return -(-images // folds)  # rounded up


def _check_steps(config: TrainingConfig, images: int) -> None:
    trained_on = images - _largest_fold(images, config.folds)
    full_batches, rest = divmod(trained_on, min(config.batch_size, trained_on))
    batches = full_batches + 1 if rest > 1 else full_batches
    if config.lr_schedule == "one_cycle" and config.epochs * batches < 2:
        raise ConfigurationError(
            f'LR_SCHEDULE "one_cycle" needs at least two steps, but {trained_on} images in batches of '
            f"{config.batch_size} are one. Set BATCH_SIZE lower, EPOCHS higher, or LR_SCHEDULE to another"
        )


def digest_of_images(fits: list[Fit]) -> str:
    """Return a digest, in hexadecimal, of which images each fold holds out: equal where folds can be compared."""
    sha = hashlib.sha256(fits[0].data_digest.encode())
    for fit in fits:
        sha.update(fit.name.encode() + (fit.held_out_mask or b""))
    return sha.hexdigest()


def identity_of(plan: Plan, config: TrainingConfig, fits: list[Fit]) -> dict[str, Any]:
    """Return all that a run's results depend on but the network, for config.json."""
    return {name: getattr(config, name) for name in HYPERPARAMETERS} | {
        "device": plan.device,
        "precision": plan.precision,
        "threads": plan.threads,
        "torch": str(torch.__version__),
        "images": digest_of_images(fits),
    }


def sentence_on(plan: Plan, config: TrainingConfig, network_name: str, weights: int) -> str:
    """Return what will be trained, in a sentence."""
    at_a_time = f"by {plan.executor}" if plan.executor else f"{plan.workers} at a time"
    epochs = "epoch" if config.epochs == 1 else "epochs"
    return (
        f"{network_name}, {weights:,} weights, on {config.dataset}: {config.folds} folds and a final fit, "
        f"{config.epochs} {epochs} each, on {plan.device} in {plan.precision}, {at_a_time}."
    )


def describe_machine(plan: Plan) -> dict[str, Any]:
    """Return what two runs of one configuration may differ in: time, machine and versions."""
    packages = ("torch", "torchvision", "scikit-learn", "wandb", "numpy")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": plan.device,
        "precision": plan.precision,
        "threads_per_fit": plan.threads,
        "workers": plan.executor or plan.workers,
    }
