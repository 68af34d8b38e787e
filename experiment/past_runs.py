"""Finished runs read back from their folders: which of them a run is to be compared with, and in what two differ.

config.json and results.json are read as this version of the program writes them. Whatever does not fit (a run of an
older version, a damaged file, a folder that is no run at all) is passed over in a listing, and is one line where
somebody names it. The final fit is never read: the test images take no part in any comparison.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from data_utils import PROJECT_DIR, path_of
from experiment.errors import ConfigurationError
from experiment.network import same_answers
from experiment.run_directory import path_from_here
from experiment.settings import HYPERPARAMETERS

SCRIPTS = ("main_cnn.py", "main_tutorial.py")  # whose RUNS_DIR says where the runs lie
CONSTANTS = (*HYPERPARAMETERS, "device", "precision")  # those that say what is computed and how
SURROUNDINGS = ("threads", "torch")  # what else may move the last bits, and is no constant
ANSWERS_OTHERWISE = "answers otherwise (its code or initialisation)"
LONG = 40  # characters above which a layer is shown with its first arguments only
NAMES_SHOWN = 10  # of the folders that a name may mean
Model = TypeVar("Model", bound=BaseModel)


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True)


class Network(_Read):
    """What config.json holds of a network: what tells it from another."""

    name: str
    printed: str
    weights: int
    answers: list[float]


class Identity(_Read):
    """What config.json holds under "identity": all that a run's results depend on."""

    dataset: str
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
    network: Network


class _Config(_Read):
    identity: Identity


class _ReportRow(_Read):
    f1: FiniteFloat = Field(alias="f1-score")


class _Fold(_Read):
    name: str
    accuracy: FiniteFloat
    loss: FiniteFloat
    report: dict[str, _ReportRow | FiniteFloat]


class _Environment(_Read):
    started: datetime
    seconds: FiniteFloat
    resumed: bool


class _Results(_Read):
    folds: list[_Fold]
    failures: dict[str, str]
    environment: _Environment


@dataclass(frozen=True)
class FoldFigures:
    """What a fold came to: `f1` by the name of the class."""

    accuracy: float
    loss: float
    f1: dict[str, float]


@dataclass(frozen=True)
class PastRun:
    """A finished run.

    Attributes
    ----------
    path : Path
        Its folder.
    started : datetime
        In local time; of a run that was resumed, when it went on.
    seconds : float
        How long it took; of a run that was resumed, since it went on.
    resumed : bool
    identity : Identity
    folds : dict
        The folds that did not diverge, by name.
    diverged : list of str
        The names of those that did.
    """

    path: Path
    started: datetime
    seconds: float
    resumed: bool
    identity: Identity
    folds: dict[str, FoldFigures]
    diverged: list[str]

    @property
    def finished(self) -> datetime:
        """When it was done."""
        return self.started + timedelta(seconds=self.seconds)


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ.

    `name` is that of a constant, "threads", "torch", "network" as a whole, or "layer": a line of the printed network,
    where `old` or `new` is None if only one of them has it. It counts as so many `things`, which is one but for another
    class of network: that is told as one, but is as far away as all its lines.
    """

    name: str
    old: str | None
    new: str | None
    things: int = 1

    @property
    def text(self) -> str:
        """What became of it, without its name: ``64 → 256``, ``Dropout(p=0.5 → 0.2)``, ``− ReLU()``."""
        if self.old is None:
            return f"+ {_brief(str(self.new))}"
        if self.new is None:
            return f"− {_brief(self.old)}"
        return _shortest_change(self.old, self.new)


def default_runs_dirs() -> list[Path]:
    """Return the folders that RUNS_DIR names in the scripts, read from their text: this room lies below them.

    Raises
    ------
    ConfigurationError
        If a script's RUNS_DIR is not plainly a text.
    """
    found = []
    for script in SCRIPTS:
        path = PROJECT_DIR / script
        if path.is_file():
            found.append(path_of(_constant_in(path, "RUNS_DIR")))
    return list(dict.fromkeys(found)) or [PROJECT_DIR / "runs"]


def folders_in_words(folders: Sequence[Path]) -> str:
    """Return folders as a sentence names them: `runs`, or `runs and elsewhere`."""
    return " and ".join(path_from_here(folder) for folder in folders)


def _constant_in(script: Path, name: str) -> str:
    """Return the text that a script assigns to a constant."""
    try:
        statements = ast.parse(script.read_bytes()).body
    except SyntaxError as error:
        raise ConfigurationError(f"{script.name} has a mistake in line {error.lineno}: {error.msg}.") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            value = statement.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    raise ConfigurationError(f"{script.name} does not say {name} as plain text: give --runs-dir.")


def read_runs(*runs_dirs: Path) -> tuple[list[PastRun], list[str]]:
    """Return the finished runs in folders, the newest first, and why each other run there was passed over.

    What was not made by this program is passed over without a word.
    """
    runs, reasons = [], []
    for path in _folders_in(runs_dirs):
        if not (path / "config.json").exists():
            continue
        try:
            runs.append(read_run(path))
        except ConfigurationError as error:
            reasons.append(str(error))
    runs.sort(key=lambda run: (run.finished, run.path.name), reverse=True)
    return runs, reasons


def finished_runs(runs_dir: Path) -> list[PastRun]:
    """Return the finished runs in a folder, the newest first; whatever else lies there is passed over."""
    return read_runs(runs_dir)[0]


def _folders_in(runs_dirs: Sequence[Path]) -> list[Path]:
    folders = []
    for runs_dir in runs_dirs:
        folders += [path for path in sorted(runs_dir.glob("*")) if path.is_dir()]
    return folders


def find_run(name: str, *runs_dirs: Path) -> PastRun:
    """Return the run that a name means.

    A folder of that name, here or in `runs_dirs`; else the only one there whose name begins so, or has it in it. A
    time of day may have its colons, as the overview shows it.

    Raises
    ------
    ConfigurationError
        If it means none or several, or what it means is no finished run of this version.
    """
    for path in (Path(name), *(runs_dir / name for runs_dir in runs_dirs)):
        if path.is_dir():
            return read_run(path)
    part = name.replace(":", "")
    folders = _folders_in(runs_dirs)
    found = [path for path in folders if path.name.startswith(part)]
    if not found:
        found = [path for path in folders if part in path.name]
    if len(found) != 1:
        where = folders_in_words(runs_dirs)
        raise ConfigurationError(f"{name} must name one run, but in {where} it is part of:{_list_names(found)}")
    return read_run(found[0])


def _list_names(paths: list[Path]) -> str:
    if not paths:
        return " nothing"
    names = [path.name for path in paths[:NAMES_SHOWN]]
    if len(paths) > NAMES_SHOWN:
        names.append(f"… and {len(paths) - NAMES_SHOWN} more")
    return "".join(f"\n    {name}" for name in names)


def read_run(path: Path) -> PastRun:
    """Return the finished run in a folder.

    Raises
    ------
    ConfigurationError
        If there is none, or another version of this program wrote it; the message is one line.
    """
    where = path_from_here(path)
    if not (path / "config.json").exists():
        raise ConfigurationError(f"{where} is not a run: it has no config.json.")
    if not (path / "results.json").exists():
        raise ConfigurationError(f"{where} is unfinished: it has no results.json.")
    config = _read(path / "config.json", _Config)
    results = _read(path / "results.json", _Results)
    return _make_run(path, results, config.identity)


def as_run(path: Path, results: dict[str, Any], identity: dict[str, Any]) -> PastRun:
    """Return a run that is just ending, from what its results.json and its config.json hold.

    Raises
    ------
    ConfigurationError
        If that does not fit.
    """
    try:
        return _make_run(path, _Results.model_validate(results), Identity.model_validate(identity))
    except ValidationError as error:
        raise ConfigurationError(f"{path_from_here(path)} cannot be compared: {_reason(error)}.") from None


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = _reason(error)
    except OSError as error:
        reason = str(error.strerror)
    raise ConfigurationError(f"{path_from_here(path.parent)} cannot be compared: {path.name} {reason}.")


def _reason(error: ValidationError) -> str:
    """Return what is wrong with a file, for a sentence that begins with its name."""
    mistakes = error.errors(include_url=False, include_context=False)
    for mistake in mistakes:
        if mistake["type"] == "missing":
            lacks = ".".join(map(str, mistake["loc"]))
            return f"lacks {lacks} (an older version of this program wrote it)"
    place = ".".join(map(str, mistakes[0]["loc"]))
    return f"is damaged ({place + ': ' if place else ''}{mistakes[0]['msg']})"


def _make_run(path: Path, results: _Results, identity: Identity) -> PastRun:
    environment = results.environment
    return PastRun(
        path=path,
        started=environment.started.astimezone(),
        seconds=environment.seconds,
        resumed=environment.resumed,
        identity=identity,
        folds={fold.name: _figures_of(fold) for fold in results.folds},
        diverged=[name for name in results.failures if name.startswith("fold-")],
    )


def _figures_of(fold: _Fold) -> FoldFigures:
    f1 = {}
    for name, row in fold.report.items():
        if isinstance(row, _ReportRow) and not name.endswith(" avg"):
            f1[name] = row.f1
    return FoldFigures(fold.accuracy, fold.loss, f1)


def differences(before: PastRun, after: PastRun) -> list[Difference]:
    """Return all in which two runs differ: constants, threads, PyTorch's version, and lines of the printed network.

    Another class of network is one difference. So is a network of which only the answers differ.
    """
    found = []
    for name in (*CONSTANTS, *SURROUNDINGS):
        old, new = getattr(before.identity, name), getattr(after.identity, name)
        if old != new:
            shown = name.upper() if name in CONSTANTS else name
            found.append(Difference(shown, str(old), str(new)))
    return found + _network_differences(before.identity.network, after.identity.network)


def _network_differences(before: Network, after: Network) -> list[Difference]:
    lines = list(_changed_lines(_layers(before.printed), _layers(after.printed)))
    if before.name != after.name:
        weights = f"({before.weights:,} → {after.weights:,} weights)"
        return [Difference("network", before.name, f"{after.name} {weights}", things=max(1, len(lines)))]
    if lines:
        return [Difference("layer", old, new) for old, new in lines]
    if not same_answers(before.answers, after.answers):
        return [Difference("network", before.name, ANSWERS_OTHERWISE)]
    return []


def _layers(printed: str) -> list[str]:
    """Return the lines of a printed network without the layers' numbers, which shift when another is added before.

    A line that only closes a bracket stands for nothing.
    """
    lines = re.sub(r"(?m)^( *)\(\d+\): ", r"\1", printed).splitlines()
    return [line for line in lines if line.strip() != ")"]


def _changed_lines(before: list[str], after: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """Yield each line that was replaced, with what replaced it; None stands for one that is not there."""
    for kind, start, end, new_start, new_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        old, new = before[start:end], after[new_start:new_end]
        for old_line, new_line in zip_longest(old, new):
            yield old_line and old_line.strip(), new_line and new_line.strip()


def _shortest_change(old: str, new: str) -> str:
    """Return ``old → new``; of two layers of the same kind only what differs, as in ``Linear(3136, 256 → 512)``."""
    if new == ANSWERS_OTHERWISE:
        return new
    kind, sizes, options = _parts_of_layer(old)
    new_kind, new_sizes, new_options = _parts_of_layer(new)
    if kind != new_kind or len(sizes) != len(new_sizes) or not sizes + new_sizes + [*options, *new_options]:
        return f"{_brief(old)} → {_brief(new)}"
    shown = []
    for size, new_size in zip(sizes, new_sizes, strict=True):
        shown.append(size if size == new_size else f"{size} → {new_size}")
    for name in options | new_options:
        value, new_value = options.get(name), new_options.get(name)
        if value == new_value:
            continue
        if value is None:
            shown.append(f"+ {name}={new_value}")
        elif new_value is None:
            shown.append(f"− {name}={value}")
        else:
            shown.append(f"{name}={value} → {new_value}")
    return f"{kind}({', '.join(shown)})"


def _brief(layer: str) -> str:
    """Return a layer with its first two arguments, where all of them would be too long."""
    if len(layer) <= LONG:
        return layer
    kind, sizes, options = _parts_of_layer(layer)
    arguments = [*sizes, *(f"{name}={value}" for name, value in options.items())]
    return f"{kind}({', '.join([*arguments[:2], '…'])})" if len(arguments) > 2 else layer


def _parts_of_layer(line: str) -> tuple[str, list[str], dict[str, str]]:
    """Return a printed layer's kind, its sizes and its options by name; no more than the line where it is none.

    Those of ``Conv2d(32, 64, bias=False)`` are ``Conv2d``, ``["32", "64"]`` and ``{"bias": "False"}``.
    """
    match = re.fullmatch(r"((?:\(\w+\): )?\w+)\((.+)\)", line)
    if match is None:
        return line, [], {}
    sizes, options = [], {}
    for argument in re.split(r", (?![^(]*\))", match[2]):
        name, equals, value = argument.partition("=")
        if equals:
            options[name] = value
        else:
            sizes.append(argument)
    return match[1], sizes, options


def why_not_comparable(before: PastRun, after: PastRun) -> str | None:
    """Return why two runs cannot be compared, as one line; None if they can.

    They can if their folds are the same images, and at least two of them have a result in both.
    """
    reason = _other_images(before.identity, after.identity)
    if reason is None and len(before.folds.keys() & after.folds.keys()) < 2:
        reason = "fewer than two folds have a result in both"
    if reason is None:
        return None
    return f"{path_from_here(after.path)} cannot be compared with {path_from_here(before.path)}: {reason}."


def _other_images(before: Identity, after: Identity) -> str | None:
    if before.images == after.images:
        return None
    for name in ("dataset", "folds", "rng_seed"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            return f"other {name.upper()} ({new}, not {old}), so other images in each fold"
    return "other images in each fold: the data set on disk was another one"


def comparable(before: PastRun, after: PastRun) -> bool:
    """Return whether two runs can be compared, as `why_not_comparable` has it."""
    return why_not_comparable(before, after) is None


def nearest(run: PastRun, runs: Sequence[PastRun]) -> PastRun | None:
    """Return the comparable run from which a run differs in the fewest things, the newest of several.

    So whoever changes one thing at a time reads what that one thing did, after an undo as well.
    """
    others = [other for other in runs if other.path != run.path and comparable(other, run)]
    newest_first = sorted(others, key=lambda other: other.finished, reverse=True)
    return min(newest_first, key=lambda other: _things(differences(other, run)), default=None)


def _things(found: Sequence[Difference]) -> int:
    return sum(difference.things for difference in found)
