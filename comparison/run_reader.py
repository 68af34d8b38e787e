"""Finished runs, read from their config.json and results.json.

The final fit is never read: test images take no part in any comparison.
"""

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from experiment.errors import ConfigurationError
from experiment.files import relative_to_cwd

MAX_NAMES = 10  # runs that the message on an ambiguous name lists
TIME_IN_NAME = re.compile(
    r"-(?P<date>\d{8})-(?P<time>\d{6})(-\d+)?$"
)  # of a run directory; the number if there are two in a second
Model = TypeVar("Model", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class NetworkRecord(_Record):
    """What config.json records of a network."""

    name: str
    printed: str
    parameters: int
    fingerprint: dict[str, list[float]]


class Identity(_Record):
    """Everything that a run's results depend on, from config.json."""

    dataset: str
    image_shape: tuple[int, int, int] = (1, 28, 28)
    class_sizes: dict[str, int] = {}
    folds: int
    epochs: int
    batch_size: int
    learning_rate: float
    lr_schedule: str
    mirror: bool
    rng_seed: int
    device: str
    precision: str
    threads: int
    torch: str
    images: str
    source: str = ""
    code: dict[str, str]
    network: NetworkRecord


class _Config(_Record):
    identity: Identity
    resume: bool = True


class _ReportRow(_Record):
    f1: FiniteFloat = Field(alias="f1-score")


class Fold(_Record):
    """The metrics of one fold."""

    name: str
    accuracy: FiniteFloat
    loss: FiniteFloat
    report: dict[str, _ReportRow | FiniteFloat]
    history: list[dict[str, float | None]] = []

    @property
    def f1(self) -> dict[str, float]:
        """The F1 score of each class."""
        rows = {name: row for name, row in self.report.items() if not name.endswith(" avg")}
        return {name: row.f1 for name, row in rows.items() if isinstance(row, _ReportRow)}

    @property
    def macro_f1(self) -> float:
        """The mean of the F1 scores of all classes."""
        row = self.report["macro avg"]
        return row.f1 if isinstance(row, _ReportRow) else row


class _Environment(_Record):
    started: datetime
    seconds: FiniteFloat
    resumed: bool


class _Results(_Record):
    folds: list[Fold]
    failures: dict[str, str]
    environment: _Environment


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes
    ----------
    path : Path
        The run directory.
    started : datetime
        In local time; when it was resumed, if it was.
    seconds : float
        Its duration; since it was resumed, if it was.
    resumed : bool
    identity : Identity
    folds : dict of str to Fold
        The folds that did not diverge, by name.
    diverged : list of str
        The names of those that did.
    """

    path: Path
    started: datetime
    seconds: float
    resumed: bool
    identity: Identity
    folds: dict[str, Fold]
    diverged: list[str]

    @property
    def finished(self) -> datetime:
        """When the run finished."""
        return self.started + timedelta(seconds=self.seconds)

    @property
    def created(self) -> datetime:
        """When the run was first started: the time in the folder's name or, if the user renamed it, `started`."""
        return time_in_name(self.path.name) or self.started


def read_runs(runs_dir: Path) -> tuple[list[FinishedRun], list[str]]:
    """Return all finished runs in a folder, the newest first, and why each other run cannot be read.

    Folders that are not runs are ignored.
    """
    runs, problems = [], []
    for path in run_folders(runs_dir):
        try:
            runs.append(read_run(path))
        except ConfigurationError as error:
            problems.append(str(error))
    runs.sort(key=lambda run: (run.finished, run.path.name), reverse=True)
    return runs, problems


def run_folders(runs_dir: Path) -> list[Path]:
    """Return the folders of all runs, finished or not, by name."""
    return [path for path in _subfolders(runs_dir) if os.path.isfile(path / "config.json")]


def find_run(name: str, runs_dir: Path) -> FinishedRun:
    """Return the run with the path or name `name`, or the only one in `runs_dir` whose name contains it.

    A time may be written with colons, as the overview shows it. The path of the result is that under which `read_runs`
    lists the run, however the user wrote it.

    Raises
    ------
    ConfigurationError
        If no run or several runs match, or if the run is not finished or was written by another version.
    """
    for path in (Path(name), runs_dir / name):
        if os.path.isdir(path):  # unlike Path.is_dir, it never raises
            return read_run(_resolve(path, runs_dir))
    found = _matches(name, _subfolders(runs_dir))
    if len(found) == 1:
        return read_run(found[0])
    where = display_path(runs_dir)
    if not found:
        raise ConfigurationError(f"No run in {where} has {name} in its name.")
    lines = [f"Several runs in {where} have {name} in their names:"]
    lines += [f"  {path.name}" for path in found[:MAX_NAMES]]
    if len(found) > MAX_NAMES:
        lines.append(f"  and {len(found) - MAX_NAMES} more")
    raise ConfigurationError("\n".join(lines))


def _resolve(path: Path, runs_dir: Path) -> Path:
    """Return a run directory's path as `read_runs` lists it or, if it is in another folder, as an absolute path."""
    absolute = Path(os.path.abspath(path))
    if os.path.isdir(runs_dir) and os.path.samefile(absolute.parent, runs_dir):
        return runs_dir / absolute.name
    return absolute


def _matches(name: str, paths: list[Path]) -> list[Path]:
    """Return the paths whose folder's name contains a name; a time with colons matches only the time of the run."""
    if re.fullmatch(r"\d\d:\d\d(:\d\d)?", name):
        digits = name.replace(":", "")
        matches = []
        for path in paths:
            created = TIME_IN_NAME.search(path.name)
            if created is not None and created["time"].startswith(digits):
                matches.append(path)
        return matches
    return [path for path in paths if name.replace(":", "") in path.name]


def shortest_names(runs: Iterable[FinishedRun], runs_dir: Path) -> dict[Path, str]:
    """Return a name for each run by which `find_run` finds it: its time of day, with seconds if needed, or its path."""
    folders = _subfolders(runs_dir)
    names = {}
    for run in runs:
        times = (f"{run.created:%H:%M}", f"{run.created:%H:%M:%S}")
        unique = [time for time in times if _matches(time, folders) == [run.path]]
        names[run.path] = unique[0] if unique else display_path(run.path)
    return names


def time_in_name(name: str) -> datetime | None:
    """Return the time in the name of a run directory; None if there is none."""
    match = TIME_IN_NAME.search(name)
    try:
        return datetime.strptime(match["date"] + match["time"], "%Y%m%d%H%M%S").astimezone() if match else None
    except ValueError:  # digits that are no time
        return None


def _subfolders(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # glob raises if the name is too long
        return []
    return [path for path in sorted(folder.glob("*")) if os.path.isdir(path)]


def read_run(path: Path) -> FinishedRun:
    """Return the finished run in a run directory.

    Raises
    ------
    ConfigurationError
        With one line, if there is none or if another version of this program wrote it.
    """
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        raise ConfigurationError(f"{display_path(path)} cannot be read (Permission denied).")
    if not os.path.exists(path / "config.json"):
        raise ConfigurationError(f"{display_path(path)} is not a run: it has no config.json.")
    if not os.path.exists(path / "results.json"):
        raise ConfigurationError(f"{display_path(path)} is unfinished: it has no results.json.")
    config = _read_json(path / "config.json", _Config)
    results = _read_json(path / "results.json", _Results)
    return _make_run(path, results, config.identity)


def read_identity(path: Path) -> Identity:
    """Return the identity of the run in a run directory, which may be unfinished.

    Raises
    ------
    ConfigurationError
        With one line, if another version of this program wrote it.
    """
    return _read_json(path / "config.json", _Config).identity


def read_resume(path: Path) -> bool:
    """Return RESUME of the run in a run directory, which may be unfinished; raises as `read_identity` does."""
    return _read_json(path / "config.json", _Config).resume


def as_run(path: Path, results: dict[str, Any], identity: dict[str, Any]) -> FinishedRun:
    """Return the run that is about to be saved in `path`.

    Parameters
    ----------
    path : Path
    results : dict
        The future content of results.json.
    identity : dict
        "identity" of config.json.

    Raises
    ------
    pydantic.ValidationError
        If one of them lacks something.
    """
    return _make_run(path, _Results.model_validate(results), Identity.model_validate(identity))


def display_path(path: Path) -> str:
    """Return a path for messages and figures; bytes that are not text become question marks."""
    return relative_to_cwd(path).encode(errors="replace").decode()


def _read_json(path: Path, model: type[Model]) -> Model:
    try:
        if path.is_fifo():
            raise OSError(errno.EINVAL, "it is a pipe")  # reading it would wait forever
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = _problem(error)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise ConfigurationError(f"{display_path(path.parent)} cannot be read: {path.name} {problem}.")


def _problem(error: ValidationError) -> str:
    """Return what is wrong with a file, as the end of a sentence that begins with its name."""
    problems = error.errors(include_url=False, include_context=False)
    for problem in problems:
        if problem["type"] == "missing":
            return f"lacks {_location(problem)} (written by another version of this program)"
    location = _location(problems[0])
    details = f"{location}: {problems[0]['msg']}" if location else problems[0]["msg"]
    return f"is damaged ({details})"


def _location(problem: Any) -> str:
    return ".".join(map(str, problem["loc"]))


def _make_run(path: Path, results: _Results, identity: Identity) -> FinishedRun:
    environment = results.environment
    return FinishedRun(
        path=path,
        started=environment.started.astimezone(),
        seconds=environment.seconds,
        resumed=environment.resumed,
        identity=identity,
        folds={fold.name: fold for fold in results.folds},
        diverged=[name for name in results.failures if name.startswith("fold-")],
    )
