"""A run's folder: checkpoints, the lock, going on with an unfinished run, and nothing half-written."""

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import time
import uuid
import zipfile
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from experiment.console import path_from_here, say, warn
from experiment.errors import RunError, beside_the_run
from experiment.results import COMPUTED
from experiment.settings import TrainingConfig
from train_utils import Fit


class RunDirectory:
    """The folder of a run, ``<runs_dir>/<name>-<time>``: locked while the run lasts, and found again if it is cut off.

    Parameters
    ----------
    runs_dir : Path
    name : str
    settings : dict
        What was asked, for config.json.
    identity : dict
        All that the results depend on: a run goes on only with the checkpoints of one whose identity is the same.
    resume : bool
        Go on in the newest unfinished directory of the same identity that no other process is busy with.

    Raises
    ------
    OSError, RunError
        If the folder cannot be written.
    """

    def __init__(
        self, runs_dir: Path, name: str, settings: dict[str, Any], identity: dict[str, Any], resume: bool
    ) -> None:
        self._digest = hashlib.sha256(_to_json(identity)).hexdigest()
        runs_dir.mkdir(parents=True, exist_ok=True)
        found = self._find_unfinished(runs_dir, name) if resume else None
        self.resumed = found is not None
        self.path = found or self._make(runs_dir, name)
        if not self.resumed:
            identity = identity | {"digest": self._digest}
            self.save("config.json", _to_json(settings | {"identity": identity, "wandb_id": uuid.uuid4().hex[:8]}))
        self.wandb_id: str = json.loads((self.path / "config.json").read_text(encoding="utf-8"))["wandb_id"]
        for leftover in self.path.glob(".*.unfinished"):
            leftover.unlink()

    def _find_unfinished(self, runs_dir: Path, name: str) -> Path | None:
        for path in sorted(runs_dir.glob(f"{name}-*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                digest = json.loads(path.read_text(encoding="utf-8"))["identity"]["digest"]
            except (ValueError, KeyError, TypeError):  # not written by this program, or not by this version
                continue
            if digest == self._digest and self._lock_unfinished(path.parent):
                return path.parent
        return None

    def _lock_unfinished(self, path: Path) -> bool:
        if (path / "results.json").exists():
            return False
        self._lock = FileLock(path / ".lock")
        with beside_the_run("a lock"):  # not every network file system has them
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
        if (path / "results.json").exists():  # finished by another process between the two lines above
            self._unlock(path)
            return False
        return True

    def _unlock(self, path: Path) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):  # it could not be had, or is gone
            (path / ".lock").unlink()

    def _make(self, runs_dir: Path, name: str) -> Path:
        """Make and lock a new directory; two runs that start at once never share one."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = runs_dir / (stem if number == 1 else f"{stem}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        self._lock = FileLock(path / ".lock")
        with beside_the_run("a lock"):
            self._lock.acquire()
        return path

    def load_checkpoint(self, fit_name: str) -> dict[str, Any] | None:
        """Return the checkpoint of a fit; None if there is none or, with a warning, if it is damaged or not its own."""
        path = self.path / f"{fit_name}.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint is None or checkpoint["belongs_to"] != f"{fit_name} {self._digest}":
                raise ValueError("it is not what this run wrote")
        except Exception as error:  # a damaged file can raise anything, and the fit can always start over
            warn(f"{path_from_here(path)} cannot be used, so {fit_name} starts over: {error}")
            return None
        return checkpoint

    def save_checkpoint(self, fit_name: str, checkpoint: dict[str, Any]) -> None:
        """Save the checkpoint of a fit in the place of its last one."""
        self.save_tensors(f"{fit_name}.pt", checkpoint | {"belongs_to": f"{fit_name} {self._digest}"})

    def save_tensors(self, name: str, content: dict[str, Any]) -> None:
        """Save tensors and plain values as torch does."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.save(name, buffer.getvalue())

    def save(self, name: str, content: bytes) -> None:
        """Save a file in the place of what it was before."""
        save_atomically(self.path / name, content)

    def finish(self, results: dict[str, Any]) -> None:
        """Save results.json, which makes the run a finished one, and remove its checkpoints."""
        self.save("results.json", _to_json(results))
        for path in self.path.glob("*.pt"):
            if path.name != "model.pt":
                path.unlink()
        self._unlock(self.path)

    def __enter__(self) -> "RunDirectory":
        """Say which directory it is, where an earlier run goes on in it."""
        if self.resumed:
            say(f"Going on with the unfinished run in {path_from_here(self.path)} (RESUME = False starts anew).")
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Let others have the directory; after an error, say how to go on."""
        self._lock.release()
        if exception_type is not None:
            where = path_from_here(self.path)
            warn(f"Every finished epoch is in {where}: the same command, with RESUME = True, goes on.")


def identify(config: TrainingConfig, fit: Fit, network: nn.Module) -> dict[str, Any]:
    """Return all that a run's results depend on: its settings, what any of its fits says of them, and its network."""
    return {name: getattr(config, name) for name in COMPUTED} | {
        "device": fit.device,
        "precision": fit.precision,
        "threads": fit.threads,
        "data": fit.data_digest,
        "network": str(network),
        "source": _source_of(network),
        "torch": str(torch.__version__),
    }


def _source_of(network: nn.Module) -> str:
    """Return the source of all classes of the network that are not torch's own."""
    classes = {base for module in network.modules() for base in type(module).__mro__}
    own = [each for each in classes if each.__module__.partition(".")[0] not in ("torch", "builtins")]
    return "\n".join(sorted(map(_class_source, own)))


def _class_source(each: type) -> str:
    try:
        return inspect.getsource(each)
    except (OSError, TypeError):  # from an interactive shell or a notebook: what it was compiled to
        own = {name: value for name, value in vars(each).items() if callable(value) or not name.startswith("__")}
        return f"{each.__qualname__}: {[(name, _describe(own[name])) for name in sorted(own)]}"


def _describe(value: Any) -> str:
    """Return what a value is in words that are the same in two processes: no address, and a set's members in order."""
    if isinstance(value, property):
        value = (value.fget, value.fset)
    value = getattr(value, "__func__", value)  # of a class method or a static one
    if isinstance(value, FunctionType):
        value = (value.__code__, value.__defaults__, value.__kwdefaults__)
    if isinstance(value, CodeType):
        value = (value.co_name, value.co_code.hex(), value.co_names, value.co_varnames, value.co_consts)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_describe, value)))}}}"
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def save_atomically(path: Path, content: bytes) -> None:
    """Write a file on the disk for good: a temporary file beside it, fsync, rename.

    Whoever reads `path`, at any moment and after any crash, finds the old file whole or the new file whole.

    Raises
    ------
    RunError
        If it cannot be written, for one because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename, too, is only then on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise RunError(
            f"{path_from_here(path)} cannot be written ({error.strerror}). Make room, or mend that."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
