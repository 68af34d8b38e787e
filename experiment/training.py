"""The loop over epochs: submit each to the executor, save and log its result, repeat it if the executor failed."""

import contextlib
import math
import queue
from collections import Counter
from concurrent.futures import Executor, Future
from typing import Any

import torch

import train_utils
from experiment.errors import RunError, end_traceback_at_user_code
from experiment.executors import WorkerDiedError, submit
from experiment.prepare import Experiment
from experiment.report import Report
from experiment.run_directory import RunDirectory, serialize
from experiment.terminal import Progress, warn
from experiment.wandb_logging import WandbRuns
from train_utils import Fit, Metrics, RemoteError, State, call_safely

MAX_RETRIES = 3  # times that the same epoch may be lost, for example because a worker is killed
Checkpoint = dict[str, Any]  # "state", "history", "evaluation" after the last epoch, "failure" if the fit diverged


def train_all(
    experiment: Experiment, pool: Executor, folder: RunDirectory, runs: WandbRuns, report: Report
) -> dict[str, Checkpoint]:
    """Train all fits concurrently, from their checkpoints to their last epoch, and save the final model.

    Returns
    -------
    dict
        The last checkpoint of each fit, by name.

    Raises
    ------
    RunError
        If the executor fails again and again, or a checkpoint cannot be saved.
    Exception
        Whatever the network raises.
    """
    fits = experiment.fits
    checkpoints = _load_checkpoints(fits, folder, runs)
    waiting = [fit for fit in fits if _is_unfinished(fit, checkpoints[fit.name])]
    waiting.sort(key=lambda fit: _epochs_done(checkpoints[fit.name]))
    running: dict[Future[Any], Fit] = {}
    completed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    retries: Counter[str] = Counter()  # of the epoch that each fit is in
    with Progress([fit.name for fit in fits], experiment.config.epochs) as progress:
        diverged = [name for name, checkpoint in checkpoints.items() if checkpoint["failure"]]
        progress.begin({name: checkpoint["history"] for name, checkpoint in checkpoints.items()}, diverged)
        report.begin(checkpoints)
        try:
            while waiting or running:
                while waiting and len(running) < _max_in_flight(experiment):
                    fit = waiting.pop(0)
                    running[_submit_epoch(pool, fit, checkpoints[fit.name], completed)] = fit
                future = _wait_for_next(completed, report)
                fit = running.pop(future)
                if _executor_failed(future):
                    retries[fit.name] += 1
                    _report_executor_failure(future, fit, experiment, retries[fit.name])
                    waiting.insert(0, fit)
                    continue
                del retries[fit.name]
                state, metrics = _get_result(future)
                checkpoint = _next_checkpoint(checkpoints[fit.name], fit, state, metrics)
                checkpoints[fit.name] = checkpoint
                folder.save_checkpoint(fit.name, checkpoint)
                runs.log_epoch(fit.name, checkpoint["history"][-1])
                all_folds_done = progress.step(
                    fit.name, checkpoint["history"][-1], diverged=checkpoint["failure"] is not None
                )
                if all_folds_done:
                    report.update(checkpoints, progress.seconds_left())
                if _is_unfinished(fit, checkpoint):
                    waiting.append(fit)
        finally:
            for future in running:  # after an error or Ctrl-C: an executor that was passed in would continue
                future.cancel()
    if not checkpoints["final"]["failure"]:
        folder.save("model.pt", serialize(checkpoints["final"]["state"]["model"]))
    return checkpoints


def _load_checkpoints(fits: list[Fit], folder: RunDirectory, runs: WandbRuns) -> dict[str, Checkpoint]:
    """Return the checkpoints on disk, or new ones, and log their epochs to this process's W&B runs."""
    checkpoints = {}
    for fit in fits:
        new: Checkpoint = {"state": None, "history": [], "evaluation": None, "failure": None}
        checkpoints[fit.name] = folder.load_checkpoint(fit.name) or new
        for metrics in checkpoints[fit.name]["history"]:
            runs.log_epoch(fit.name, metrics)
    return checkpoints


def _epochs_done(checkpoint: Checkpoint) -> int:
    return len(checkpoint["history"])


def _is_unfinished(fit: Fit, checkpoint: Checkpoint) -> bool:
    return not checkpoint["failure"] and _epochs_done(checkpoint) < fit.epochs


def _max_in_flight(experiment: Experiment) -> int:
    """Return how many epochs may be submitted before the first of them is done."""
    if experiment.executor_name is not None:
        return len(experiment.fits)
    workers = experiment.resources.workers
    return 1 if workers == 1 else workers + 1  # one more, for the worker that is idle while this process saves


def _submit_epoch(
    pool: Executor, fit: Fit, checkpoint: Checkpoint, completed: queue.SimpleQueue[Future[Any]]
) -> Future[Any]:
    future = submit(pool, call_safely, train_utils.run_epoch, fit, _epochs_done(checkpoint) + 1, checkpoint["state"])
    future.add_done_callback(completed.put)
    return future


def _wait_for_next(completed: queue.SimpleQueue[Future[Any]], report: Report) -> Future[Any]:
    """Return the next future that is done; until then, the report shows that the run is still running."""
    while True:  # `concurrent.futures.wait` can leave futures locked after Ctrl-C
        with contextlib.suppress(queue.Empty):
            return completed.get(timeout=1)  # without a timeout, Windows does not deliver Ctrl-C
        report.keep_alive()


def _executor_failed(future: Future[Any]) -> bool:
    """Return whether the executor failed, not the epoch: `call_safely` returns the exceptions of the epoch."""
    return future.cancelled() or future.exception() is not None


def _report_executor_failure(future: Future[Any], fit: Fit, experiment: Experiment, retries: int) -> None:
    """Warn that an epoch is repeated because the executor failed; raise a RunError if it failed too often."""
    error = None if future.cancelled() else future.exception()
    if isinstance(error, WorkerDiedError):
        what = "A worker process was killed, most likely because memory ran out"
        advice = " Reduce WORKERS."
    else:
        reason = "it was cancelled" if error is None else repr(error)
        what = f"{experiment.executor_name or 'WorkerProcesses'} lost an epoch ({reason})"
        advice = ""
    if retries > MAX_RETRIES:
        raise RunError(f"{what}, {retries} times in the same epoch of {fit.name}.{advice}") from None
    warn(f"{what}; its epoch is repeated.")


def _get_result(future: Future[Any]) -> tuple[State, Metrics]:
    """Return what `run_epoch` returned; raise what it raised."""
    result = future.result()
    if isinstance(result, RemoteError):
        end_traceback_at_user_code(result.error, torch.__path__[0], str(train_utils.__file__))
        raise result.error
    return result


def _next_checkpoint(checkpoint: Checkpoint, fit: Fit, state: State, metrics: Metrics) -> Checkpoint:
    """Return the checkpoint after one more epoch; removes "evaluation" from the metrics."""
    _check_names(fit, metrics)
    evaluation = metrics.pop("evaluation", None)
    if evaluation is not None:
        loss, labels, probabilities = evaluation
        evaluation = _to_number("evaluation", loss), labels, probabilities
    metrics = {name: _to_number(name, value) for name, value in metrics.items()}
    return {
        "state": state,
        "history": [*checkpoint["history"], metrics],
        "evaluation": evaluation,
        "failure": _describe_divergence(fit, checkpoint["history"], metrics, evaluation),
    }


def _check_names(fit: Fit, metrics: Metrics) -> None:
    """Raise a RunError if `run_epoch` did not return a metric that the tables and the results need."""
    names = ["epoch", "train/loss", "train/accuracy"]
    names += ["validation/loss", "validation/accuracy"] if fit.held_out_mask is not None else []
    names += ["evaluation"] if metrics.get("epoch") == fit.epochs else []
    missing = [name for name in names if name not in metrics]
    if missing:
        raise RunError(
            f"run_epoch in train_utils.py did not return {', '.join(map(repr, missing))}, which the results need. "
            "Add that again and run the same command again."
        )


def _to_number(name: str, value: Any) -> float:
    """Return a metric as a Python number, whatever type `run_epoch` returns.

    Raises
    ------
    RunError
        If it is not a single number.
    """
    if name == "epoch":
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several elements
        raise RunError(
            f"run_epoch in train_utils.py returned the metric {name!r} as {type(value).__name__}: a metric must be a "
            "single number. Correct that and run the same command again."
        ) from None


def _describe_divergence(fit: Fit, history: list[Metrics], metrics: Metrics, evaluation: Any) -> str | None:
    """Return which loss of a fit is no longer finite, in one sentence; None if all are finite."""
    losses = {"training": metrics["train/loss"]}
    if "validation/loss" in metrics:
        losses["validation"] = metrics["validation/loss"]
    elif evaluation is not None:
        losses["test"] = evaluation[0]
    for name, loss in losses.items():
        if not math.isfinite(loss):
            last = f" (training loss after epoch {len(history)}: {history[-1]['train/loss']:.4g})" if history else ""
            return f"{fit.name} diverged in epoch {metrics['epoch']}: its {name} loss is {loss}{last}."
    return None
