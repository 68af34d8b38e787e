"""Weights & Biases: the K + 1 runs of an experiment, and what is logged to them."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from experiment.errors import ConfigurationError
from experiment.files import relative_to_cwd
from experiment.formatting import hide_keys
from experiment.plots import displayed_pixels
from experiment.results import ExperimentResult, FitResult
from experiment.run_directory import RunDirectory
from experiment.terminal import print_line, warn
from experiment.wandb_key import check_server, server_url

if TYPE_CHECKING:  # wandb takes a second to import, so only the functions that need it import it
    import wandb

    from experiment.prepare import Experiment

INIT_TIMEOUT_SECONDS = 15
FINISH_TIMEOUT_SECONDS = 30
FINISH_SECONDS_AFTER_SIGNAL = 10  # a cluster kills the process 30 seconds after SIGTERM
SWEEP_METRIC = "cross_validation/accuracy_mean"


class WandbRuns:
    """One W&B run per fit, all open at once in this process, in a ``with`` statement.

    W&B writes into the run's folder only, and environment and hooks of the process are restored. No failure of W&B ends
    the experiment. If logging online fails, all runs are logged again from the first epoch, offline; if that fails, the
    rest is not logged. Each of these prints one line. A trial of a sweep is not logged again.

    Parameters
    ----------
    experiment : Experiment
    folder : RunDirectory
        W&B writes into its subfolder ``wandb``. Its name is the group, and its `wandb_id` is part of each run's id, so
        that a resumed experiment continues the runs that it began.

    Attributes
    ----------
    mode : str
        "online", "offline" or "disabled".
    """

    def __init__(self, experiment: Experiment, folder: RunDirectory) -> None:
        self.mode = experiment.wandb.mode
        self._key = experiment.wandb.key
        self._sweep = experiment.wandb.sweep
        self._config = experiment.logged_config
        self._folder = folder
        self._wandb_dir = folder.path / "wandb"
        self._histories: dict[str, list[dict[str, Any]]] = {fit.name: [] for fit in experiment.fits}
        self._rows_logged: dict[str, int] = {}
        self._runs: dict[str, wandb.Run] = {}
        self._training_done = False
        self._closed = False
        self._restore = contextlib.ExitStack()

    @property
    def ids(self) -> dict[str, str]:
        """The id of each fit's run."""
        return {name: run.id for name, run in self._runs.items()}

    def upload_command(self) -> str | None:
        """Return the shell command that uploads what W&B's server does not have; None if there is nothing.

        What is logged online is uploaded by command only if the experiment is finished but the upload was interrupted:
        an experiment that is resumed logs all epochs again.
        """
        is_finished = (self._folder.path / "results.json").exists()
        if self.mode == "disabled" or (self.mode == "online" and (self._closed or not is_finished)):
            return None
        option, pattern = ("", "offline-run-*") if self.mode == "offline" else (" --no-skip-online", "run-*")
        program = "wandb"
        if shutil.which(program) is None:  # the virtual environment is not activated
            program = relative_to_cwd(Path(sys.executable).with_name("wandb"))
        folder = relative_to_cwd(self._wandb_dir)
        if os.name == "nt":  # its shell has no single quotes and does not expand the star, which wandb does itself
            return f'"{program}" sync{option} "{folder}\\{pattern}"'
        return f"{shlex.quote(program)} sync{option} {shlex.quote(folder)}/{pattern}"

    def __enter__(self) -> WandbRuns:
        """Open the runs, and print where they are logged.

        Raises
        ------
        ConfigurationError
            If W&B refuses one of its environment variables.
        """
        if self.mode == "disabled":
            return self
        self._restore.enter_context(_isolated_wandb(self._wandb_dir))
        try:
            _check_environment()
            self._delete_files()  # of an earlier attempt, whose epochs are logged again
            self._log_or_downgrade(self._log_new_rows)
        except BaseException:  # an interruption
            self.__exit__(None)
            raise
        if self.mode == "offline":
            where = relative_to_cwd(self._wandb_dir)
            print_line(f"W&B: offline, in {where}. The command that uploads the runs is printed at the end.")
        elif self.mode == "online":
            print_line(f"W&B: online, {self._runs['final'].project_url}")
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Close the runs if the experiment was interrupted, and print how to upload what they contain."""
        try:
            if not self._closed:
                self._finish_runs(exit_code=1, seconds=FINISH_SECONDS_AFTER_SIGNAL)
        finally:
            self._restore.close()
            self._delete_leftovers()
        command = self.upload_command()
        if exception_type is not None and command and any(self._histories.values()):
            print_line(f"\nW&B: upload the runs with\n  {command}")

    def log_epoch(self, fit_name: str, metrics: dict[str, Any]) -> None:
        """Log one epoch of a fit; ``metrics["epoch"]`` is the step."""
        self._histories[fit_name].append(metrics)
        self._log_or_downgrade(self._log_new_rows)

    def log_results(self, result: ExperimentResult) -> None:
        """Log the results of all fits, and close all runs.

        Each run gets loss, accuracy and averages, precision, recall and F1 per class, also as a table, and a confusion
        matrix. The final run also gets the cross-validation's summary, the figures, the mistakes and the model.
        """
        self._training_done = True
        self._log_or_downgrade(functools.partial(self._log_results_and_close, result))

    def _log_or_downgrade(self, log: Callable[[], None]) -> None:
        """Call `log` with all runs open; if that fails, do the same in the next mode: offline after online, then none.

        `log` must include `_log_new_rows`, which logs all earlier epochs to the new runs.
        """
        while self.mode != "disabled":
            try:
                if not self._runs:
                    self._open_runs()
                log()
                return
            except Exception as error:  # of any type: W&B passes on whatever its file operations raise
                self._downgrade_mode(error)

    def _downgrade_mode(self, error: Exception) -> None:
        """Print what failed, give up the open runs and delete their files, which the next mode writes again."""
        reason = type(error).__name__  # W&B's own messages are long
        if isinstance(error, _ServerError):
            reason = str(error)
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if self.mode == "offline":
            self.mode = "disabled"
            where, consequence = f"in {relative_to_cwd(self._wandb_dir)}", "this run is not logged any more"
        elif self._sweep:
            self.mode = "disabled"
            where, consequence = f"to {server_url()}", "the sweep does not get this trial"
        else:
            self.mode = "offline"
            where, consequence = f"to {server_url()}", "this run is logged offline"
        warn(f"W&B: logging {where} fails ({reason}), so {consequence}.")
        self._finish_runs(exit_code=1)
        self._runs = {}
        _stop_service()  # it would refuse to open runs with the same ids
        self._delete_files()  # which also frees the disk for results.json

    def _delete_files(self) -> None:
        shutil.rmtree(self._wandb_dir, ignore_errors=True)

    def _delete_leftovers(self) -> None:
        """Delete what no upload needs: the cache and, unless offline, the copies of uploaded artifacts."""
        shutil.rmtree(self._wandb_dir / ".cache", ignore_errors=True)
        if self.mode != "offline":
            shutil.rmtree(self._wandb_dir / "artifacts", ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty, or missing
            self._wandb_dir.rmdir()

    def _open_runs(self) -> None:
        for name in self._histories:
            run = self._open_run(name)
            self._runs[name] = run
            self._rows_logged[name] = max(0, run.step - 1)  # the server has the earlier rows of a resumed run

    def _open_run(self, fit_name: str) -> wandb.Run:
        import wandb

        online = self.mode == "online"
        sweep = self._sweep if fit_name == "final" else None
        run = wandb.init(
            project=None if self._sweep else self._config["wandb_project_name"],  # None: the sweep's project
            id=sweep.run_id if sweep else f"{self._folder.wandb_id}-{fit_name}",
            name=fit_name,
            group=self._folder.path.name,
            job_type="final" if fit_name == "final" else "fold",
            config=self._config,
            mode="online" if online else "offline",
            dir=str(self._folder.path),
            reinit="create_new",
            resume="allow" if online and self._folder.resumed else None,
            settings=wandb.Settings(
                api_key=self._key if online else None,
                base_url=server_url(),
                sweep_id=sweep.sweep_id if sweep else None,
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                symlink=False,
                disable_git=True,  # W&B would upload the uncommitted diff, with a key in wandb_api_key.txt
                save_code=False,
                x_disable_stats=fit_name != "final",  # the machine's load is the same for all runs
            ),
        )
        run.define_metric("*", step_metric="epoch")
        return run

    def _log_new_rows(self) -> None:
        """Log all epochs that the runs do not have yet."""
        for name, run in self._runs.items():
            rows = self._histories[name]
            if self._sweep and name == "final":
                rows = self._rows_with_sweep_metric()
            for metrics in rows[self._rows_logged[name] :]:
                run.log(metrics, step=metrics["epoch"])
            self._rows_logged[name] = max(self._rows_logged[name], len(rows))

    def _rows_with_sweep_metric(self) -> list[dict[str, Any]]:
        """Return the final fit's rows, with the mean over the folds, up to the last epoch that all fits completed."""
        final = self._histories["final"]
        folds = [history for name, history in self._histories.items() if name != "final"]
        completed = min(len(history) for history in [final, *folds])
        rows = []
        for epoch in range(completed):
            mean = statistics.fmean(history[epoch]["validation/accuracy"] for history in folds)
            rows.append(final[epoch] | {SWEEP_METRIC: mean})
        if self._training_done:  # if a fold diverged, the final fit has more epochs
            rows += final[completed:]
        return rows

    def _log_results_and_close(self, result: ExperimentResult) -> None:
        if self.mode == "online":  # without a server, W&B would block for 10 seconds per table
            problem = check_server(server_url(), self._key or "")
            if problem:
                raise _ServerError(problem)
        self._log_new_rows()
        for fold in result.folds:
            _log_fit(self._runs[fold.name], fold)
        if result.final:
            _log_fit(self._runs["final"], result.final)
            _log_images_and_model(self._runs["final"], result, result.final)
        failed = set(result.failures)
        if self._sweep and failed:
            failed.add("final")  # it then reports no mean: the mean over the other folds would mislead the search
        else:
            summary = {f"cross_validation/{name}": value for name, value in result.cross_validation.items()}
            self._runs["final"].summary.update(summary)
        errors = self._finish_runs(exit_code=0, failed=failed)
        if errors:
            raise errors[0]
        self._closed = True

    def _finish_runs(
        self, exit_code: int, failed: set[str] | None = None, seconds: float | None = None
    ) -> list[Exception]:
        """Close all runs in parallel, those that failed with exit code 1; return the exceptions.

        By default, W&B's own time limit holds; otherwise runs that are not closed after some seconds are given up.
        """
        errors: list[Exception] = []

        def finish(name: str) -> None:
            try:
                self._runs[name].finish(exit_code=1 if failed and name in failed else exit_code)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=finish, args=(name,), daemon=True) for name in self._runs]
        for thread in threads:
            thread.start()
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return errors


class _ServerError(Exception):
    """The server does not respond as expected; the message contains the reason."""


@contextlib.contextmanager
def _isolated_wandb(wandb_dir: Path) -> Iterator[None]:
    """Make W&B write into a folder and nowhere else; restore environment and hooks of the process at the end."""
    variables = {
        "WANDB_DATA_DIR": str(wandb_dir),  # for copies of artifacts
        "WANDB_CACHE_DIR": str(wandb_dir / ".cache"),
        "WANDB_SILENT": os.environ.get("WANDB_SILENT", "true"),
        "WANDB_ERROR_REPORTING": os.environ.get("WANDB_ERROR_REPORTING", "false"),  # it would wait for the server
        "WANDB_HTTP_TIMEOUT": os.environ.get("WANDB_HTTP_TIMEOUT", "10"),
        "WANDB_MODE": "online",  # "auto" is not W&B's; each run is opened with its own mode
    }
    before = {name: os.environ.get(name) for name in variables}
    hooks = (sys.exit, sys.excepthook)  # W&B replaces them whenever it starts its service
    os.environ.update(variables)
    try:
        yield
    finally:
        try:
            if not _user_has_open_run():
                _stop_service()
        finally:
            sys.exit, sys.excepthook = hooks
            for name, previous in before.items():
                if previous is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = previous


def _check_environment() -> None:
    """Raise a ConfigurationError for an environment variable that W&B refuses: it would not log offline, either."""
    import wandb

    for name, value in os.environ.items():
        if not name.startswith("WANDB_") or name == "WANDB_API_KEY":  # no message may contain the key
            continue
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
        except wandb.errors.UsageError as error:
            reason = str(error)
        else:
            continue
        raise ConfigurationError(hide_keys(f"W&B refuses the environment variable {name}, got {value!r}: {reason}"))


def _user_has_open_run() -> bool:
    """Return whether the caller has a W&B run of their own open in this process; runs of this module do not count."""
    return "wandb" in sys.modules and sys.modules["wandb"].run is not None


def _stop_service() -> None:
    """Stop W&B's service process, which also makes W&B forget the ids of all runs."""
    if "wandb" not in sys.modules:
        return
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # SystemExit: the service ended with an error
        wandb.teardown()


def _log_fit(run: wandb.Run, result: FitResult) -> None:
    """Log the metrics of one fit, the table of its classes and its confusion matrix."""
    import wandb

    metrics = ("precision", "recall", "f1-score")
    summary = {"loss": result.loss, "accuracy": result.accuracy}
    for name, row in result.report.items():
        if isinstance(row, dict):
            summary |= {f"{name}/{metric}": row[metric] for metric in metrics}
    run.summary.update(summary)

    per_class = wandb.Table(columns=["class", *metrics, "support"])
    for name in result.classes:
        row = result.report[name]
        per_class.add_data(name, *(row[metric] for metric in metrics), row["support"])
    confusion = wandb.Table(columns=["true class", "predicted class", "images"])
    for true, counts in zip(result.classes, result.confusion, strict=True):
        for predicted, images in zip(result.classes, counts, strict=True):
            confusion.add_data(true, predicted, images)
    run.log({"per_class": per_class, "confusion_matrix": confusion}, step=len(result.history))


def _log_images_and_model(run: wandb.Run, result: ExperimentResult, final: FitResult) -> None:
    """Log the most confident mistakes, the labels to check, the figures and the model."""
    import wandb

    mistakes = wandb.Table(columns=["image", "true class", "predicted class", "probability"])
    for mistake in result.mistakes:
        image = wandb.Image(displayed_pixels(mistake.image, result.is_light_on_dark))
        mistakes.add_data(image, mistake.true, mistake.predicted, mistake.probability)
    to_check = wandb.Table(columns=["image", "file or index", "label", "predicted class", "probability of the label"])
    for doubtful in result.doubtful_labels:
        image = wandb.Image(displayed_pixels(doubtful.image, result.is_light_on_dark))
        to_check.add_data(image, doubtful.name, doubtful.label, doubtful.predicted, doubtful.probability)
    figures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(result.run_dir.glob("*.png"))}
    run.log({"mistakes": mistakes, "labels_to_check": to_check} | figures)

    metadata = {f"test/{name}": getattr(final, name) for name in ("loss", "accuracy", "report")}
    model = wandb.Artifact(f"{result.run_dir.name}-model", type="model", metadata=metadata)
    model.add_file(str(result.run_dir / "model.pt"), policy="immutable", skip_cache=True)  # uploaded without a copy
    run.log_artifact(model)
