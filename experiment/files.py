"""Files that are written whole or not at all, and paths as messages show them."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from experiment.errors import RunError


def relative_to_cwd(path: Path) -> str:
    """Return a path relative to the working directory, or as it is if that is two or more folders up."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the working directory was deleted; or, on Windows, it is on another drive
        return str(path)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative


def to_json(content: dict[str, Any]) -> bytes:
    """Return a dict as the content of a JSON file, UTF-8; NaN and infinity, which JSON lacks, become null."""
    finite = _replace_non_finite(content)
    return (json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _replace_non_finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file through a temporary file beside it, fsync and rename.

    Any process that reads `path`, at any moment and after any crash, finds the complete old file or the complete new
    file.

    Raises
    ------
    RunError
        If it cannot be written, for example because the disk is full.
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
            f"{relative_to_cwd(path)} cannot be written ({error.strerror}). Free disk space or fix the permissions, "
            "and run the same command again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Write a rename to the disk, where the file system supports fsync for folders."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
