"""The folder of one run: its files, its lock, and resuming an unfinished run."""

import contextlib
import io
import itertools
import pickle
import re
import shutil
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from data_files import resolve_path
from experiment.errors import RunError, nonfatal
from experiment.files import relative_to_cwd, to_json, write_atomically
from experiment.formatting import wrap
from experiment.identity import same_identity
from experiment.prepare import Experiment
from experiment.settings import TrainingConfig
from experiment.terminal import print_line, warn
from experiment.unfinished_runs import UnfinishedRun, find_mismatch, find_unfinished, folder_prefix


class RunDirectory:
    """The folder of a run, ``<runs_dir>/<network>-<data set>-<time>``, locked while the run lasts.

    With RESUME, it is the newest unfinished folder of the same identity that no other process has locked.

    Attributes
    ----------
    path : Path
    resumed : bool
        Whether the folder is that of an earlier, unfinished run.
    wandb_id : str
        The run's id: a part of the ids of its W&B runs, and in its checkpoints.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        runs_dir = resolve_path(config.runs_dir)
        prefix = folder_prefix(config, experiment.model.name)
        self.wandb_id = uuid.uuid4().hex[:8]
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            unfinished = find_unfinished(config, experiment.model.name) if config.resume else []
            same = self._lock_same(unfinished, experiment.identity)
            self.resumed = same is not None
            self.path = same or self._create(runs_dir, prefix)
        except OSError as error:
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise RunError(
                f"{relative_to_cwd(runs_dir)} cannot be written ({reason}). Fix the permissions or change RUNS_DIR."
            ) from None
        if not self.resumed:
            self._print_mismatch(config, experiment.identity, unfinished)
            try:
                self.save("config.json", to_json(experiment.config_record | {"wandb_id": self.wandb_id}))
            except BaseException as error:  # an interruption, too
                self.__exit__(type(error))
                raise

    def _lock_same(self, unfinished: list[UnfinishedRun], identity: dict[str, Any]) -> Path | None:
        """Lock and return the newest unfinished folder of the same identity, if there is one."""
        for run in unfinished:
            if same_identity(run.identity, identity) and self._lock_unfinished(run.path):
                self.wandb_id = run.wandb_id
                for leftover in run.path.glob(".*.unfinished"):
                    leftover.unlink()
                return run.path
        return None

    @staticmethod
    def _print_mismatch(config: TrainingConfig, identity: dict[str, Any], unfinished: list[UnfinishedRun]) -> None:
        """Print why an unfinished run of the same settings is not resumed, if the reason is this machine."""
        mismatch = find_mismatch(config, identity, unfinished)
        if mismatch:
            run, difference = mismatch
            print_line(
                wrap(
                    f"The unfinished run in {relative_to_cwd(run.path)} differs in {difference}, so this is a new run."
                )
            )

    def _lock_unfinished(self, path: Path) -> bool:
        """Lock a folder and return whether it is this process's now, and its run unfinished."""
        if (path / "results.json").exists():
            return False
        self._lock = FileLock(path / ".lock")
        with nonfatal("a lock"):  # some network file systems have none
            try:
                self._lock.acquire(timeout=1)  # the page of all runs tests locks for a moment
            except Timeout:
                return False
        if (path / "results.json").exists():  # another process finished it between the two lines above
            self._unlock(path)
            return False
        return True

    def _unlock(self, path: Path) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):
            (path / ".lock").unlink()

    def _create(self, runs_dir: Path, prefix: str) -> Path:
        """Create and lock a new folder; two runs that start in the same second get one each."""
        name = f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = runs_dir / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        self._lock = FileLock(path / ".lock")
        with nonfatal("a lock"):
            self._lock.acquire()
        return path

    def load_checkpoint(self, fit_name: str) -> dict[str, Any] | None:
        """Return the checkpoint of a fit; None if there is none or, with a warning, if it cannot be used."""
        path = self.path / f"{fit_name}.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not verify the checksums
            if damaged:
                raise ValueError("it is damaged")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["belongs_to"] != self._owner(fit_name):
                raise ValueError("it belongs to another run")
        except Exception as error:  # a damaged file can raise anything; the fit can always be trained again
            reason = str(error).partition("\n")[0]
            warn(f"{relative_to_cwd(path)} cannot be used, so {fit_name} starts from the beginning: {reason}")
            return None
        return checkpoint

    def save_checkpoint(self, fit_name: str, checkpoint: dict[str, Any]) -> None:
        """Save the checkpoint of a fit, replacing the previous one.

        Raises
        ------
        RunError
            If it cannot be written, or if it is a fit's first one and could not be loaded again.
        """
        content = serialize(checkpoint | {"belongs_to": self._owner(fit_name)})
        if len(checkpoint["history"]) == 1:
            _check_loadable(content)
        self.save(f"{fit_name}.pt", content)

    def _owner(self, fit_name: str) -> str:
        return f"{fit_name} {self.wandb_id}"

    def save(self, name: str, content: bytes) -> None:
        """Save a file, replacing the previous one of that name.

        Raises
        ------
        RunError
            If it cannot be written.
        """
        if not self.path.is_dir():
            raise RunError(f"{relative_to_cwd(self.path)} was deleted during the run. Run the same command again.")
        write_atomically(self.path / name, content)

    def finish(self, results: dict[str, Any]) -> None:
        """Save results.json, which marks the run as finished, and delete its checkpoints."""
        self.save("results.json", to_json(results))
        for path in self._checkpoints():
            path.unlink()
        self._unlock(self.path)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.path.glob("*.pt") if path.name != "model.pt"]

    def __enter__(self) -> "RunDirectory":
        """Print which run is resumed, if one is."""
        if self.resumed:
            print_line(
                f"Resuming the unfinished run in {relative_to_cwd(self.path)} (RESUME = False starts a new one)."
            )
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_exception: object) -> None:
        """Unlock the folder; after an error, print what is saved, or delete it if no epoch was finished."""
        was_deleted = not self.path.is_dir()
        if exception_type is not None and not was_deleted:
            where = relative_to_cwd(self.path)
            if (self.path / "results.json").exists():
                warn(f"All results are saved in {where}.")
            elif self._checkpoints():
                advice = "the same command, with RESUME = True, resumes the run."
                warn(f"Every finished epoch is saved in {where}: {advice}")
            else:  # deleted before it is unlocked, so that no other process resumes it
                shutil.rmtree(self.path, ignore_errors=True)
                warn("No epoch was finished, so nothing is saved: the same command starts from the beginning.")
        self._lock.release()


def _check_loadable(checkpoint: bytes) -> None:
    """Raise a RunError if a checkpoint contains an object that `torch.load` refuses to create."""
    try:
        torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) `?([\w.]+)", str(error))
        raise RunError(
            f"run_epoch in train_utils.py returned a state with {found[1] if found else 'an object'}, from which the "
            "run could not be resumed. Return tensors, numbers and strings, and lists and dicts of them: .item() "
            "converts NumPy's numbers."
        ) from None


def serialize(content: dict[str, Any]) -> bytes:
    """Return tensors and plain values as the content of a file that `torch.load` reads."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
