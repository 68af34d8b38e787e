"""Unfinished runs on disk, and which of them a run can resume."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_files import dataset_label, resolve_path
from experiment.identity import KEPT_AT_RESUME, MACHINE_DEPENDENT, differing_parts
from experiment.settings import TrainingConfig


@dataclass(frozen=True)
class UnfinishedRun:
    """A run directory without results.json.

    Attributes
    ----------
    path : Path
    identity : dict
        As config.json stores it.
    wandb_id : str
        A part of the ids of its W&B runs.
    """

    path: Path
    identity: dict[str, Any]
    wandb_id: str


def folder_prefix(config: TrainingConfig, model_name: str) -> str:
    """Return the beginning of the names of a network's run directories: network and data set, without the time."""
    return re.sub(r"[^\w.\[\]()-]+", "_", f"{model_name}-{dataset_label(config.dataset)}") + "-"


def find_unfinished(config: TrainingConfig, model_name: str) -> list[UnfinishedRun]:
    """Return the unfinished runs of a network on the data set of a configuration, the newest first."""
    runs = []
    prefix = folder_prefix(config, model_name)
    runs_dir = resolve_path(config.runs_dir)
    if not os.path.isdir(runs_dir):  # Path.is_dir raises if the name is too long
        return []
    for path in sorted(runs_dir.glob("*/config.json"), key=_modification_time, reverse=True):
        if not path.parent.name.startswith(prefix) or (path.parent / "results.json").exists() or not path.is_file():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            differing_parts(record["identity"], record["identity"])  # raises if something is missing
            runs.append(UnfinishedRun(path.parent, record["identity"], str(record["wandb_id"])))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not written by this version
            continue
    return runs


def is_locked(path: Path) -> bool:
    """Return whether another process is training the run in a folder."""
    if not (path / ".lock").exists():
        return False
    try:
        with FileLock(path / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # some network file systems have no locks
        return False


def _modification_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def identity_to_resume(
    config: TrainingConfig, identity: dict[str, Any], unfinished: list[UnfinishedRun]
) -> dict[str, Any]:
    """Return the identity of the newest run that can be resumed, or the given one if there is none.

    A run that was begun with another number of threads, or with another precision that "auto" chose, is resumed with
    what it was begun with: a job may be started again on a machine with fewer cores or another processor.
    """
    allowed = {name for name in KEPT_AT_RESUME if name != "precision" or config.precision == "auto"}
    for run in unfinished:
        if differing_parts(run.identity, identity) <= allowed and not is_locked(run.path):
            return identity | {name: run.identity[name] for name in allowed}
    return identity


def find_mismatch(
    config: TrainingConfig, identity: dict[str, Any], unfinished: list[UnfinishedRun]
) -> tuple[UnfinishedRun, str] | None:
    """Return the newest run of the same settings that cannot be resumed on this machine, and what it differs in.

    For example ``torch (2.14.1, not 2.15.0)``.
    """
    decisive = {name for name in MACHINE_DEPENDENT if name != "device" or config.device == "auto"}
    for run in unfinished:
        different = differing_parts(run.identity, identity)
        if different & decisive and different <= decisive | {*KEPT_AT_RESUME, "fingerprint"}:
            names = [name for name in MACHINE_DEPENDENT if name in different]
            return run, " and ".join(f"{name} ({run.identity[name]}, not {identity[name]})" for name in names)
    return None
