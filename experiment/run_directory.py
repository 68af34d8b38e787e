"""A run's folder: checkpoints, the lock, going on with an unfinished run, and nothing half-written."""

import contextlib
import io
import itertools
import json
import os
import re
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from experiment.console import say, warn
from experiment.errors import RunError, beside_the_run
from experiment.network import same_network


class RunDirectory:
    """The folder of a run, ``<runs_dir>/<name>-<time>``: locked while the run lasts, and found again if it is cut off.

    Parameters
    ----------
    runs_dir : Path
    name : str
        What cannot stand in a file's name is replaced.
    settings : dict
        What was asked, for config.json.
    identity : dict
        All that the results depend on: a run goes on only with the checkpoints of one whose identity is the same, but
        for what the machine does to the last digits of what the network answers.
    resume : bool
        Go on in the newest unfinished directory of the same identity that no other process is busy with.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """

    def __init__(
        self, runs_dir: Path, name: str, settings: dict[str, Any], identity: dict[str, Any], resume: bool
    ) -> None:
        self._checkpoints: dict[str, dict[str, Any]] = {}  # the last of each fit that was saved
        self._files: dict[str, bytes] = {}  # all others that were saved
        stem = re.sub(r"[^\w.\[\]()-]+", "_", name)
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            found = self._find_unfinished(runs_dir, stem, identity) if resume else None
            self.resumed = found is not None
            self.path = found or self._make(runs_dir, stem)
        except OSError as error:
            raise RunError(f"{path_from_here(runs_dir)} cannot be written ({error.strerror}). Mend that.") from None
        if not self.resumed:
            self.wandb_id: str = uuid.uuid4().hex[:8]
            self.save("config.json", _to_json(settings | {"identity": identity, "wandb_id": self.wandb_id}))

    def _find_unfinished(self, runs_dir: Path, stem: str, identity: dict[str, Any]) -> Path | None:
        begun = [path for path in runs_dir.glob("*/config.json") if path.parent.name.startswith(f"{stem}-")]
        for path in sorted(begun, key=_when_changed, reverse=True):
            try:
                content = path.read_bytes()
                config = json.loads(content.decode())
                wandb_id, is_same = config["wandb_id"], _same_identity(config["identity"], identity)
            except (OSError, ValueError, LookupError, TypeError):  # not written by this program, or by another version
                continue
            if wandb_id and is_same and self._lock_unfinished(path.parent):
                self.wandb_id = wandb_id
                self._files[path.name] = content
                for leftover in path.parent.glob(".*.unfinished"):
                    leftover.unlink()
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

    def _make(self, runs_dir: Path, stem: str) -> Path:
        """Make and lock a new directory; two runs that start at once never share one."""
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = runs_dir / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        self._acquire(path)
        return path

    def _acquire(self, path: Path) -> None:
        self._lock = FileLock(path / ".lock")
        with beside_the_run("a lock"):
            self._lock.acquire()

    def load_checkpoint(self, fit_name: str) -> dict[str, Any] | None:
        """Return the checkpoint of a fit; None if there is none or, with a warning, if it is damaged or not its own."""
        path = self.path / f"{fit_name}.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged:
                raise ValueError("it is damaged")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["belongs_to"] != self._owner(fit_name):
                raise ValueError("it is not what this run wrote")
        except Exception as error:  # a damaged file can raise anything, and the fit can always start over
            warn(f"{path_from_here(path)} cannot be used, so {fit_name} starts over: {error}")
            return None
        self._checkpoints[fit_name] = checkpoint
        return checkpoint

    def save_checkpoint(self, fit_name: str, checkpoint: dict[str, Any]) -> None:
        """Save the checkpoint of a fit in the place of its last one."""
        self._checkpoints[fit_name] = checkpoint
        self._write_checkpoint(fit_name)

    def _write_checkpoint(self, fit_name: str) -> None:
        content = self._checkpoints[fit_name] | {"belongs_to": self._owner(fit_name)}
        self._write(f"{fit_name}.pt", tensors_as_bytes(content))

    def _owner(self, fit_name: str) -> str:
        return f"{fit_name} {self.wandb_id}"

    def save(self, name: str, content: bytes) -> None:
        """Save a file in the place of what it was before.

        Raises
        ------
        RunError
            If it cannot be written.
        """
        self._files[name] = content
        self._write(name, content)

    def _write(self, name: str, content: bytes) -> None:
        if not self.path.is_dir():
            self._make_again()
        save_atomically(self.path / name, content)

    def _make_again(self) -> None:
        """Make the folder that somebody has deleted, with all that is still in memory."""
        warn(f"{path_from_here(self.path)} is gone: it is made again.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path_from_here(self.path)} cannot be made again ({error.strerror}).") from None
        self._lock.release(force=True)
        self._acquire(self.path)
        for name, content in self._files.items():
            self._write(name, content)
        for fit_name in self._checkpoints:
            self._write_checkpoint(fit_name)

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
        """Let others have the directory; after an error, say what is saved, and how to go on."""
        self._lock.release()
        if exception_type is None:
            return
        where = path_from_here(self.path)
        if list(self.path.glob("f*.pt")):  # of folds or of the final fit
            warn(f"Every finished epoch is in {where}: the same command, with RESUME = True, goes on.")
        else:
            warn("Not one epoch is saved: the same command starts from the beginning.")


def path_from_here(path: Path) -> str:
    """Return the path relative to the working directory, or as it is where that would be more roundabout."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the working directory is gone; or it is on another drive, on Windows
        return str(path)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative


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
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"{path_from_here(path)} cannot be written ({error.strerror}). Make room, or mend that."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Let a rename reach the disk, too, where the file system can do that for a folder: not every one does."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def tensors_as_bytes(content: dict[str, Any]) -> bytes:
    """Return tensors and plain values as the bytes of a file of torch's."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _same_identity(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two runs compute the same: all is equal, but what the network answers may differ a little."""
    if not isinstance(one, dict):  # another program's
        return False
    plain_one = {name: value for name, value in one.items() if name != "network"}
    plain_other = {name: value for name, value in other.items() if name != "network"}
    return plain_one == plain_other and same_network(one["network"], other["network"])


def _when_changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # somebody has deleted it meanwhile
        return 0.0


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
