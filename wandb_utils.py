"""Weights & Biases: where the key comes from, online or offline, the K + 1 runs and what is logged to them."""

import netrc
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import wandb
from wandb.errors import AuthenticationError

from report_utils import FIGURES, ExperimentResult, FitResult, RunDirectory, path_from_here

SERVER_TIMEOUT_SECONDS = 5
FINISH_TIMEOUT_SECONDS = 30


class WandbRuns:
    """The W&B runs of one experiment, one a fit, all open at once in this process.

    A server that goes away does not end the experiment: its runs are then written anew, offline and whole.

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
    project_dir : Path
        W&B's folder is made in it unless WANDB_DIR says otherwise.
    """

    def __init__(
        self,
        mode: str,
        key: str | None,
        config: dict[str, Any],
        fit_names: list[str],
        experiment: RunDirectory,
        project_dir: Path,
    ) -> None:
        self.mode = mode
        self.folder = Path(os.environ.get("WANDB_DIR", project_dir))
        if self.mode != "disabled":  # else W&B keeps what it stages for tables and images in the user's home
            for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
                os.environ.setdefault(variable, str(self.folder / "wandb" / ".wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")  # we say ourselves where the runs go
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would wait for a server that is gone
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", "10")
        self._key, self._config, self._experiment = key, config, experiment
        self._history: dict[str, list[dict[str, float]]] = {name: [] for name in fit_names}
        self._runs: dict[str, wandb.Run] = {}
        self._finished = False
        try:
            self._open_all()
        except wandb.errors.Error as error:
            if self.mode != "online":
                raise
            self._go_offline(type(error).__name__)

    def _open_all(self) -> None:
        self._runs = {}
        for name in self._history:
            self._runs[name] = self._open(name)

    def _open(self, fit_name: str) -> wandb.Run:
        online = self.mode == "online"
        run = wandb.init(
            project=self._config["wandb_project_name"],
            id=f"{self._experiment.wandb_id}-{fit_name}",
            name=fit_name,
            group=self._experiment.path.name,
            job_type="final" if fit_name == "final" else "fold",
            config=self._config,
            mode=self.mode,
            dir=str(self.folder),
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

    def _go_offline(self, reason: str) -> None:
        """Give the online runs up and write the same runs anew, offline, from their first epoch."""
        print(f"W&B: {server_url()} fails ({reason}), so this run is logged offline.", file=sys.stderr)
        self._finish_all(1)
        wandb.teardown()  # else W&B holds the ids of these runs for taken
        self.mode = "offline"
        self._open_all()
        for name, rows in self._history.items():
            for metrics in rows:
                self._runs[name].log(metrics, step=metrics["epoch"])

    @property
    def ids(self) -> dict[str, str]:
        """The id of each fit's run."""
        return {name: run.id for name, run in self._runs.items()}

    def __enter__(self) -> "WandbRuns":
        """Say in one line where the runs are logged."""
        if self.mode == "offline":
            folder = path_from_here(self.folder / "wandb")
            print(f"W&B: offline, in {folder}; the command that uploads the runs comes at the end.")
        elif self.mode == "online":
            print(f"W&B: online, {self._runs['final'].project_url}")
        return self

    def log_epoch(self, fit_name: str, metrics: dict[str, float]) -> None:
        """Log one epoch of a fit; ``metrics["epoch"]`` becomes the step."""
        self._history[fit_name].append(metrics)
        if metrics["epoch"] >= self._runs[fit_name].step:  # a resumed run's server has the first epochs already
            self._runs[fit_name].log(metrics, step=metrics["epoch"])

    def log_results(self, result: ExperimentResult) -> None:
        """Log what the fits came to, and close all runs.

        Each run gets loss, accuracy and averages, precision, recall and F1 of every class, these also as a table, and a
        confusion matrix; the final one also the cross-validation's summary, the figures, the mistakes and the model.
        """
        failure = ""
        if self.mode == "online":
            failure = ask_server(server_url(), self._key or "") or ""
            try:
                if not failure:
                    self._log_everything(result)
                    self._finished = not (failure := self._finish_all(0, result.failures))
            except wandb.errors.Error as error:
                failure = type(error).__name__
        if failure:
            self._go_offline(failure)
        if not self._finished:
            self._log_everything(result)
            self._finish_all(0, result.failures)
            self._finished = True
        self._say_how_to_upload()

    def _log_everything(self, result: ExperimentResult) -> None:
        for fit_result in [*result.folds, *([result.final] if result.final else [])]:
            _log_fit(self._runs[fit_result.name], fit_result)
        final = self._runs["final"]
        final.summary.update({f"cross_validation/{name}": value for name, value in result.cross_validation.items()})
        if result.final is None or self.mode == "disabled":
            return
        mistakes = wandb.Table(columns=["image", "true class", "predicted class", "probability"])
        for mistake in result.mistakes:
            picture = wandb.Image(255 - mistake.image.numpy())
            mistakes.add_data(picture, mistake.true, mistake.predicted, mistake.probability)
        figures = {Path(name).stem: wandb.Image(str(result.run_dir / name)) for name in FIGURES}
        final.log({"mistakes": mistakes} | {f"figures/{name}": image for name, image in figures.items()})
        artifact = wandb.Artifact(
            f"{result.run_dir.name}-model",
            type="model",
            metadata={f"test/{name}": getattr(result.final, name) for name in ("loss", "accuracy", "report")},
        )
        artifact.add_file(str(result.run_dir / "model.pt"))
        final.log_artifact(artifact)

    def _finish_all(self, exit_code: int, failures: Iterable[str] = ()) -> str:
        """Close all runs at once, those of the failures as failed; return what went wrong, if anything did."""

        def finish(name: str, run: wandb.Run) -> str:
            try:
                run.finish(exit_code=1 if name in failures else exit_code)
            except (wandb.errors.Error, TimeoutError) as error:  # the server is gone
                return type(error).__name__
            return ""

        with ThreadPoolExecutor(max(1, len(self._runs))) as pool:
            return max(pool.map(finish, self._runs, self._runs.values()), default="")

    def __exit__(self, *_exception: object) -> None:
        """Close the runs of an experiment that was cut off; it goes on with the same ones if it is resumed."""
        if not self._finished:
            self._finish_all(1)
            self._say_how_to_upload()

    def _say_how_to_upload(self) -> None:
        if self.mode == "offline":
            print(f"\nW&B: upload the runs with\n  {self._sync_command()}")

    def _sync_command(self) -> str:
        program = "wandb"
        if shutil.which(program) is None:  # not activated: the virtual environment's own
            program = path_from_here(Path(sys.executable).with_name("wandb"))
        directories = [path_from_here(Path(run.dir).parent) for run in self._runs.values()]
        return " ".join([program, "sync", *(f'"{path}"' if " " in path else path for path in directories)])


def _log_fit(run: wandb.Run, result: FitResult) -> None:
    report = {name: row for name, row in result.report.items() if isinstance(row, dict)}
    scalars = {"loss": result.loss, "accuracy": result.accuracy}
    for row_name, row in report.items():
        for figure in ("precision", "recall", "f1-score"):
            scalars[f"{row_name}/{figure}"] = row[figure]
    run.summary.update(scalars)
    columns = ["precision", "recall", "f1-score", "support"]
    per_class = wandb.Table(
        columns=["class", *columns],
        data=[[name, *(report[name][column] for column in columns)] for name in result.classes],
    )
    confusion = wandb.Table(
        columns=["true class", "predicted class", "images"],
        data=[
            [true, predicted, images]
            for true, row in zip(result.classes, result.confusion, strict=True)
            for predicted, images in zip(result.classes, row, strict=True)
        ],
    )
    run.log({"per_class": per_class, "confusion_matrix": confusion}, step=len(result.history))


def choose_mode(mode: str, key_path: Path) -> tuple[str, str | None]:
    """Return the W&B mode ("online", "offline" or "disabled") and the API key, if there is one.

    The environment variable WANDB_MODE, W&B's own, wins over `mode`; "auto" is online with a key and offline without.

    Raises
    ------
    wandb.errors.AuthenticationError
        If the mode is online and there is no key, or the server refuses it; the message says where the key was found,
        never what it is.
    """
    mode = {"dryrun": "offline"}.get(asked := os.environ.get("WANDB_MODE") or mode, asked)
    if mode not in ("auto", "online", "offline", "disabled"):
        raise AuthenticationError(
            f"the environment variable WANDB_MODE must be online, offline or disabled, got {mode!r}"
        )
    base_url = server_url()
    key, source = find_api_key(key_path, base_url)
    if mode == "online" and key is None:
        raise AuthenticationError(
            f'WANDB_MODE is "online", but no API key is in the environment variable WANDB_API_KEY, in {key_path} '
            'or in .netrc. Put your key into that file, or set WANDB_MODE = "offline".'
        )
    if mode in ("offline", "disabled") or key is None:
        return ("offline" if mode == "auto" else mode), key
    problem = ask_server(base_url, key)
    if problem == "refused":
        raise AuthenticationError(
            f"W&B at {base_url} refuses the API key from {source}. Put the right one there "
            '(https://wandb.ai/authorize), or set WANDB_MODE = "offline".'
        )
    if problem:
        print(
            f"W&B: {base_url} does not answer as it should ({problem}), so this run is logged offline.", file=sys.stderr
        )
        return "offline", key
    return "online", key


def server_url() -> str:
    """Return the server's address: W&B's own, unless WANDB_BASE_URL or W&B's settings file name another."""
    return (os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


def find_api_key(key_path: Path, base_url: str) -> tuple[str | None, str]:
    """Return the API key and where it was found: environment, key file, or what ``wandb login`` left.

    Blank lines and lines that start with ``#`` in the key file do not count.
    """
    if key := os.environ.get("WANDB_API_KEY", "").strip():
        return key, "the environment variable WANDB_API_KEY"
    if key_path.is_file():
        lines = (line.strip() for line in key_path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
        if key := next((line for line in lines if line and not line.startswith("#")), None):
            return key, str(key_path)
    candidates = (
        [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / n for n in (".netrc", "_netrc")]
    )
    for path in candidates:
        try:
            entry = netrc.netrc(path).authenticators(urlsplit(base_url).hostname or "")
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return entry[2], str(path)
    return None, ""


def ask_server(base_url: str, key: str) -> str | None:
    """Return None if the server knows the key, "refused" if it refuses it, else what is wrong with the server."""
    try:
        answer = requests.post(
            f"{base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key.encode()),
            timeout=SERVER_TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        return type(error).__name__
    if answer.status_code in (401, 403):
        return "refused"
    return None if answer.status_code == 200 else f"HTTP status {answer.status_code}"
