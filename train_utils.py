"""The settings, the train and test loops, and the experiment: K-fold cross-validation, then a final fit and its test.

A run is K + 1 fits, each of which trains on some images and is evaluated on others. The unit of work is one epoch of
one fit, `run_epoch`, a pure function: worker processes compute it, and `run_experiment` in the parent process alone
writes files, logs and talks to the user.
"""

import copy
import ctypes
import inspect
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import joblib
import numpy as np
import pydantic
import torch
from joblib.externals.loky import ProcessPoolExecutor
from pydantic import Field, StrictInt
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from data_utils import Batches, Dataset, cached_dataset, folds_problem, load_dataset, pixel_statistics, split
from report_utils import (
    ConfigurationError,
    ExperimentResult,
    Progress,
    RunDirectory,
    RunError,
    ctrl_c_held_back,
    describe_environment,
    evaluate,
    find_mistakes,
    path_from_here,
    save_report,
    summary_text,
)
from wandb_utils import WandbRuns, choose_mode

PROJECT_DIR = Path(__file__).resolve().parent
MOST_WORKER_DEATHS = 3  # worker processes that may be killed before a run is given up
EVALUATION_BATCH_SIZE = 256  # larger ones leave the processor's cache and are slower
State = dict[str, Any]
Checkpoint = dict[str, Any]  # "state", "history", "evaluation" after the last epoch, "failure" if there was one


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainingConfig:
    """All settings of a run, checked; each field is a constant of the entry scripts, in lower case.

    Raises
    ------
    ValueError
        If anything is wrong: one error (pydantic's ValidationError) that names every bad constant, what it must be
        and what it is.
    """

    dataset: Literal["MNIST", "FashionMNIST", "KMNIST", "Digits"] = Field(
        description='"MNIST", "FashionMNIST", "KMNIST" or "Digits"'
    )
    folds: StrictInt = Field(ge=2, description="an integer of at least 2")
    epochs: StrictInt = Field(ge=1, description="an integer of at least 1")
    batch_size: StrictInt = Field(ge=2, description="an integer of at least 2")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, strict=True, description="a finite number above 0")
    lr_schedule: Literal["constant", "cosine", "one_cycle"] = Field(description='"constant", "cosine" or "one_cycle"')
    rng_seed: StrictInt = Field(ge=0, lt=2**32, description="an integer from 0 to 4294967295")
    device: str = Field(
        pattern=r"^(cpu|cuda|cuda:\d{1,3}|mps|auto)$",
        description='"cpu", "cuda", "cuda:N", "mps" or "auto", and on this machine',
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(description='"auto", "float32" or "bfloat16"')
    workers: Literal["auto"] | Annotated[StrictInt, Field(ge=1)] = Field(
        description='"auto" or an integer of at least 1'
    )
    resume: bool = Field(strict=True, description="True or False")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = Field(
        description='"auto", "online", "offline" or "disabled"'
    )
    wandb_project_name: str = Field(
        pattern=r"^[^/\\#?%:]{1,128}$", strict=True, description="1 to 128 characters, none of them / \\ # ? % :"
    )
    wandb_api_key_path: str | Path = Field(description="a path")
    data_dir: str | Path = Field(description="a path")
    runs_dir: str | Path = Field(description="a path")

    @pydantic.field_validator("*", mode="wrap")
    @classmethod
    def _check(cls, value: Any, handler: Callable[[Any], Any], info: pydantic.ValidationInfo) -> Any:
        """Let pydantic check the field, add what types cannot say, and put any error into the user's words."""
        name = str(info.field_name)
        try:
            checked = handler(value)
            bad = (name == "device" and not _device_is_here(checked)) or (
                name in ("wandb_api_key_path", "data_dir", "runs_dir") and not _is_path(value)
            )
        except pydantic.ValidationError:
            bad = True
        if bad:
            wanted, found = cls.__pydantic_fields__[name].description, repr(value)
            found = found if len(found) <= 80 else f"{found[:77]}…"
            parts = {"name": name.upper(), "wanted": wanted, "found": found}
            raise PydanticCustomError("setting", "{name} must be {wanted}, got {found}", parts)
        return checked

    @classmethod
    def from_constants(cls, constants: dict[str, Any]) -> "TrainingConfig":
        """Build the configuration from a script's constants, as in ``TrainingConfig.from_constants(globals())``."""
        names = cls.__pydantic_fields__
        return cls(**{name: constants[name.upper()] for name in names if name.upper() in constants})

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON can hold them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Fit:
    """One model to train: `fold` is the part of the training images held out, counted from 0, or None for "final"."""

    name: str
    fold: int | None
    model_class: type[nn.Module]
    device: str
    precision: str
    threads: int
    data_digest: str


def train_loop(
    dataloader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Train a model for one epoch.

    Parameters
    ----------
    dataloader : iterable of (images, labels)
        Float images (B, …) and int64 labels (B,), on the model's device.
    model : nn.Module
        Returns logits (B, classes).
    loss_fn : callable
        Takes logits and labels, returns the batch's mean loss.
    optimizer : torch.optim.Optimizer
    scheduler : LRScheduler, optional
        Changes the learning rate after each batch.
    precision : torch.dtype
        What the network is computed in: float32, or bfloat16 by autocast. Weights and loss are float32 in any case.

    Returns
    -------
    loss, accuracy : float
        Mean loss per sample and share of right predictions, both as they were while training.
    """
    model.train()
    losses, correct, sizes = [], [], []
    for images, labels in dataloader:
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
        loss = loss_fn(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())  # summed up at the end: reading a value here would make a GPU wait
        correct.append((logits.argmax(1) == labels).sum())
        sizes.append(len(labels))
    return _mean_per_sample(losses, sizes), torch.stack(correct).sum().item() / sum(sizes)


@torch.no_grad()
def test_loop(
    dataloader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    precision: torch.dtype = torch.float32,
) -> tuple[float, Tensor, Tensor]:
    """Evaluate a model.

    Parameters
    ----------
    dataloader, model, loss_fn, precision
        As for `train_loop`.

    Returns
    -------
    loss : float
        Mean loss per sample.
    labels : Tensor
        int64 (N,), on the CPU, in the order of the batches.
    probabilities : Tensor
        float32 (N, classes), on the CPU: the softmax of the logits.
    """
    model.eval()
    losses, all_labels, all_probabilities = [], [], []
    for images, labels in dataloader:
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits = model(images).float()
        losses.append(loss_fn(logits, labels))
        all_labels.append(labels)
        all_probabilities.append(logits.softmax(1))
    mean_loss = _mean_per_sample(losses, [len(labels) for labels in all_labels])
    return mean_loss, torch.cat(all_labels).cpu(), torch.cat(all_probabilities).cpu()


def _mean_per_sample(losses: list[Tensor], sizes: list[int]) -> float:
    weights = torch.tensor(sizes, dtype=torch.float64)
    return (torch.stack(losses).cpu().double() @ weights / weights.sum()).item()


def run_epoch(config: TrainingConfig, fit: Fit, epoch: int, state: State | None) -> tuple[State, dict[str, Any]]:
    """Train one fit for one epoch and evaluate it where that is due; the same arguments give the same bits.

    Parameters
    ----------
    config : TrainingConfig
    fit : Fit
    epoch : int
        From 1 to ``config.epochs``.
    state : dict or None
        What the epoch before returned; None before the first. It is left as it is.

    Returns
    -------
    state : dict
        State dicts of "model", "optimizer" and "scheduler", on the CPU.
    metrics : dict
        ``epoch``, ``train/loss``, ``train/accuracy``, ``learning_rate`` (at the epoch's start); for folds also
        ``validation/loss`` and ``validation/accuracy``. After the last epoch also "evaluation": loss, labels and class
        probabilities of the images held out, or of the test images.
    """
    _keep_freed_memory()
    torch.set_num_threads(fit.threads)
    torch.manual_seed(int(np.random.SeedSequence((config.rng_seed, epoch)).generate_state(1, np.uint64)[0]))
    device, precision = torch.device(fit.device), getattr(torch, fit.precision)
    dataset = cached_dataset(config.dataset, PROJECT_DIR / config.data_dir, fit.data_digest)
    train_on, evaluate_on = split(dataset, config.folds, fit.fold, config.rng_seed)
    mean, std = pixel_statistics(train_on[0])
    train_batches = Batches(*train_on, config.batch_size, mean, std, device, training=True)

    model = fit.model_class().to(device, memory_format=torch.channels_last)  # the faster layout for convolutions
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    scheduler = _make_scheduler(config, optimizer, len(train_batches) * config.epochs)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would train on the very tensors it is given
        scheduler.load_state_dict(state["scheduler"])

    loss_fn = nn.CrossEntropyLoss()
    metrics: dict[str, Any] = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
    metrics["train/loss"], metrics["train/accuracy"] = train_loop(
        train_batches, model, loss_fn, optimizer, scheduler, precision
    )
    if fit.fold is not None or epoch == config.epochs:
        batches = Batches(*evaluate_on, EVALUATION_BATCH_SIZE, mean, std, device)
        evaluation = test_loop(batches, model, loss_fn, precision)
        if fit.fold is not None:
            metrics |= {"validation/loss": evaluation[0], "validation/accuracy": _accuracy(*evaluation[1:])}
        if epoch == config.epochs:
            metrics["evaluation"] = evaluation
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return {name: _to_cpu(part.state_dict()) for name, part in parts.items()}, metrics


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch's tensors: new pages may else take a third of the time.

    The parameters are in the GNU C Library's manual, "Malloc Tunable Parameters". No other C library needs it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap shrinks only where so much is free at its end


def _make_scheduler(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the scheduler of a fit of that many optimizer steps; LEARNING_RATE is the highest rate of each."""
    if config.lr_schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    if config.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def run_experiment(model_class: type[nn.Module], config: TrainingConfig) -> ExperimentResult:
    """Cross-validate a network, train it on all the training images, test it once; log and save all of it.

    Parameters
    ----------
    model_class : type of nn.Module
        Built without arguments; takes images (N, 1, 28, 28), returns logits (N, 10). It must be importable by worker
        processes, so not be defined in the script that is started.
    config : TrainingConfig

    Returns
    -------
    ExperimentResult

    Raises
    ------
    ConfigurationError
        If the data set has too few images of a class for that many folds.
    data_utils.DatasetError
        If the data set cannot be had or is damaged.
    wandb.errors.AuthenticationError
        If W&B's server refuses the key.
    RunError
        If a loss is no longer finite (after all other fits are done and saved), worker processes keep dying, or the
        disk is full.
    """
    started = time.monotonic()
    wandb_mode, wandb_key = choose_mode(config.wandb_mode, PROJECT_DIR / config.wandb_api_key_path)
    dataset = load_dataset(config.dataset, PROJECT_DIR / config.data_dir)
    if problem := folds_problem(dataset, config.folds):
        raise ConfigurationError(problem)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    threads, workers = plan_workers(config, device)
    shared = (model_class, device, precision, threads, dataset.digest())
    folds = [Fit(f"fold-{k + 1}", k, *shared) for k in range(config.folds)]
    fits = [Fit("final", None, *shared), *folds]  # the longest first

    name, identity = f"{model_class.__name__}-{config.dataset}", _identity(config, fits[0])
    with RunDirectory(PROJECT_DIR / config.runs_dir, name, config.to_dict(), identity, config.resume) as run_dir:
        environment = describe_environment(
            device=device, precision=precision, threads_per_fit=threads, workers=workers, resumed=run_dir.resumed
        )
        print(f"{model_class()}\n\nTraining on {device} in {precision}, {workers} at a time.")
        logged = config.to_dict() | {"model": str(model_class()), "environment": environment}
        with WandbRuns(wandb_mode, wandb_key, logged, [fit.name for fit in fits], run_dir, PROJECT_DIR) as runs:
            checkpoints = _train_all(config, fits, workers, run_dir, runs)
            environment |= {"seconds": time.monotonic() - started, "wandb_run_ids": runs.ids}
            result = _make_result(config, dataset, checkpoints, environment, run_dir.path)
            print(f"\n{summary_text(result)}")
            if result.final:
                run_dir.save_tensors("model.pt", checkpoints["final"]["state"]["model"])
            files = save_report(result)
            runs.log_results(result)
        run_dir.finish(result.to_dict())
    print("\nWorth opening:\n" + "\n".join(f"  {path_from_here(path)}" for path in files))
    if result.failures:
        raise RunError("\n".join(result.failures.values()))
    return result


def _identity(config: TrainingConfig, fit: Fit) -> dict[str, Any]:
    """Return all that a run's results depend on."""
    computed = ("dataset", "folds", "epochs", "batch_size", "learning_rate", "lr_schedule", "rng_seed")
    return {name: getattr(config, name) for name in computed} | {
        "device": fit.device,
        "precision": fit.precision,
        "threads": fit.threads,
        "data": fit.data_digest,
        "network": f"{inspect.getsource(fit.model_class)}\n{fit.model_class()}",
        "torch": str(torch.__version__),
    }


def _make_result(
    config: TrainingConfig,
    dataset: Dataset,
    checkpoints: dict[str, Checkpoint],
    environment: dict[str, Any],
    run_dir: Path,
) -> ExperimentResult:
    """Work out the figures of all fits from their checkpoints after the last epoch."""
    class_names = {label: dataset.class_names[label] for label in dataset.labels_present()}
    finished = {name: one for name, one in checkpoints.items() if not one["failure"]}
    results = {name: evaluate(name, one["history"], one["evaluation"], class_names) for name, one in finished.items()}
    final, mistakes = results.pop("final", None), []
    if final:
        _, labels, probabilities = finished["final"]["evaluation"]
        mistakes = find_mistakes(dataset.test_images, labels, probabilities, dataset.class_names)
    failures = {name: one["failure"] for name, one in checkpoints.items() if one["failure"]}
    return ExperimentResult(config.to_dict(), list(results.values()), final, failures, mistakes, environment, run_dir)


def _train_all(
    config: TrainingConfig, fits: list[Fit], workers: int, run_dir: RunDirectory, runs: WandbRuns
) -> dict[str, Checkpoint]:
    """Train all fits, side by side, an epoch of one at a time, from their checkpoints to their last epoch."""
    new: Checkpoint = {"state": None, "history": [], "evaluation": None, "failure": None}
    checkpoints = {fit.name: run_dir.load_checkpoint(fit.name) or new for fit in fits}
    for name, checkpoint in checkpoints.items():
        for metrics in checkpoint["history"]:
            runs.log_epoch(name, metrics)
    deaths, done = 0, sum(len(checkpoint["history"]) for checkpoint in checkpoints.values())
    with Progress(len(fits) * config.epochs, done) as progress:
        progress.rows(checkpoints)
        while pending := [fit for fit in fits if _is_pending(checkpoints[fit.name], config)]:
            waiting = deque(sorted(pending, key=lambda fit: len(checkpoints[fit.name]["history"])))
            try:
                for fit, state, metrics in _run_epochs(config, waiting, checkpoints, workers):
                    checkpoints[fit.name] = _next_checkpoint(checkpoints[fit.name], fit.name, state, metrics)
                    run_dir.save_checkpoint(fit.name, checkpoints[fit.name])
                    runs.log_epoch(fit.name, metrics)
                    progress.step(fit.name, metrics)
                    if _is_pending(checkpoints[fit.name], config):
                        waiting.append(fit)
                    progress.rows(checkpoints)
            except BrokenProcessPool:
                deaths += 1
                killed = "A worker process was killed, most likely because memory ran out"
                if deaths > MOST_WORKER_DEATHS:
                    raise RunError(f"{killed}, for the {deaths}th time. Set WORKERS lower.") from None
                progress.warn(f"{killed}; what it had not finished is done again.")
    return checkpoints


def _is_pending(checkpoint: Checkpoint, config: TrainingConfig) -> bool:
    return not checkpoint["failure"] and len(checkpoint["history"]) < config.epochs


def _next_checkpoint(checkpoint: Checkpoint, name: str, state: State, metrics: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint after one more epoch; takes "evaluation" out of the metrics."""
    evaluation = metrics.pop("evaluation", None)
    values = [*metrics.values(), *(evaluation[:1] if evaluation else [])]
    failure = None
    if not all(math.isfinite(value) for value in values):
        failure = (
            f"{name} diverged in epoch {metrics['epoch']}: its loss is no longer a finite number. "
            "Try a smaller LEARNING_RATE."
        )
    history = [*checkpoint["history"], metrics]
    return {"state": state, "history": history, "evaluation": evaluation, "failure": failure}


def plan_workers(config: TrainingConfig, device: str) -> tuple[int, int]:
    """Return how many threads each fit gets, whatever WORKERS is, and how many fits run side by side.

    Workers × threads never exceeds the cores; on a GPU one fit runs at a time.
    """
    cores, fits = joblib.cpu_count(), config.folds + 1
    threads = max(1, cores // min(cores, fits))
    if device != "cpu":
        return threads, 1
    most = min(fits, cores // threads)
    return threads, most if config.workers == "auto" else min(config.workers, most)


def _run_epochs(
    config: TrainingConfig, waiting: deque[Fit], checkpoints: dict[str, Checkpoint], workers: int
) -> Iterator[tuple[Fit, State, dict[str, Any]]]:
    """Yield (fit, state, metrics) of each epoch of the fits in `waiting`, as they come.

    The caller puts a fit back into `waiting` for its next epoch, so no fit has to wait until all others are as far.
    """

    def next_epochs() -> Iterator[Any]:  # joblib asks for one as a worker gets free
        while any(_is_pending(checkpoint, config) for checkpoint in checkpoints.values()):
            if waiting:
                fit = waiting.popleft()
                checkpoint = checkpoints[fit.name]
                yield joblib.delayed(_run_fits_epoch)(config, fit, len(checkpoint["history"]) + 1, checkpoint["state"])
            else:
                yield joblib.delayed(time.sleep)(0.05)  # until one is put back: joblib does not ask again after an end

    parallel = joblib.Parallel(
        n_jobs=workers,
        batch_size=1,
        pre_dispatch=workers + 1,  # one lies ready, so that no worker waits for its state to be sent
        return_as="generator_unordered",
        max_nbytes=None,
        initializer=_end_with_parent,  # for worker processes of this machine; a Dask cluster ignores it
        initargs=(os.getpid(),),
    )
    with ctrl_c_held_back():  # workers start here
        outcomes = parallel(next_epochs())
    with _pool_ends_with_a_killed_worker(getattr(parallel._backend, "_workers", None)), closing(outcomes):
        yield from filter(None, outcomes)


@contextmanager
def _pool_ends_with_a_killed_worker(pool: Any) -> Iterator[None]:
    """Do what joblib leaves undone when a worker is killed while it sends a result: end the pool.

    Half of the result is then in the pipe, and joblib's thread, which also looks after the workers, waits for the other
    half for ever (joblib 1.6.0, process_executor.py, `wait_result_broken_or_wakeup`). Once nobody can write to the pipe
    any more, the thread comes to its end and does what it does after any killed worker.
    """
    done = threading.Event()

    def watch(workers: dict[int, Any], result_writer: Any) -> None:
        while not done.wait(0.1):
            here = list(workers.values())
            if any(worker.exitcode for worker in here) and not done.wait(0.5):  # joblib mostly sees to it at once
                for worker in here:
                    worker.terminate()
                result_writer.close()
                return

    if isinstance(pool, ProcessPoolExecutor):  # not with one worker or a Dask cluster
        threading.Thread(target=watch, args=(pool._processes, pool._result_queue._writer), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _run_fits_epoch(
    config: TrainingConfig, fit: Fit, epoch: int, state: State | None
) -> tuple[Fit, State, dict[str, Any]]:
    return fit, *run_epoch(config, fit, epoch, state)


def _end_with_parent(parent: int) -> None:
    """Let this worker process end when its parent does, however that ended; else it would wait for work for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _to_cpu(state: Any) -> Any:
    """Return a state dict with all its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    return [_to_cpu(value) for value in state] if isinstance(state, list) else state


def _accuracy(labels: Tensor, probabilities: Tensor) -> float:
    return (probabilities.argmax(1) == labels).double().mean().item()


def resolve_device(device: str) -> str:
    """Return the device itself: with "auto", the fastest that is here."""
    if device != "auto":
        return device
    return next(name for name in ("cuda", "mps", "cpu") if _device_is_here(name))


def resolve_precision(precision: str, device: str) -> str:
    """Return "float32" or "bfloat16": with "auto", bfloat16 where the device computes it natively."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    elif device == "cpu":
        features = torch.cpu.get_capabilities()  # the first two are x86's, the others Arm's
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
        native = native and torch.backends.mkldnn.is_available()  # else PyTorch has no fast code for it, as on macOS
    else:
        native = False
    return "bfloat16" if native else "float32"


def _device_is_here(device: str) -> bool:
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    return device != "mps" or torch.backends.mps.is_available()


def _is_path(path: Any) -> bool:
    return isinstance(path, (str, Path)) and bool(str(path).strip()) and "\0" not in str(path)
