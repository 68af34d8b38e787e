"""Weights & Biases: the K + 1 runs and what is logged to them."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.console import say, warn
from experiment.errors import is_stop_of_an_agent
from experiment.results import ExperimentResult, FitResult
from experiment.run_directory import RunDirectory, path_from_here
from experiment.wandb_key import ask_server, server_url
from experiment.wandb_sweep import Sweep

if TYPE_CHECKING:  # it takes a second to import, so a function imports it that needs it
    import wandb

FINISH_TIMEOUT_SECONDS = 30
CACHE = ".cache"
SWEEP_METRIC = "cross_validation/accuracy_mean"


class WandbRuns:
    """The W&B runs of one experiment, one a fit, all open at once in this process, in a ``with`` statement.

    W&B writes into the run's folder and nowhere else, and leaves the process as it was. Nothing that it does ends the
    experiment: where logging online fails, the runs are written anew, offline and whole; where that fails too, the rest
    is not logged. A line says so. A sweep's trial is not written anew.

    Parameters
    ----------
    mode, key : str
        As `choose_mode` returns them.
    config : dict
        All settings, as they shall be logged.
    fit_names : list of str
        One run is opened for each.
    folder : RunDirectory
        Where W&B writes, in a folder ``wandb``. Its name is the group's, and it knows with which ids an earlier attempt
        opened the runs.
    sweep : Sweep, optional
        What the final run belongs to. It then gets the mean over the folds after each epoch, too.
    """

    def __init__(
        self,
        mode: str,
        key: str | None,
        config: dict[str, Any],
        fit_names: list[str],
        folder: RunDirectory,
        sweep: Sweep | None = None,
    ) -> None:
        self.mode, self._key, self._config, self._folder, self._sweep = mode, key, config, folder, sweep
        self._wandb_dir = folder.path / "wandb"
        self._history: dict[str, list[dict[str, Any]]] = {name: [] for name in fit_names}
        self._runs: dict[str, wandb.Run] = {}
        self._rows_logged: dict[str, int] = {}
        self._all_epochs_done = False
        self._closed = False
        self._surroundings = contextlib.ExitStack()

    @property
    def ids(self) -> dict[str, str]:
        """The id of each fit's run."""
        return {name: run.id for name, run in self._runs.items()}

    def upload_command(self) -> str | None:
        """Return the shell command that uploads all runs; None where they are not logged offline."""
        if self.mode != "offline":
            return None
        program = "wandb"
        if shutil.which(program) is None:  # not activated: the virtual environment's own
            program = path_from_here(Path(sys.executable).with_name("wandb"))
        folder = path_from_here(self._wandb_dir)
        if os.name == "nt":  # whose shell knows no single quotes, and leaves the star to the program
            return f'"{program}" sync "{folder}\\offline-run-*"'
        return f"{shlex.quote(program)} sync {shlex.quote(folder)}/offline-run-*"

    def __enter__(self) -> WandbRuns:
        """Open the runs, and say in one line where they are logged."""
        if self.mode == "disabled":
            return self
        self._surroundings.enter_context(_own_surroundings(self._wandb_dir))
        try:
            self._delete_files()  # of an earlier attempt: what it logged is logged again, but for what a server has
            self._attempt(self._log_rows)
        except BaseException:  # an interruption
            self.__exit__(None)
            raise
        if self.mode == "offline":
            where = path_from_here(self._wandb_dir)
            say(f"W&B: offline, in {where}; the command that uploads the runs comes at the end.")
        elif self.mode == "online":
            say(f"W&B: online, {self._runs['final'].project_url}")
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Close the runs of an experiment that was cut off, and say how to upload them."""
        try:
            if not self._closed:
                self._finish_all(1)
        finally:
            self._surroundings.close()
            self._delete_leftovers()
        command = None if exception_type is None else self.upload_command()
        if command:
            say(f"\nW&B: upload the runs with\n  {command}")

    def log_epoch(self, fit_name: str, metrics: dict[str, Any]) -> None:
        """Log one epoch of a fit; ``metrics["epoch"]`` becomes the step."""
        self._history[fit_name].append(metrics)
        self._attempt(self._log_rows)

    def log_results(self, result: ExperimentResult) -> None:
        """Log what the fits came to, and close all runs.

        Each run gets loss, accuracy and averages, precision, recall and F1 of every class, these also as a table, and a
        confusion matrix; the final one also the cross-validation's summary, the figures, the mistakes and the model.
        """
        self._all_epochs_done = True
        self._attempt(functools.partial(self._log_results_and_close, result))

    def _attempt(self, log: Callable[[], None]) -> None:
        """Log something. As long as that fails, go one mode down and log it there, after all that was logged before."""
        while self.mode != "disabled":
            try:
                if not self._runs:
                    self._open_all()
                log()
                return
            except Exception as error:  # of whatever type: for one, what the system's file operations raise
                if is_stop_of_an_agent(error):
                    raise
                self._go_down(error)

    def _go_down(self, error: Exception) -> None:
        """Say what is lost, give the runs up, and delete what they left, so that the next ones can be opened."""
        reason = type(error).__name__  # what W&B says besides may be long
        if isinstance(error, _ServerFailsError):
            reason = str(error)
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if self.mode == "offline":
            self.mode = "disabled"
            where = path_from_here(self._wandb_dir)
            warn(f"W&B: logging in {where} fails ({reason}), so this run is not logged any more.")
        elif self._sweep:
            self.mode = "disabled"
            warn(f"W&B: logging to {server_url()} fails ({reason}), so the sweep does not get this trial.")
        else:
            self.mode = "offline"
            warn(f"W&B: logging to {server_url()} fails ({reason}), so this run is logged offline.")
        self._finish_all(1)  # which takes a while where the server hangs
        self._runs = {}
        if not self._sweep:  # whose agent needs W&B's service
            _end_service()  # else W&B holds the ids of these runs for taken
        self._delete_files()  # the runs offline hold all of it; and results.json may need the room

    def _delete_files(self) -> None:
        shutil.rmtree(self._wandb_dir, ignore_errors=True)

    def _delete_leftovers(self) -> None:
        """Delete what no upload needs any more: the service's own files and, online, copies that have been sent."""
        shutil.rmtree(self._wandb_dir / CACHE, ignore_errors=True)
        if self.mode != "offline":
            shutil.rmtree(self._wandb_dir / "artifacts", ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self._wandb_dir.rmdir()

    def _open_all(self) -> None:
        for name in self._history:
            run = self._open(name)
            self._runs[name] = run
            self._rows_logged[name] = max(0, run.step - 1)  # a resumed run's server has the epochs before run.step

    def _open(self, fit_name: str) -> wandb.Run:
        import wandb

        online, sweep = self.mode == "online", self._sweep if fit_name == "final" else None
        run = wandb.init(
            project=None if self._sweep else self._config["wandb_project_name"],  # None: the agent's
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
                init_timeout=15,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                symlink=False,
                disable_git=True,  # W&B would upload the uncommitted diff, and with it a key in wandb_api_key.txt
                save_code=False,
                x_disable_stats=fit_name != "final",  # one look at the machine is enough for K + 1 runs
            ),
        )
        run.define_metric("*", step_metric="epoch")
        return run

    def _log_rows(self) -> None:
        """Log all that the runs do not have yet."""
        for name, run in self._runs.items():
            rows = self._history[name]
            if self._sweep and name == "final":
                rows = self._rows_in_a_sweep()
            for metrics in rows[self._rows_logged[name] :]:
                run.log(metrics, step=metrics["epoch"])
            self._rows_logged[name] = max(self._rows_logged[name], len(rows))

    def _rows_in_a_sweep(self) -> list[dict[str, Any]]:
        """Return the final fit's rows of the epochs that all have finished, with the mean over the folds."""
        final = self._history["final"]
        folds = [rows for name, rows in self._history.items() if name != "final"]
        rows = []
        for row, *of_folds in zip(final, *folds, strict=False):
            mean = statistics.fmean(fold["validation/accuracy"] for fold in of_folds)
            rows.append(row | {SWEEP_METRIC: mean})
        if self._all_epochs_done:  # where a fold diverged, some were held back
            rows += final[len(rows) :]
        return rows

    def _log_results_and_close(self, result: ExperimentResult) -> None:
        if self.mode == "online":
            problem = ask_server(server_url(), self._key or "")
            if problem:
                raise _ServerFailsError(problem)
        self._log_rows()
        for fold in result.folds:
            _log_fit(self._runs[fold.name], fold)
        if result.final:
            _log_fit(self._runs["final"], result.final)
            _log_pictures_and_model(self._runs["final"], result, result.final)
        failed = set(result.failures)
        if self._sweep and failed:
            failed.add("final")  # without a mean: that over the other folds would be too good for the search
        else:
            means = {f"cross_validation/{name}": value for name, value in result.cross_validation.items()}
            self._runs["final"].summary.update(means)
        error = self._finish_all(0, failed)
        if error:
            raise error
        self._closed = True

    def _finish_all(self, exit_code: int, failed: Iterable[str] = ()) -> Exception | None:
        """Close all runs at once, those that failed with status 1; return the first exception, if there is one."""
        failed = set(failed)

        def finish(name: str) -> Exception | None:
            try:
                self._runs[name].finish(exit_code=1 if name in failed else exit_code)
            except Exception as error:
                return error
            return None

        with ThreadPoolExecutor(max(1, len(self._runs))) as pool:
            errors = list(pool.map(finish, self._runs))
        return next((error for error in errors if error), None)


class _ServerFailsError(Exception):
    """The server does not answer as it should; the message says in which way."""


@contextlib.contextmanager
def _own_surroundings(wandb_dir: Path) -> Iterator[None]:
    """Let W&B write into that folder, where there is no argument to say so; then leave the process as it was.

    The next experiment in this process has a folder of its own, and may have other settings.
    """
    variables = {
        "WANDB_DATA_DIR": str(wandb_dir),  # for what artifacts are made of, until they are uploaded
        "WANDB_CACHE_DIR": str(wandb_dir / CACHE),
        "WANDB_SILENT": os.environ.get("WANDB_SILENT", "true"),  # we say ourselves where the runs go
        "WANDB_ERROR_REPORTING": os.environ.get(
            "WANDB_ERROR_REPORTING", "false"
        ),  # would wait for a server that is gone
        "WANDB_HTTP_TIMEOUT": os.environ.get("WANDB_HTTP_TIMEOUT", "10"),
    }
    if not _has_home():  # W&B asks where its folders in there would be, even if it is told others
        for name in ("WANDB_CONFIG_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            variables[name] = os.environ.get(name, str(wandb_dir / CACHE))
    before = {name: os.environ.get(name) for name in variables}
    hooks = (sys.exit, sys.excepthook)  # which each of W&B's service processes replaces
    in_use = _wandb_in_use()
    os.environ.update(variables)
    try:
        yield
    finally:
        try:
            if _wandb_in_use() is not in_use:  # else it serves an agent, a notebook, or a run of the user's own
                _end_service()
        finally:
            sys.exit, sys.excepthook = hooks
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:  # no HOME, and no entry in /etc/passwd
        return False
    return True


def _wandb_in_use() -> object:
    """Return W&B's settings of this process, which it makes when it is first used, and again after its end."""
    if "wandb" not in sys.modules:
        return None
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings_if_loaded


def _end_service() -> None:
    """End W&B's service process, and with it all that W&B knows of earlier runs."""
    if "wandb" not in sys.modules:
        return
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it exits where the service ended badly
        wandb.teardown()


def _log_fit(run: wandb.Run, result: FitResult) -> None:
    import wandb

    report = {name: row for name, row in result.report.items() if isinstance(row, dict)}
    figures = ("precision", "recall", "f1-score")
    scalars = {f"{name}/{figure}": row[figure] for name, row in report.items() for figure in figures}
    run.summary.update(scalars | {"loss": result.loss, "accuracy": result.accuracy})

    per_class = wandb.Table(columns=["class", *figures, "support"])
    for name in result.classes:
        per_class.add_data(name, *(report[name][figure] for figure in (*figures, "support")))
    confusion = wandb.Table(columns=["true class", "predicted class", "images"])
    for true, row in zip(result.classes, result.confusion, strict=True):
        for predicted, images in zip(result.classes, row, strict=True):
            confusion.add_data(true, predicted, images)
    run.log({"per_class": per_class, "confusion_matrix": confusion}, step=len(result.history))


def _log_pictures_and_model(run: wandb.Run, result: ExperimentResult, final: FitResult) -> None:
    import wandb

    mistakes = wandb.Table(columns=["image", "true class", "predicted class", "probability"])
    for mistake in result.mistakes:
        picture = wandb.Image(255 - mistake.image.numpy())
        mistakes.add_data(picture, mistake.true, mistake.predicted, mistake.probability)
    figures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(result.run_dir.glob("*.png"))}
    run.log({"mistakes": mistakes} | figures)

    metadata = {f"test/{name}": getattr(final, name) for name in ("loss", "accuracy", "report")}
    model = wandb.Artifact(f"{result.run_dir.name}-model", type="model", metadata=metadata)
    model.add_file(str(result.run_dir / "model.pt"), policy="immutable", skip_cache=True)  # uploaded from where it lies
    run.log_artifact(model)
