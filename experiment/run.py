"""The experiment: K-fold cross-validation, then a final fit and its test, an epoch of one fit at a time.

Workers compute the epochs; this process alone saves, logs and talks to the user.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from data_utils import Dataset, load_dataset, path_of
from experiment.compare import compare_with_newest
from experiment.console import Progress, path_from_here, say, summary_text, warn
from experiment.errors import ConfigurationError, RunError, beside_the_run, end_traceback_outside
from experiment.figures import draw_figures, report_text
from experiment.machine import describe_machine, plan_workers, resolve_device, resolve_precision
from experiment.results import ExperimentResult, make_result
from experiment.run_directory import RunDirectory, identify
from experiment.settings import TrainingConfig
from experiment.wandb_key import choose_mode
from experiment.wandb_runs import WandbRuns
from experiment.wandb_sweep import take_sweep
from experiment.workers import ThisProcess, WorkerProcesses
from train_utils import Fit, State, build_network, run_epoch, test_loop, train_loop

MOST_WORKER_DEATHS = 3  # worker processes that may be killed before a run is given up
Checkpoint = dict[str, Any]  # "state", "history", "evaluation" after the last epoch, "failure" if there was one


def run_experiment(
    model_class: Callable[[], nn.Module], config: TrainingConfig, executor: Executor | None = None
) -> ExperimentResult:
    """Cross-validate a network, train it on all the training images, test it once; log and save all of it.

    Parameters
    ----------
    model_class : type of nn.Module
        Built without arguments; takes images (N, 1, 28, 28), returns logits (N, 10).
    config : TrainingConfig
    executor : concurrent.futures.Executor, optional
        Where the epochs are computed, such as a Dask cluster's; by default by WORKERS processes of this machine.

    Returns
    -------
    ExperimentResult

    Raises
    ------
    ConfigurationError
        If the network returns no logits, a class has too few images for that many folds, or the W&B key is wrong.
    data_utils.DatasetError
        If the data set cannot be had or is damaged.
    RunError
        If a loss is no longer finite (all other fits are done and saved), workers keep dying, or the disk is full.
    """
    started, sweep = time.monotonic(), take_sweep()
    network = try_network(model_class, config)
    wandb_mode, wandb_key = choose_mode(config.wandb_mode, path_of(config.wandb_api_key_path), sweep is not None)
    dataset = load_dataset(config.dataset, path_of(config.data_dir))
    fits = make_fits(model_class, config, dataset)
    device, precision, threads = fits[0].device, fits[0].precision, fits[0].threads
    workers = plan_workers(config.workers, len(fits), device)[1]
    at_a_time = f"{workers} at a time" if executor is None else f"by {type(executor).__name__}"
    say(f"{network}\n\nTraining on {device} in {precision}, {at_a_time}.")

    environment = describe_machine() | {"device": device, "precision": precision, "threads_per_fit": threads}
    environment["workers"] = workers if executor is None else type(executor).__name__
    logged = config.to_dict() | {"model": str(network), "environment": environment}
    name, identity = f"{model_class.__name__}-{config.dataset}", identify(config, fits[0], network)
    with (
        RunDirectory(path_of(config.runs_dir), name, config.to_dict(), identity, config.resume) as run_dir,
        WandbRuns(wandb_mode, wandb_key, logged, [fit.name for fit in fits], run_dir, sweep) as runs,
    ):
        checkpoints = _train_all(fits, workers, executor, run_dir, runs)
        environment |= {"seconds": time.monotonic() - started, "resumed": run_dir.resumed, "wandb_run_ids": runs.ids}
        result = make_result(config.to_dict(), dataset, checkpoints, environment, run_dir.path)
        say(f"\n{summary_text(result)}")
        if result.final:
            run_dir.save_tensors("model.pt", checkpoints["final"]["state"]["model"])
        figures: dict[str, bytes] = {}
        with beside_the_run("the figures"):
            figures = draw_figures(result)
        comparison = ""
        with beside_the_run("a comparison"):
            comparison = compare_with_newest(run_dir.path, result.to_dict(), identity)
        if comparison:
            say(f"\n{comparison}")
        for file, content in figures.items():
            run_dir.save(file, content)
        run_dir.save("report.md", report_text(result, comparison, figures).encode())
        runs.log_results(result)
        run_dir.finish(result.to_dict())
    worth_opening = [path_from_here(run_dir.path / file) for file in ("report.md", *figures)]
    say("\nWorth opening:\n  " + "\n  ".join(worth_opening))
    if result.failures:
        raise RunError("\n".join(result.failures.values()))
    if sweep and runs.mode != "online":
        raise RunError("The sweep did not get this trial, since W&B's server failed.")
    return result


def try_network(model_class: Callable[[], nn.Module], config: TrainingConfig) -> nn.Module:
    """Build a network, train it on two black images and evaluate it: what is wrong with it shows here, and at once.

    Raises
    ------
    ConfigurationError
        If it does not return logits (N, 10), or has nothing to train.
    Exception
        What the network itself raises, with its own line as the last of the traceback.
    """
    device = torch.device(name := resolve_device(config.device))
    precision = getattr(torch, resolve_precision(config.precision, name))

    def check(_network: nn.Module, _images: Any, logits: Any) -> None:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (2, 10):
            raise ConfigurationError(f"{model_class.__name__} must return logits (N, 10), got {found}")

    batches = [(torch.zeros(2, 1, 28, 28, device=device), torch.zeros(2, dtype=torch.int64, device=device))]
    try:
        network = build_network(model_class, device)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ConfigurationError(f"{model_class.__name__} must have parameters that can be trained, got none")
        handle = network.register_forward_hook(check)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        train_loop(batches, network, nn.CrossEntropyLoss(), optimizer, precision=precision)
        test_loop(batches, network, nn.CrossEntropyLoss(), precision)
        handle.remove()
    except ConfigurationError:
        raise
    except Exception as error:  # the user's own: whatever it is
        end_traceback_outside(error, torch.__path__[0], train_loop.__code__.co_filename, __file__)
        raise
    return network


def make_fits(model_class: Callable[[], nn.Module], config: TrainingConfig, dataset: Dataset) -> list[Fit]:
    """Return the final fit, which takes longest, and the folds.

    Raises
    ------
    ConfigurationError
        If the data set has too few images of a class for that many folds, or too few at all.
    """
    _check_folds(dataset, config.folds)
    device = resolve_device(config.device)
    final = Fit(
        name="final",
        model_class=model_class,
        dataset=config.dataset,
        data_dir=str(config.data_dir),
        data_digest=dataset.digest(),
        held_out=None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        mirror=config.mirror,
        rng_seed=config.rng_seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        threads=plan_workers(config.workers, config.folds + 1, device)[0],
    )
    folds = []
    labels = dataset.train_labels.numpy()
    splitter = StratifiedKFold(config.folds, shuffle=True, random_state=config.rng_seed)
    for number, (_, held) in enumerate(splitter.split(labels, labels), start=1):
        held_out = np.packbits(np.isin(np.arange(len(labels)), held)).tobytes()
        folds.append(replace(final, name=f"fold-{number}", held_out=held_out))
    return [final, *folds]


def _check_folds(dataset: Dataset, folds: int) -> None:
    labels, counts = dataset.train_labels.unique(return_counts=True)
    smallest, images = int(counts.argmin()), len(dataset.train_labels)
    if folds > int(counts[smallest]):  # int: a tensor compares no integer beyond 64 bits
        name = dataset.class_names[labels[smallest]]
        raise ConfigurationError(
            f"FOLDS must be at most {counts[smallest]}, the training images of the smallest class ({name}), got {folds}"
        )
    if images - -(-images // folds) < 2:
        raise ConfigurationError(
            f"FOLDS must leave at least 2 images to train on, but of {images} training images {folds} folds leave 1"
        )


def _train_all(
    fits: list[Fit], workers: int, executor: Executor | None, run_dir: RunDirectory, runs: WandbRuns
) -> dict[str, Checkpoint]:
    """Train all fits, side by side, an epoch of one at a time, from their checkpoints to their last epoch."""
    new: Checkpoint = {"state": None, "history": [], "evaluation": None, "failure": None}
    checkpoints = {fit.name: run_dir.load_checkpoint(fit.name) or new for fit in fits}
    for name, checkpoint in checkpoints.items():
        for metrics in checkpoint["history"]:
            runs.log_epoch(name, metrics)

    def epochs_done(fit: Fit) -> int:
        return len(checkpoints[fit.name]["history"])

    def is_pending(fit: Fit) -> bool:
        return not checkpoints[fit.name]["failure"] and epochs_done(fit) < fit.epochs

    waiting = deque(sorted(filter(is_pending, fits), key=epochs_done))
    futures: dict[Future[Any], Fit] = {}
    finished: SimpleQueue[Future[Any]] = SimpleQueue()  # not wait(): a Ctrl-C in it may leave futures locked for ever
    deaths = 0
    opened, in_flight = _open_pool(workers, executor, len(fits))
    with opened as pool, Progress(sum(fit.epochs for fit in fits), sum(map(epochs_done, fits))) as progress:
        progress.rows(_fold_histories(checkpoints))
        while waiting or futures:
            while waiting and len(futures) < in_flight:
                fit = waiting.popleft()
                future = _submit(pool, fit, epochs_done(fit) + 1, checkpoints[fit.name]["state"])
                futures[future] = fit
                future.add_done_callback(finished.put)
            future = finished.get()
            fit = futures.pop(future)
            try:
                state, metrics = future.result()
            except Exception as error:
                if not _is_the_pools_own(error, pool):
                    raise
                deaths += 1
                killed = "A worker process was killed, most likely because memory ran out"
                if deaths > MOST_WORKER_DEATHS:
                    raise RunError(f"{killed}, for the {deaths}th time. Set WORKERS lower.") from None
                warn(f"{killed}; what it had not finished is done again.")
                waiting.appendleft(fit)
                continue
            checkpoints[fit.name] = _next_checkpoint(checkpoints[fit.name], fit.name, state, metrics)
            run_dir.save_checkpoint(fit.name, checkpoints[fit.name])
            runs.log_epoch(fit.name, metrics)
            progress.step(fit.name, metrics)
            progress.rows(_fold_histories(checkpoints))
            if is_pending(fit):
                waiting.append(fit)
    return checkpoints


def _open_pool(workers: int, executor: Executor | None, fits: int) -> tuple[AbstractContextManager[Executor], int]:
    """Return where the epochs are computed, and how many of them may wait or be computed there at a time."""
    if executor is not None:
        return nullcontext(executor), fits
    if workers == 1:
        return ThisProcess(), 1
    return WorkerProcesses(workers), workers + 1  # one lies ready, so that no worker waits for its state to be sent


def _submit(pool: Executor, fit: Fit, epoch: int, state: State | None) -> Future[Any]:
    try:
        return pool.submit(run_epoch, fit, epoch, state)
    except Exception as error:  # an executor that was handed over may be broken, each in its own way
        raise RunError(f"{type(pool).__name__} takes no more work: {error}") from None


def _is_the_pools_own(error: Exception, pool: Executor) -> bool:
    """Return whether the executor failed, not the epoch: its errors come from its own package."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, BrokenExecutor) or package == type(pool).__module__.partition(".")[0]


def _fold_histories(checkpoints: dict[str, Checkpoint]) -> list[list[dict[str, float]]]:
    """Return the histories of the folds that have not diverged."""
    return [one["history"] for name, one in checkpoints.items() if name != "final" and not one["failure"]]


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
