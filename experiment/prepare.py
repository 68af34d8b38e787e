"""Everything that is known before training starts: data, checked network, fits, identity, and where it is computed."""

import hashlib
import platform
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from data_files import CLASS_NAMES, class_names_of, dataset_label, find_pictures, load_dataset, resolve_path
from data_utils import Dataset, light_background_share, pixel_statistics
from experiment.errors import ConfigurationError, RunError
from experiment.executors import WorkerDiedError, external_name, pickle_by_value, submit, uses_other_processes
from experiment.formatting import wrap
from experiment.identity import HYPERPARAMETERS, has_unequal_classes
from experiment.model_check import ModelSummary, check_callable, check_model
from experiment.resources import Resources, resolve_resources, with_kept
from experiment.settings import TrainingConfig
from experiment.terminal import print_line, warn
from experiment.unfinished_runs import find_unfinished, identity_to_resume
from experiment.wandb_key import WandbAccess, resolve_wandb_access
from train_utils import Fit, RemoteError, call_safely, code_digest, code_digests


@dataclass(frozen=True)
class Experiment:
    """A run that is ready to be trained.

    Attributes
    ----------
    config : TrainingConfig
    resources : Resources
    executor_name : str or None
        The class of the executor that the caller passed in, if any.
    model : ModelSummary
    dataset : Dataset
    fits : list of Fit
        The final fit, then the folds.
    identity : dict
        What the results depend on, as config.json stores it.
    environment : dict
        Time, machine and versions: what two runs of the same identity may differ in.
    wandb : WandbAccess
    started : float
        `time.monotonic()` at the start.
    """

    config: TrainingConfig
    resources: Resources
    executor_name: str | None
    model: ModelSummary
    dataset: Dataset
    fits: list[Fit]
    identity: dict[str, Any]
    environment: dict[str, Any]
    wandb: WandbAccess
    started: float

    @property
    def config_record(self) -> dict[str, Any]:
        """The settings and the identity for config.json, and what `classify` needs to know of the training images."""
        images = self.dataset.train_images
        mean, std = pixel_statistics(images)
        normalization = {
            "mean": mean,
            "std": std,
            "class_names": self.dataset.class_names,
            "light_backgrounds": light_background_share(images),
        }
        return self.config.to_dict() | {"normalization": normalization, "identity": self.identity}

    @property
    def logged_config(self) -> dict[str, Any]:
        """The settings, the printed network and the environment, for W&B."""
        return self.config.to_dict() | {"model": self.model.printed, "environment": self.environment}


def prepare(model_class: Callable[[], nn.Module], config: TrainingConfig, pool: Executor) -> Experiment:
    """Check the network, load the data, and describe the run; print in one sentence what will be trained.

    Raises
    ------
    ConfigurationError
        If the network or a setting cannot be used.
    data_files.DatasetError
        If the data set cannot be loaded.
    Exception
        What the network itself raises.
    """
    started = time.monotonic()
    wandb = resolve_wandb_access(config)
    executor_name = external_name(pool)
    check_callable(model_class)
    factory = _sendable(model_class) if uses_other_processes(pool) else model_class
    remote_digests = submit(pool, call_safely, code_digests)
    classes = len(class_names_of(config.dataset))
    if executor_name is None:
        resources, model = _resolve_and_check(model_class, config, classes)
    else:
        try:
            resources, model = _result_of(submit(pool, call_safely, _resolve_and_check, factory, config, classes))
        except RunError:  # the workers have only the files that training needs
            resources, model = _resolve_and_check(model_class, config, classes)
    print_line(wrap(_describe_plan(config, resources, executor_name, model)))
    dataset = _load_and_describe(config)
    fits = make_fits(config, resources, factory, dataset)
    identity = make_identity(config, resources, fits, model, dataset)
    if config.resume:
        identity = identity_to_resume(config, identity, find_unfinished(config, model.name))
        if (identity["threads"], identity["precision"]) != (resources.threads, resources.precision):
            resources = with_kept(resources, config, identity)
            fits = [replace(fit, threads=resources.threads, precision=resources.precision) for fit in fits]
            print_line(wrap(_describe_kept(resources)))
    with suppress(WorkerDiedError):  # a worker that dies costs no run: each epoch checks its code again
        _compare_code(_result_of(remote_digests))
    return Experiment(
        config=config,
        resources=resources,
        executor_name=executor_name,
        model=model,
        dataset=dataset,
        fits=fits,
        identity=identity,
        environment=_describe_environment(resources, executor_name),
        wandb=wandb,
        started=started,
    )


def _resolve_and_check(
    model_class: Callable[[], nn.Module], config: TrainingConfig, classes: int
) -> tuple[Resources, ModelSummary]:
    """Resolve the resources and check the network, in the process that trains or whose workers do."""
    resources = resolve_resources(config)
    label = dataset_label(config.dataset)
    summary = check_model(model_class, resources.device, resources.precision, config.image_shape, classes, label)
    return resources, summary


def _load_and_describe(config: TrainingConfig) -> Dataset:
    """Load the data set; of a folder of pictures, print what it contains."""
    data_dir = resolve_path(config.data_dir)
    if config.dataset in CLASS_NAMES:
        return load_dataset(config.dataset, data_dir, config.image_shape)
    pictures = find_pictures(config.dataset)
    counts = Counter(pictures.class_names[label] for _, label in pictures.train)
    print_line(wrap(pictures.describe(config.image_shape) + _describe_unequal_classes(counts)))
    dataset = load_dataset(config.dataset, data_dir, config.image_shape)
    for note in dataset.notes:
        warn(wrap(note))
    return dataset


def _describe_unequal_classes(counts: Counter[str]) -> str:
    """Return a sentence on the training images of the largest and the smallest class, if these differ much."""
    if not has_unequal_classes(counts):
        return ""
    (largest, most), *_, (smallest, fewest) = counts.most_common()
    return (
        f" {largest} has {most / fewest:.1f} times the training images of {smallest}, so macro F1, in which all "
        "classes count the same, is shown beside the accuracy."
    )


def _result_of(future: Future[Any]) -> Any:
    """Return the result of a first call to an executor; raise what the call raised.

    Raises
    ------
    RunError
        If the executor itself failed.
    """
    try:
        result = future.result()
    except WorkerDiedError:
        raise
    except Exception as error:  # each kind of executor has its own
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise RunError(f"the executor failed at its first call: {type(error).__name__}: {reason}") from None
    if isinstance(result, RemoteError):
        raise result.error
    return result


def _compare_code(remote_digests: dict[str, str]) -> None:
    """Check that the processes that train have the training code of this one.

    Raises
    ------
    ConfigurationError
        If a function was replaced here, or a file edited after it was imported.
    """
    here = code_digests()
    different = sorted(
        name for name in here.keys() | remote_digests.keys() if here.get(name) != remote_digests.get(name)
    )
    if different:
        files = " and ".join(sorted({f"{name.partition('.')[0]}.py" for name in different}))
        raise ConfigurationError(
            f"{', '.join(different)} in this process is not what the processes that train import from {files}. Edit "
            "the file and start the program (or the notebook's kernel) again, or set WORKERS = 1"
        )


def _sendable(model_class: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return the network's class or function as other processes can call it."""
    try:
        return pickle_by_value(model_class)
    except Exception as error:  # cloudpickle raises many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigurationError(
            f"the network cannot be sent to other processes: {reason}. Create what it needs in its own __init__, or "
            "set WORKERS = 1"
        ) from None


def make_fits(
    config: TrainingConfig, resources: Resources, model_class: Callable[[], nn.Module], dataset: Dataset
) -> list[Fit]:
    """Return the final fit, which takes longest, and the folds.

    Raises
    ------
    ConfigurationError
        If the data set has too few images of a class for that many folds, or too few at all; or if the schedule needs
        more steps than there are.
    """
    from sklearn.model_selection import StratifiedKFold

    _check_folds(dataset, config.folds)
    _check_steps(config, len(dataset.train_labels))
    final = Fit(
        name="final",
        number=0,
        model_class=model_class,
        dataset=str(config.dataset),
        data_dir=str(config.data_dir),
        data_digest=dataset.digest(),
        image_shape=config.image_shape,
        held_out_mask=None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        mirror=config.mirror,
        rng_seed=config.rng_seed,
        device=resources.device,
        precision=resources.precision,
        threads=resources.threads,
        code_digest=code_digest(),
    )
    folds = []
    labels = dataset.train_labels.numpy()
    splitter = StratifiedKFold(config.folds, shuffle=True, random_state=config.rng_seed)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels), start=1):
        mask = np.zeros(len(labels), dtype=bool)
        mask[held_out] = True
        folds.append(replace(final, name=f"fold-{number}", number=number, held_out_mask=mask.tobytes()))
    return [final, *folds]


def _check_folds(dataset: Dataset, folds: int) -> None:
    labels, counts = dataset.train_labels.unique(return_counts=True)
    smallest = int(counts.argmin())
    max_folds = int(counts[smallest])  # an int: tensors cannot be compared with integers beyond 64 bits
    if folds > max_folds:
        name = dataset.class_names[labels[smallest]]
        raise ConfigurationError(
            f"FOLDS must be at most {max_folds}, the training images of the smallest class ({name}), got {folds}"
        )
    images = len(dataset.train_labels)
    if images - _largest_fold(images, folds) < 2:
        raise ConfigurationError(
            f"FOLDS must leave at least 2 images to train on, but with {folds} folds of {images} images it leaves 1"
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
            f"{config.batch_size} are one step. Reduce BATCH_SIZE, increase EPOCHS or use another LR_SCHEDULE"
        )


def make_identity(
    config: TrainingConfig, resources: Resources, fits: list[Fit], model: ModelSummary, dataset: Dataset
) -> dict[str, Any]:
    """Return everything that the results of a run depend on, for config.json."""
    settings = config.to_dict()
    counts = torch.bincount(dataset.train_labels, minlength=len(dataset.class_names)).tolist()
    return {name: settings[name] for name in HYPERPARAMETERS} | {
        "class_sizes": dict(zip(dataset.class_names, counts, strict=True)),
        "device": resources.device,
        "precision": resources.precision,
        "threads": resources.threads,
        "torch": str(torch.__version__),
        "images": _digest_of_folds(fits, fits[0].data_digest),
        "source": _digest_of_folds(fits, dataset.source or fits[0].data_digest),
        "code": code_digests(),
        "network": model.to_dict(),
    }


def _digest_of_folds(fits: list[Fit], data_digest: str) -> str:
    """Return a digest of the images that each fold holds out, given one of all images.

    Two runs can be compared if their images were equal before they were resized.
    """
    sha = hashlib.sha256(data_digest.encode())
    for fit in fits:
        sha.update(fit.name.encode() + (fit.held_out_mask or b""))
    return sha.hexdigest()


def _describe_plan(config: TrainingConfig, resources: Resources, executor_name: str | None, model: ModelSummary) -> str:
    """Return in one sentence what will be trained."""
    where = f"by {executor_name}" if executor_name else f"{resources.workers} at a time"
    dataset = dataset_label(config.dataset)
    epochs = "epoch" if config.epochs == 1 else "epochs"
    return (
        f"{model.name}, {model.parameters:,} trainable parameters, on {dataset}: {config.folds} folds and a final fit, "
        f"{config.epochs} {epochs} each, on {resources.device} in {resources.precision}, {where}."
    )


def _describe_kept(resources: Resources) -> str:
    threads = "1 thread" if resources.threads == 1 else f"{resources.threads} threads"
    return (
        f"A run with these settings was begun in {resources.precision} with {threads} per network on a machine with "
        "other cores or another processor; it is resumed with these, so that the results stay the same."
    )


def _describe_environment(resources: Resources, executor_name: str | None) -> dict[str, Any]:
    packages = ("torch", "torchvision", "scikit-learn", "wandb", "numpy")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": resources.device,
        "precision": resources.precision,
        "threads_per_fit": resources.threads,
        "workers": executor_name or resources.workers,
    }
