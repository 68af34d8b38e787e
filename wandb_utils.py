"""Weights & Biases: where the key comes from, online or offline, the K + 1 runs and what is logged to them."""

import netrc
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import wandb
from wandb.errors import AuthenticationError

from report_utils import path_from_here

SERVER_TIMEOUT_SECONDS = 5
FINISH_TIMEOUT_SECONDS = 30


class WandbRuns:
    """The W&B runs of one experiment, one a fit, all open at once in this process.

    Parameters
    ----------
    mode, key : str
        As `choose_mode` returns them.
    config : dict
        All settings as they shall be logged; "wandb_project_name" is used too.
    fit_names : list of str
        One run is opened for each; "final" gets the job type "final", all others "fold".
    group : str
        The experiment, as W&B groups its runs.
    project_dir : Path
        W&B's folder is made in it unless WANDB_DIR says otherwise.
    """

    def __init__(
        self,
        mode: str,
        key: str | None,
        config: dict[str, Any],
        fit_names: list[str],
        group: str,
        project_dir: Path,
    ) -> None:
        self.mode = mode
        self.folder = Path(os.environ.get("WANDB_DIR", project_dir))
        if self.mode != "disabled":  # else W&B keeps what it stages for tables and images in the user's home
            for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
                os.environ.setdefault(variable, str(self.folder / "wandb" / ".wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")  # we say ourselves where the runs go
        self._prefix, self._group, self._config = uuid.uuid4().hex[:8], group, config
        try:
            self._runs = {name: self._open(name, key) for name in fit_names}
        except wandb.errors.Error as error:
            if self.mode != "online":
                raise
            print(f"W&B: no run can be opened online ({type(error).__name__}); logging offline.", file=sys.stderr)
            self.mode = "offline"
            wandb.teardown()  # else W&B holds the ids of the runs that failed to open for taken
            self._runs = {name: self._open(name, None) for name in fit_names}

    def _open(self, fit_name: str, key: str | None) -> wandb.Run:
        run = wandb.init(
            project=self._config["wandb_project_name"],
            id=f"{self._prefix}-{fit_name}",
            name=fit_name,
            group=self._group,
            job_type="final" if fit_name == "final" else "fold",
            config=self._config,
            mode=self.mode,
            dir=str(self.folder),
            reinit="create_new",
            settings=wandb.Settings(
                api_key=key if self.mode == "online" else None,
                base_url=server_url(),
                init_timeout=15,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=False,
                console="off",
                silent=True,
                disable_git=True,  # W&B would upload the uncommitted diff, and with it a key in wandb_api_key.txt
                save_code=False,
                x_disable_stats=fit_name != "final",  # one look at the machine is enough for K + 1 runs
            ),
        )
        run.define_metric("*", step_metric="epoch")
        return run

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
        self._runs[fit_name].log(metrics, step=metrics["epoch"])

    def log_result(self, result: dict[str, Any], confusion: list[list[int]]) -> None:
        """Log what a fit came to: scalars into the summary, the per-class table, the confusion matrix.

        Parameters
        ----------
        result : dict
            ``name`` of the fit, ``loss``, ``accuracy``, ``history`` and ``report``, scikit-learn's as a dict.
        confusion : list of list of int
            Images by true class (row) and predicted class (column), in the order of the report's classes.
        """
        report = {name: row for name, row in result["report"].items() if isinstance(row, dict)}
        scalars = {"loss": result["loss"], "accuracy": result["accuracy"]}
        for row_name, row in report.items():
            for figure in ("precision", "recall", "f1-score"):
                scalars[f"{row_name}/{figure}"] = row[figure]
        classes = [name for name in report if not name.endswith(" avg")]
        per_class = wandb.Table(
            columns=["class", "precision", "recall", "f1-score", "support"],
            data=[
                [name, *(report[name][key] for key in ("precision", "recall", "f1-score", "support"))]
                for name in classes
            ],
        )
        matrix = wandb.Table(
            columns=["true class", "predicted class", "images"],
            data=[
                [true, predicted, confusion[row][column]]
                for row, true in enumerate(classes)
                for column, predicted in enumerate(classes)
            ],
        )
        run = self._runs[result["name"]]
        run.summary.update(scalars)
        try:
            run.log({"per_class": per_class, "confusion_matrix": matrix}, step=len(result["history"]))
        except wandb.errors.Error as error:  # tables ask the server, which may be gone by now
            print(f"W&B: the tables of {run.name} could not be logged ({type(error).__name__}).", file=sys.stderr)

    def log_summary(self, fit_name: str, values: dict[str, float]) -> None:
        """Add values to the summary of a fit's run."""
        self._runs[fit_name].summary.update(values)

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Close all runs; where they are offline, print the command that uploads them."""
        for run in self._runs.values():
            run.finish(exit_code=0 if exception_type is None else 1)
        if self.mode == "offline":
            print(f"W&B: upload the runs with\n  {self._sync_command()}")

    def _sync_command(self) -> str:
        program = "wandb"
        if shutil.which(program) is None:  # not activated: the virtual environment's own
            program = path_from_here(Path(sys.executable).with_name("wandb"))
        directories = [path_from_here(Path(run.dir).parent) for run in self._runs.values()]
        return " ".join([program, "sync", *(f'"{path}"' if " " in path else path for path in directories)])


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
    problem = _ask_server(base_url, key)
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


def _ask_server(base_url: str, key: str) -> str | None:
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
