"""The loop over epochs: each goes to an executor; what comes back is saved, logged, shown; what is lost, done again."""

import contextlib
import math
import queue
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from experiment.console import Progress, say, warn
from experiment.errors import RunError
from experiment.figures import GrowingCurves
from experiment.network import submit
from experiment.plan import Plan
from experiment.run_directory import RunDirectory, path_from_here
from experiment.wandb_runs import WandbRuns
from experiment.workers import ThisProcess, WorkerDiedError, WorkerProcesses
from train_utils import Failure, Fit, Metrics, State, attempt, run_epoch

MOST_LOST_TIMES = 3  # that an executor may lose the same epoch, as where a worker is killed, before a run is given up
Checkpoint = dict[str, Any]  # "state", "history", "evaluation" after the last epoch, "failure" if there was one


def open_pool(plan: Plan, executor: Executor | None) -> AbstractContextManager[Executor]:
    """Return where the epochs are computed; what was handed over is not closed at the end."""
    if executor is not None:
        return _handed_over(executor)
    return WorkerProcesses(plan.workers) if plan.workers > 1 else ThisProcess()


@contextmanager
def _handed_over(executor: Executor) -> Iterator[Executor]:
    """Lend an executor, without Dask's warning of each call of more than 10 MB: the CNN's state has 11, and must go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        yield executor


def train_all(
    fits: list[Fit], plan: Plan, pool: Executor, folder: RunDirectory, runs: WandbRuns
) -> dict[str, Checkpoint]:
    """Train all fits side by side, an epoch of one at a time, from their checkpoints to their last epoch.

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
    checkpoints = _load_checkpoints(fits, folder, runs)
    waiting = sorted(_unfinished(fits, checkpoints), key=lambda fit: _epochs_done(checkpoints[fit.name]))
    running: dict[Future[Any], Fit] = {}
    answered: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    lost: Counter[str] = Counter()  # how often the epoch that a fit is at was lost
    say(f"Watch it learn: from the second minute on, learning_curves.png grows in\n  {path_from_here(folder.path)}")
    curves = GrowingCurves(folder.save)
    with Progress([fit.name for fit in fits], fits[0].epochs) as progress:
        diverged = [name for name, checkpoint in checkpoints.items() if checkpoint["failure"]]
        progress.begin({name: checkpoint["history"] for name, checkpoint in checkpoints.items()}, diverged)
        try:
            while waiting or running:
                while waiting and len(running) < _most_at_once(plan, fits):
                    fit = waiting.pop(0)
                    checkpoint = checkpoints[fit.name]
                    future = submit(pool, attempt, run_epoch, fit, _epochs_done(checkpoint) + 1, checkpoint["state"])
                    running[future] = fit
                    future.add_done_callback(answered.put)
                future = _next_answer(answered)
                fit = running.pop(future)
                outcome = _outcome_of(future)
                if outcome is None:
                    lost[fit.name] += 1
                    _tell_of_lost_epoch(future, fit, plan, lost[fit.name])
                    waiting.insert(0, fit)
                    continue
                del lost[fit.name]
                state, metrics = outcome
                checkpoint = _next_checkpoint(checkpoints[fit.name], fit, state, metrics)
                checkpoints[fit.name] = checkpoint
                folder.save_checkpoint(fit.name, checkpoint)
                runs.log_epoch(fit.name, metrics)
                all_folds_have_done_one = progress.step(fit.name, metrics, diverged=checkpoint["failure"] is not None)
                if all_folds_have_done_one:
                    curves.draw(progress.histories)
                if _is_unfinished(fit, checkpoint):
                    waiting.append(fit)
        finally:
            for future in running:  # after an error or a Ctrl-C: an executor that was handed over goes on otherwise
                future.cancel()
    return checkpoints


def _load_checkpoints(fits: list[Fit], folder: RunDirectory, runs: WandbRuns) -> dict[str, Checkpoint]:
    """Return the checkpoints on disk, new ones where there are none; log what was not logged in this process yet."""
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


def _unfinished(fits: list[Fit], checkpoints: dict[str, Checkpoint]) -> list[Fit]:
    return [fit for fit in fits if _is_unfinished(fit, checkpoints[fit.name])]


def _most_at_once(plan: Plan, fits: list[Fit]) -> int:
    """Return how many epochs are given to the executor before the first of them is done."""
    if plan.executor is not None:
        return len(fits)
    if plan.workers == 1:
        return 1
    return plan.workers + 1  # one more waits in the queue, for the worker that is done while this process still saves


def _next_answer(answered: queue.SimpleQueue[Future[Any]]) -> Future[Any]:
    """Return the next future that is done. (`concurrent.futures.wait` may leave futures locked after a Ctrl-C.)"""
    while True:
        with contextlib.suppress(queue.Empty):
            return answered.get(timeout=1)  # without a timeout, a Ctrl-C would have to wait on Windows


def _outcome_of(future: Future[Any]) -> tuple[State, Metrics] | None:
    """Return what `run_epoch` returned, None if the executor lost it; raise what the epoch itself raised."""
    if future.cancelled() or future.exception() is not None:
        return None
    outcome = future.result()
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


def _tell_of_lost_epoch(future: Future[Any], fit: Fit, plan: Plan, times: int) -> None:
    """Warn of an epoch that the executor lost; raise a RunError where it was lost too often."""
    error = None if future.cancelled() else future.exception()
    if isinstance(error, WorkerDiedError):
        what = "A worker process was killed, most likely because memory ran out"
        advice = " Set WORKERS lower."
    else:
        reason = "it was cancelled" if error is None else repr(error)
        what = f"{plan.executor or 'WorkerProcesses'} lost an epoch ({reason})"
        advice = ""
    if times > MOST_LOST_TIMES:
        raise RunError(f"{what}, for the {times}th time in the same epoch of {fit.name}.{advice}") from None
    warn(f"{what}; what it had not finished is done again.")


def _next_checkpoint(checkpoint: Checkpoint, fit: Fit, state: State, metrics: Metrics) -> Checkpoint:
    """Return the checkpoint after one more epoch; takes "evaluation" out of the metrics."""
    evaluation = metrics.pop("evaluation", None)
    return {
        "state": state,
        "history": [*checkpoint["history"], metrics],
        "evaluation": evaluation,
        "failure": _why_diverged(fit, checkpoint["history"], metrics, evaluation),
    }


def _why_diverged(fit: Fit, history: list[Metrics], metrics: Metrics, evaluation: Any) -> str | None:
    """Return what is known of a fit whose loss is no longer a finite number; None if all is well."""
    losses = {"training": metrics["train/loss"]}
    if "validation/loss" in metrics:
        losses["validation"] = metrics["validation/loss"]
    elif evaluation is not None:
        losses["test"] = evaluation[0]
    for name, loss in losses.items():
        if math.isfinite(loss):
            continue
        before = f", after {history[-1]['train/loss']:.4g} in training in epoch {len(history)}" if history else ""
        return f"{fit.name} diverged in epoch {metrics['epoch']}: its {name} loss is {loss}{before}."
    return None
