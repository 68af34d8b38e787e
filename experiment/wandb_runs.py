"""Weights & Biases: the K + 1 runs and what is logged to them."""

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import wandb

from data_utils import PROJECT_DIR
from experiment.console import path_from_here, say, warn
from experiment.results import ExperimentResult, FitResult
from experiment.run_directory import RunDirectory
from experiment.wandb_key import ask_server, server_url
from experiment.wandb_sweep import Sweep

FINISH_TIMEOUT_SECONDS = 30
SWEEP_METRIC = "cross_validation/accuracy_mean"
FOLDER_VARIABLES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")


class WandbRuns:
    """The W&B runs of one experiment, one a fit, all open at once in this process.

    Nothing that W&B does ends the experiment. Where its server fails, the runs are written anew, offline and whole;
    where its folder does, in the experiment's own; where that fails too, the rest is not logged. A line says so. A
    sweep's trial is not written anew.

    Parameters
    ----------
    mode, key : str
        As `choose_mode` returns them.
    config : dict
        All settings, as they shall be logged.
    fit_names : list of str
        One run is opened for each.
    experiment : RunDirectory
        Names the group, and knows with which ids an earlier attempt opened the runs.
    sweep : Sweep, optional
        What the final run belongs to. It then gets the mean over the folds after each epoch, too.
    """

    def __init__(
        self,
        mode: str,
        key: str | None,
        config: dict[str, Any],
        fit_names: list[str],
        experiment: RunDirectory,
        sweep: Sweep | None = None,
    ) -> None:
        self.mode, self._key, self._config, self._experiment, self._sweep = mode, key, config, experiment, sweep
        self._history: dict[str, list[dict[str, Any]]] = {name: [] for name in fit_names}
        self._runs: dict[str, wandb.Run] = {}
        self._logged: dict[str, int] = {}  # rows of the history
        self._trained = self._finished = False
        self._folder = Path(os.environ.get("WANDB_DIR") or PROJECT_DIR)
        for variable in FOLDER_VARIABLES:  # else it writes in the user's home
            os.environ.setdefault(variable, str(self._folder / "wandb" / ".wandb"))
        if mode != "disabled" and not self._has_room():
            self._move()  # W&B would take a temporary folder
        os.environ.setdefault("WANDB_SILENT", "true")  # we say ourselves where the runs go
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would wait for a server that is gone
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", "10")
        self._try(lambda: None)  # opens them

    @property
    def ids(self) -> dict[str, str]:
        """The id of each fit's run."""
        return {name: run.id for name, run in self._runs.items()}

    def __enter__(self) -> "WandbRuns":
        """Say in one line where the runs are logged."""
        if self.mode == "offline":
            folder = path_from_here(self._folder / "wandb")
            say(f"W&B: offline, in {folder}; the command that uploads the runs comes at the end.")
        elif self.mode == "online":
            say(f"W&B: online, {self._runs['final'].project_url}")
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the runs of an experiment that was cut off; it goes on with the same ones if it is resumed."""
        if not self._finished:
            self._finish_all(1)
            self._say_how_to_upload()

    def log_epoch(self, fit_name: str, metrics: dict[str, Any]) -> None:
        """Log one epoch of a fit; ``metrics["epoch"]`` becomes the step."""
        self._history[fit_name].append(metrics)
        self._try(self._log_rows)

    def log_results(self, result: ExperimentResult) -> None:
        """Log what the fits came to, and close all runs.

        Each run gets loss, accuracy and averages, precision, recall and F1 of every class, these also as a table, and a
        confusion matrix; the final one also the cross-validation's summary, the figures, the mistakes and the model.
        """

        self._trained = True
        failed = [*result.failures, "final"] if self._sweep and result.failures else result.failures

        def log_and_close() -> None:
            if self.mode == "online" and (problem := ask_server(server_url(), self._key or "")):
                raise ConnectionError(problem)
            self._log_rows()
            for fit_result in [*result.folds, *([result.final] if result.final else [])]:
                _log_fit(self._runs[fit_result.name], fit_result)
            if not (self._sweep and result.failures):  # a mean over the other folds would be too good for the search
                means = {f"cross_validation/{name}": value for name, value in result.cross_validation.items()}
                self._runs["final"].summary.update(means)
            if result.final:
                _log_pictures_and_model(self._runs["final"], result, result.final)
            if error := self._finish_all(0, failed):
                raise error
            self._check_files()
            self._finished = True

        self._try(log_and_close)
        self._say_how_to_upload()

    def _try(self, step: Callable[[], None]) -> None:
        """Do something with W&B. As long as that fails, go one mode down, with all that was logged so far."""
        while self.mode != "disabled":
            try:
                if not self._runs:
                    self._open_all()
                return step()
            except Exception as error:  # of whatever type: for one, what the system's file operations raise
                self._go_down(str(error) if isinstance(error, ConnectionError) else type(error).__name__)

    def _go_down(self, reason: str) -> None:
        """Say what is lost, give the runs up, and let the next ones be opened in the next mode or folder."""
        folder = path_from_here(self._folder / "wandb")
        server_fails = self.mode == "online" and self._has_room()
        if self.mode == "online" and self._sweep:
            self.mode = "disabled"
            lost = f"{server_url() if server_fails else folder} fails ({reason}), so the sweep does not get this trial."
        elif server_fails:
            self.mode = "offline"
            lost = f"{server_url()} fails ({reason}), so this run is logged offline."
        elif self._folder != self._experiment.path:
            self.mode = "offline"
            self._move()
            where = path_from_here(self._folder / "wandb")
            lost = f"{folder} cannot be written ({reason}), so this run is logged offline, in {where}."
        else:
            self.mode = "disabled"
            lost = f"{folder} cannot be written ({reason}), so this run is not logged any more."
        warn(f"W&B: {lost}")
        self._finish_all(1)  # which takes a while where the server hangs
        self._runs = {}
        if self.mode == "offline":
            wandb.teardown()  # else W&B holds the ids of these runs for taken

    def _move(self) -> None:
        """Let W&B write into the experiment's own folder."""
        self._folder = self._experiment.path
        for variable in FOLDER_VARIABLES:
            os.environ[variable] = str(self._folder / "wandb" / ".wandb")

    def _has_room(self) -> bool:
        """Return whether W&B can write its files: permissions do not tell of a disk that is full."""
        try:
            for folder in (self._folder, Path(os.environ["WANDB_DATA_DIR"])):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(2**20))
        except OSError:
            return False
        return True

    def _check_files(self) -> None:
        """Raise if an offline run is not whole on the disk: W&B says nothing of what it cannot write while it logs."""
        folders = [Path(run.dir).parent for run in self._runs.values()]
        if self.mode == "offline" and not (all(list(each.glob("*.wandb")) for each in folders) and self._has_room()):
            raise OSError

    def _open_all(self) -> None:
        for name in self._history:
            self._runs[name] = run = self._open(name)
            self._logged[name] = max(0, run.step - 1)  # a resumed run's server has the epochs before run.step already
        self._log_rows()

    def _open(self, fit_name: str) -> wandb.Run:
        online, sweep = self.mode == "online", self._sweep if fit_name == "final" else None
        run = wandb.init(
            project=None if self._sweep else self._config["wandb_project_name"],  # None: the agent's
            id=sweep.run_id if sweep else f"{self._experiment.wandb_id}-{fit_name}",
            name=fit_name,
            group=self._experiment.path.name,
            job_type="final" if fit_name == "final" else "fold",
            config=self._config,
            mode="online" if online else "offline",
            dir=str(self._folder),
            reinit="create_new",
            resume="allow" if online and self._experiment.resumed else None,
            settings=wandb.Settings(
                api_key=self._key if online else None,
                base_url=server_url(),
                sweep_id=sweep.sweep_id if sweep else None,
                init_timeout=15,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                console="off",
                silent=True,
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
            rows = self._rows_in_a_sweep() if self._sweep and name == "final" else self._history[name]
            for metrics in rows[self._logged[name] :]:
                run.log(metrics, step=metrics["epoch"])
            self._logged[name] = max(self._logged[name], len(rows))

    def _rows_in_a_sweep(self) -> list[dict[str, Any]]:
        """Return the final fit's rows of the epochs that all have finished, with the mean over the folds."""
        final, *folds = self._history["final"], *(rows for name, rows in self._history.items() if name != "final")
        rows = [
            row | {SWEEP_METRIC: statistics.fmean(fold["validation/accuracy"] for fold in of_folds)}
            for row, *of_folds in zip(final, *folds, strict=False)
        ]
        return rows + (final[len(rows) :] if self._trained else [])  # where a fold diverged, some were held back

    def _finish_all(self, exit_code: int, failures: Iterable[str] = ()) -> BaseException | None:
        """Close all runs at once, those of the failures as failed; return what went wrong, if anything did."""
        codes = {name: 1 if name in failures else exit_code for name in self._runs}
        with ThreadPoolExecutor(max(1, len(self._runs))) as pool:
            futures = [pool.submit(run.finish, exit_code=codes[name]) for name, run in self._runs.items()]
        return next(filter(None, (future.exception() for future in futures)), None)

    def _say_how_to_upload(self) -> None:
        if self.mode == "offline":
            program = "wandb"
            if shutil.which(program) is None:  # not activated: the virtual environment's own
                program = path_from_here(Path(sys.executable).with_name("wandb"))
            folders = [path_from_here(Path(run.dir).parent) for run in self._runs.values()]
            command = " ".join([program, "sync", *(f'"{path}"' if " " in path else path for path in folders)])
            say(f"\nW&B: upload the runs with\n  {command}")


def _log_fit(run: wandb.Run, result: FitResult) -> None:
    report = {name: row for name, row in result.report.items() if isinstance(row, dict)}
    figures = ("precision", "recall", "f1-score")
    scalars = {f"{name}/{figure}": row[figure] for name, row in report.items() for figure in figures}
    run.summary.update(scalars | {"loss": result.loss, "accuracy": result.accuracy})
    per_class = wandb.Table(columns=["class", *figures, "support"])
    for name in result.classes:
        per_class.add_data(name, *(report[name][figure] for figure in (*figures, "support")))
    confusion = [
        [true, predicted, images]
        for true, row in zip(result.classes, result.confusion, strict=True)
        for predicted, images in zip(result.classes, row, strict=True)
    ]
    tables = {
        "per_class": per_class,
        "confusion_matrix": wandb.Table(["true class", "predicted class", "images"], confusion),
    }
    run.log(tables, step=len(result.history))


def _log_pictures_and_model(run: wandb.Run, result: ExperimentResult, final: FitResult) -> None:
    mistakes = wandb.Table(["image", "true class", "predicted class", "probability"])
    for mistake in result.mistakes:
        picture = wandb.Image(255 - mistake.image.numpy())
        mistakes.add_data(picture, mistake.true, mistake.predicted, mistake.probability)
    figures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(result.run_dir.glob("*.png"))}
    run.log({"mistakes": mistakes} | figures)
    metadata = {f"test/{name}": getattr(final, name) for name in ("loss", "accuracy", "report")}
    model = wandb.Artifact(f"{result.run_dir.name}-model", type="model", metadata=metadata)
    model.add_file(str(result.run_dir / "model.pt"))
    run.log_artifact(model)
