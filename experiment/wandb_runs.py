"""Weights & Biases: where the key comes from, online or offline, the K + 1 runs and what is logged to them."""

import codecs
import netrc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import wandb

from data_utils import PROJECT_DIR
from experiment.console import path_from_here, say, warn
from experiment.errors import ConfigurationError
from experiment.results import ExperimentResult, FitResult
from experiment.run_directory import RunDirectory

SERVER_TIMEOUT_SECONDS = 5
FINISH_TIMEOUT_SECONDS = 30


class WandbRuns:
    """The W&B runs of one experiment, one a fit, all open at once in this process.

    Nothing that W&B does ends the experiment. Where its server fails, the runs are written anew, offline and whole;
    where its files cannot be written either, the rest is not logged. A line says so.

    Parameters
    ----------
    mode, key : str
        As `choose_mode` returns them.
    config : dict
        All settings as they shall be logged; "wandb_project_name" is used too.
    fit_names : list of str
        One run is opened for each; "final" gets the job type "final", all others "fold".
    experiment : RunDirectory
        Its name is the group, and it says with which ids the runs were opened if this is not the first attempt.
    """

    def __init__(
        self, mode: str, key: str | None, config: dict[str, Any], fit_names: list[str], experiment: RunDirectory
    ) -> None:
        self.mode, self._key, self._config, self._experiment = mode, key, config, experiment
        self._history: dict[str, list[dict[str, Any]]] = {name: [] for name in fit_names}
        self._runs: dict[str, wandb.Run] = {}
        self._finished = False
        folder = Path(os.environ.get("WANDB_DIR") or PROJECT_DIR)
        self._folder = folder if os.access(folder, os.W_OK) else experiment.path  # W&B would take a temporary one
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):  # else it writes in the user's home
            os.environ.setdefault(variable, str(self._folder / "wandb" / ".wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")  # we say ourselves where the runs go
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would wait for a server that is gone
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", "10")
        self._try(self._open_all)

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
        self._try(lambda: self._log_row(fit_name, metrics))

    def log_results(self, result: ExperimentResult) -> None:
        """Log what the fits came to, and close all runs.

        Each run gets loss, accuracy and averages, precision, recall and F1 of every class, these also as a table, and a
        confusion matrix; the final one also the cross-validation's summary, the figures, the mistakes and the model.
        """

        def log_and_close() -> None:
            if self.mode == "online" and (problem := ask_server(server_url(), self._key or "")):
                raise ConnectionError(problem)
            for fit_result in [*result.folds, *([result.final] if result.final else [])]:
                _log_fit(self._runs[fit_result.name], fit_result)
            _log_experiment(self._runs["final"], result)
            if error := self._finish_all(0, result.failures):
                raise error
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
                self._finish_all(1)
                self._runs = {}
                reason = str(error) if isinstance(error, ConnectionError) else type(error).__name__
                self._go_down(reason)

    def _go_down(self, reason: str) -> None:
        if self.mode == "online":
            warn(f"W&B: {server_url()} fails ({reason}), so this run is logged offline.")
            wandb.teardown()  # else W&B holds the ids of these runs for taken
            self.mode = "offline"
        else:
            folder = path_from_here(self._folder / "wandb")
            warn(f"W&B: {folder} cannot be written ({reason}), so this run is not logged any more.")
            self.mode = "disabled"

    def _open_all(self) -> None:
        for name in self._history:
            self._runs[name] = self._open(name)
        for name, rows in self._history.items():
            for metrics in rows:
                self._log_row(name, metrics)

    def _open(self, fit_name: str) -> wandb.Run:
        online = self.mode == "online"
        run = wandb.init(
            project=self._config["wandb_project_name"],
            id=f"{self._experiment.wandb_id}-{fit_name}",
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

    def _log_row(self, fit_name: str, metrics: dict[str, Any]) -> None:
        run = self._runs[fit_name]
        if metrics["epoch"] >= run.step:  # a resumed run's server has the first epochs already
            run.log(metrics, step=metrics["epoch"])

    def _finish_all(self, exit_code: int, failures: Iterable[str] = ()) -> Exception | None:
        """Close all runs at once, those of the failures as failed; return what went wrong, if anything did."""

        def finish(name: str, run: wandb.Run) -> Exception | None:
            try:
                run.finish(exit_code=1 if name in failures else exit_code)
            except Exception as error:  # the server is gone, or the folder
                return error
            return None

        with ThreadPoolExecutor(max(1, len(self._runs))) as pool:
            errors = list(pool.map(finish, self._runs, self._runs.values()))
        return next(filter(None, errors), None)

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
    columns = ["class", *figures, "support"]
    per_class = wandb.Table(
        columns, [[name, *(report[name][column] for column in columns[1:])] for name in result.classes]
    )
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


def _log_experiment(final: wandb.Run, result: ExperimentResult) -> None:
    final.summary.update({f"cross_validation/{name}": value for name, value in result.cross_validation.items()})
    if result.final is None:
        return
    mistakes = wandb.Table(["image", "true class", "predicted class", "probability"])
    for mistake in result.mistakes:
        picture = wandb.Image(255 - mistake.image.numpy())
        mistakes.add_data(picture, mistake.true, mistake.predicted, mistake.probability)
    figures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(result.run_dir.glob("*.png"))}
    final.log({"mistakes": mistakes} | figures)
    metadata = {f"test/{name}": getattr(result.final, name) for name in ("loss", "accuracy", "report")}
    model = wandb.Artifact(f"{result.run_dir.name}-model", type="model", metadata=metadata)
    model.add_file(str(result.run_dir / "model.pt"))
    final.log_artifact(model)


def choose_mode(mode: str, key_path: Path) -> tuple[str, str | None]:
    """Return the W&B mode ("online", "offline" or "disabled") and, where it is online, the API key.

    The environment variable WANDB_MODE, W&B's own, wins over `mode`; "auto" is online with a key and offline without.

    Raises
    ------
    ConfigurationError
        If the mode is online and there is no key, what is there is no key, or the server refuses it; the message says
        where it was found, never what it is.
    """
    mode = {"dryrun": "offline"}.get(asked := os.environ.get("WANDB_MODE") or mode, asked)
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ConfigurationError(
            f"the environment variable WANDB_MODE must be online, offline or disabled, got {mode!r}"
        )
    if mode in ("offline", "disabled"):
        return mode, None
    base_url = server_url()
    key, source = find_api_key(key_path, base_url)
    if key is None and mode == "online":
        raise ConfigurationError(
            f'WANDB_MODE is "online", but no API key is in the environment variable WANDB_API_KEY, in {key_path} '
            'or in .netrc. Put your key into that file, or set WANDB_MODE = "offline".'
        )
    if key is None:
        return "offline", None
    if not re.fullmatch(r"[A-Za-z0-9_.-]{40,}", key):
        raise ConfigurationError(
            f"{source} does not hold an API key: one is a word of 40 or more letters and digits, on a line of its own "
            '(https://wandb.ai/authorize). Put yours there, or set WANDB_MODE = "offline".'
        )
    problem = ask_server(base_url, key)
    if problem == "refused":
        raise ConfigurationError(
            f"W&B at {base_url} refuses the API key from {source}. Put the right one there "
            '(https://wandb.ai/authorize), or set WANDB_MODE = "offline".'
        )
    if problem:
        warn(f"W&B: {base_url} does not answer as it should ({problem}), so this run is logged offline.")
        return "offline", None
    return "online", key


def server_url() -> str:
    """Return the server's address: W&B's own, unless WANDB_BASE_URL or W&B's settings file name another."""
    return (os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


def find_api_key(key_path: Path, base_url: str) -> tuple[str | None, str]:
    """Return the API key and where it was found: environment, key file, or what ``wandb login`` left.

    Blank lines and lines that start with ``#`` in the key file do not count. Quotes around the key, ``WANDB_API_KEY=``
    before it and the UTF-16 that PowerShell writes are no part of it.

    Raises
    ------
    ConfigurationError
        If there is a key file that cannot be read.
    """
    if key := _bare(os.environ.get("WANDB_API_KEY", "")):
        return key, "the environment variable WANDB_API_KEY"
    if key_path.exists():
        try:
            content = key_path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"WANDB_API_KEY_PATH: {key_path} cannot be read ({error.strerror})") from None
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = content.decode("utf-16" if wide else "utf-8-sig", errors="replace").splitlines()
        if key := next((_bare(line) for line in lines if _bare(line) and not line.strip().startswith("#")), None):
            return key, str(key_path)
    home = Path("~").expanduser()
    for path in [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            entry = netrc.netrc(path).authenticators(urlsplit(base_url).hostname or "")
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return entry[2], str(path)
    return None, ""


def _bare(line: str) -> str:
    """Return the key of a line that may be an assignment of it."""
    return re.sub(r"^(export |set |\$env:)?\s*WANDB_API_KEY\s*=", "", line.strip()).strip(" \t\"';")


def ask_server(base_url: str, key: str) -> str | None:
    """Return None if the server knows the key, "refused" if it refuses it, else what is wrong with the server."""
    try:
        answer = requests.post(
            f"{base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key),
            timeout=SERVER_TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        return type(error).__name__
    if answer.status_code in (401, 403):
        return "refused"
    return None if answer.status_code == 200 else f"HTTP status {answer.status_code}"
