"""Atomic writes, JSON, and paths as messages show them."""

import errno
import json
import os
import re
import stat
from pathlib import Path

import pytest

from experiment.errors import RunError
from experiment.files import relative_to_cwd, to_json, write_atomically


@pytest.mark.parametrize(
    ("path", "shown"),
    [("here/runs/a", "runs/a"), ("beside/a", "../beside/a"), ("../a", None)],
)
def test_a_path_is_relative_unless_it_is_more_than_one_step_up(
    path: str, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    absolute = Path(os.path.normpath(tmp_path / path))
    assert relative_to_cwd(absolute) == (shown or str(absolute))


def test_a_path_is_absolute_if_the_working_directory_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert relative_to_cwd(tmp_path / "runs") == str(tmp_path / "runs")


def test_a_file_is_synced_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    steps: list[tuple[str, bytes]] = []
    fsync, replace = os.fsync, os.replace

    def sync(number: int) -> None:
        steps.append(("sync", path.read_bytes()))
        fsync(number)

    def replace_file(old: Path, new: Path) -> None:
        steps.append(("replace", path.read_bytes()))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace_file)
    write_atomically(path, b"new")
    assert steps == [("sync", b"old"), ("replace", b"old"), ("sync", b"new")]
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line_and_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", is_full)
    expected = f"{relative_to_cwd(path)} cannot be written (No space left on device). Free disk space"
    with pytest.raises(RunError, match=f"^{re.escape(expected)}"):
        write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [("file", b"old")]


def test_a_file_system_that_cannot_sync_folders_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def sync_files_only(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    content = to_json({"loss": [float("nan"), 1.5], "nested": {"rate": float("inf")}})
    assert json.loads(content) == {"loss": [None, 1.5], "nested": {"rate": None}}
