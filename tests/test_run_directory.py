"""A run's folder: which one goes on, what is saved in it and how, and what is said of it."""

import errno
import json
import os
import re
import shutil
import stat
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from experiment.errors import RunError
from experiment.run_directory import RunDirectory, path_from_here, save_atomically


def unlike(network: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"network": network | changes, "epochs": 2}


NETWORK = {"name": "Dyn[3]", "printed": "Dyn()", "weights": 3, "answers": [1.0, -2.0]}


def directory(runs_dir: Path, identity: dict[str, Any], name: str = "Dyn[3]-Digits") -> RunDirectory:
    return RunDirectory(runs_dir, name, {}, identity, resume=True)


def test_a_class_whose_name_has_brackets_is_found_again(tmp_path: Path) -> None:
    first = directory(tmp_path, unlike(NETWORK))
    first.save_checkpoint("final", {"history": []})
    first.__exit__(KeyboardInterrupt, None, None)
    assert directory(tmp_path, unlike(NETWORK)).path == first.path


def test_a_folder_is_named_after_the_time_and_those_of_one_second_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = directory(tmp_path, unlike(NETWORK)).path.name
    began = datetime.strptime(name, "Dyn[3]-Digits-%Y%m%d-%H%M%S")
    assert abs(datetime.now() - began) < timedelta(minutes=1)
    monkeypatch.setattr(time, "strftime", lambda _: "20261126-183000")
    folders = [RunDirectory(tmp_path, "Net", {}, unlike(NETWORK), resume=False) for _ in range(3)]
    names = [folder.path.name for folder in folders]
    assert names == [f"Net-20261126-183000{number}" for number in ("", "-2", "-3")]


def test_a_run_that_is_going_on_is_left_to_its_process(tmp_path: Path) -> None:
    busy = directory(tmp_path, unlike(NETWORK))
    assert directory(tmp_path, unlike(NETWORK)).path != busy.path


def test_of_two_unfinished_runs_the_one_that_was_begun_last_goes_on(tmp_path: Path) -> None:
    folders = [RunDirectory(tmp_path, "Net", {}, unlike(NETWORK), resume=False) for _ in range(3)]
    for folder, when in zip(folders, (100, 300, 200), strict=True):
        folder.__exit__(None, None, None)
        os.utime(folder.path / "config.json", (when, when))
    again = directory(tmp_path, unlike(NETWORK), "Net")
    assert again.path == folders[1].path and again.wandb_id == folders[1].wandb_id


def test_an_unfinished_run_with_another_name_does_not_go_on(tmp_path: Path) -> None:
    for name in ("Network", "Ne"):
        directory(tmp_path, unlike(NETWORK), name).__exit__(None, None, None)
    assert not directory(tmp_path, unlike(NETWORK), "Net").resumed


def test_a_finished_run_keeps_its_network_and_neither_checkpoints_nor_its_lock(tmp_path: Path) -> None:
    folder = directory(tmp_path, unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"history": [1]})
    folder.save("model.pt", b"weights")
    folder.finish({"folds": []})
    assert {path.name for path in folder.path.iterdir()} == {"config.json", "model.pt", "results.json"}
    assert not directory(tmp_path, unlike(NETWORK)).resumed


def test_what_was_asked_is_saved_in_words_that_a_person_reads(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path, "Net", {"data_dir": "für/mich"}, {"epochs": 2}, resume=True)
    assert re.fullmatch("[0-9a-f]{8}", folder.wandb_id)
    assert (folder.path / "config.json").read_bytes().decode() == (
        '{\n  "data_dir": "für/mich",\n  "identity": {\n    "epochs": 2\n  },\n'
        f'  "wandb_id": "{folder.wandb_id}"\n}}\n'
    )


def test_no_number_that_json_does_not_know_gets_into_the_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory(tmp_path, unlike(NETWORK)).finish({"loss": float("nan")})


def test_what_a_crash_left_half_written_is_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    first = directory(tmp_path, unlike(NETWORK))
    first.__exit__(None, None, None)
    (first.path / ".fold-1.pt.123.unfinished").write_bytes(b"half")
    assert directory(tmp_path, unlike(NETWORK)).path == first.path
    assert {path.name for path in first.path.iterdir()} == {".lock", "config.json"}


def test_a_checkpoint_that_is_not_there_is_none_and_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert directory(tmp_path, unlike(NETWORK)).load_checkpoint("fold-1") is None
    assert capsys.readouterr().err == ""


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    folder = directory(tmp_path, unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"state": torch.arange(3.0), "history": [{"epoch": 1}], "failure": None})
    loaded = folder.load_checkpoint("fold-1")
    assert loaded is not None and torch.equal(loaded.pop("state"), torch.arange(3.0))
    assert loaded == {"history": [{"epoch": 1}], "failure": None, "belongs_to": f"fold-1 {folder.wandb_id}"}


class RunsCode:
    """Makes a folder when it is unpickled, as a checkpoint from somebody else may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what is called."""
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = directory(tmp_path, unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"history": RunsCode(tmp_path / "made")})
    assert folder.load_checkpoint("fold-1") is None and not (tmp_path / "made").exists()


def test_where_a_folder_is_deleted_after_a_run_went_on_its_earlier_epochs_come_back_too(tmp_path: Path) -> None:
    first = directory(tmp_path / "runs", unlike(NETWORK))
    first.save_checkpoint("fold-1", {"history": [1]})
    first.__exit__(KeyboardInterrupt, None, None)
    again = directory(tmp_path / "runs", unlike(NETWORK))
    assert again.load_checkpoint("fold-1") is not None
    shutil.rmtree(tmp_path / "runs")
    again.save_checkpoint("final", {"history": [1, 2]})
    assert {path.name for path in again.path.iterdir()} == {".lock", "config.json", "fold-1.pt", "final.pt"}
    assert json.loads((again.path / "config.json").read_text())["wandb_id"] == first.wandb_id


def test_a_run_whose_lock_somebody_deleted_can_be_finished(tmp_path: Path) -> None:
    folder = directory(tmp_path, unlike(NETWORK))
    (folder.path / ".lock").unlink()
    folder.finish({"folds": []})
    assert (folder.path / "results.json").exists()


def test_why_a_checkpoint_cannot_be_used_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = directory(tmp_path, unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"history": [7.5]})
    content = (folder.path / "fold-1.pt").read_bytes()
    (folder.path / "fold-2.pt").write_bytes(content)
    place = content.index(b"history")
    (folder.path / "fold-1.pt").write_bytes(content[:place] + b"HISTORY" + content[place + 7 :])
    assert folder.load_checkpoint("fold-1") is None and folder.load_checkpoint("fold-2") is None
    begin = f"{folder.path.name}/"
    assert capsys.readouterr().err.splitlines() == [
        f"{begin}fold-1.pt cannot be used, so fold-1 starts over: it is damaged",
        f"{begin}fold-2.pt cannot be used, so fold-2 starts over: it is not what this run wrote",
    ]


def test_a_run_that_goes_on_says_so_and_how_to_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = directory(tmp_path, unlike(NETWORK))
    with first:
        assert capsys.readouterr().out == ""
    with directory(tmp_path, unlike(NETWORK)):
        said = f"Going on with the unfinished run in {first.path.name} (RESUME = False starts anew).\n"
        assert capsys.readouterr().out == said
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_says_where_its_epochs_are_and_lets_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = directory(tmp_path, unlike(NETWORK))
    with pytest.raises(KeyError), folder:
        folder.save_checkpoint("final", {"history": [1]})
        raise KeyError
    assert capsys.readouterr().err == (
        f"Every finished epoch is in {folder.path.name}: the same command, with RESUME = True, goes on.\n"
    )
    assert directory(tmp_path, unlike(NETWORK)).path == folder.path


@pytest.mark.parametrize(
    ("path", "shown"),
    [("here/runs/a", "runs/a"), ("beside/a", "../beside/a"), ("../a", None)],
)
def test_a_path_is_shown_from_here_unless_that_is_more_roundabout(
    path: str, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    absolute = Path(os.path.normpath(tmp_path / path))
    assert path_from_here(absolute) == (shown or str(absolute))


def test_where_there_is_no_working_directory_any_more_a_path_is_shown_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert path_from_here(tmp_path / "runs") == str(tmp_path / "runs")


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    steps: list[tuple[str, bytes]] = []
    fsync, replace = os.fsync, os.replace

    def to_the_disk(number: int) -> None:
        steps.append(("to the disk", path.read_bytes()))
        fsync(number)

    def in_its_place(old: Path, new: Path) -> None:
        steps.append(("in its place", path.read_bytes()))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", to_the_disk)
    monkeypatch.setattr(os, "replace", in_its_place)
    save_atomically(path, b"new")
    assert steps == [("to the disk", b"old"), ("in its place", b"old"), ("to the disk", b"new")]
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", is_full)
    said = f"{path_from_here(path)} cannot be written (No space left on device). Make room, or mend that."
    with pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        save_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("name", ["<lambda>-Digits", "a/b:c-Digits"])
def test_a_name_that_no_folder_can_have_is_replaced(name: str, tmp_path: Path) -> None:
    assert re.fullmatch(r"[\w.-]+", directory(tmp_path, unlike(NETWORK), name).path.name)


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        ({"answers": [1.0001, -2.0]}, True),
        ({"answers": [1.01, -2.0]}, False),
        ({"printed": "Dyn(more)"}, False),
        ({"weights": 4}, False),
    ],
)
def test_a_run_goes_on_with_a_network_that_answers_alike(change: dict[str, Any], goes_on: bool, tmp_path: Path) -> None:
    directory(tmp_path, unlike(NETWORK)).__exit__(None, None, None)
    assert directory(tmp_path, unlike(NETWORK, **change)).resumed == goes_on


def test_what_lies_among_the_runs_and_is_none_is_passed_over(tmp_path: Path) -> None:
    for number, content in enumerate(("", "[]", "{", '{"identity": 3}', '{"identity": {"network": {}}}')):
        (tmp_path / f"Dyn[3]-Digits-{number}").mkdir()
        (tmp_path / f"Dyn[3]-Digits-{number}" / "config.json").write_text(content)
    begun = directory(tmp_path, unlike(NETWORK))
    assert not begun.resumed
    begun.__exit__(None, None, None)
    os.utime(begun.path / "config.json", (1, 1))  # all else is newer
    assert directory(tmp_path, unlike(NETWORK)).path == begun.path


def test_where_the_file_system_has_no_locks_a_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    first = directory(tmp_path, unlike(NETWORK))
    assert directory(tmp_path, unlike(NETWORK)).path == first.path
    said = "Without a lock: OSError: [Errno 37] No locks available"
    assert [line.startswith(said) for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_a_folder_that_is_deleted_while_the_run_is_on_is_made_again_with_all_that_is_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(tmp_path / "runs", unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"history": [1]})
    shutil.rmtree(tmp_path / "runs")
    folder.save_checkpoint("final", {"history": [1, 2]})
    folder.__exit__(KeyboardInterrupt, None, None)
    errors = capsys.readouterr().err
    where = path_from_here(folder.path)
    assert errors.splitlines() == [
        f"{where} is gone: it is made again.",
        f"Every finished epoch is in {where}: the same command, with RESUME = True, goes on.",
    ]
    again = directory(tmp_path / "runs", unlike(NETWORK))
    assert again.path == folder.path
    assert [len(again.load_checkpoint(name)["history"]) for name in ("fold-1", "final")] == [1, 2]  # type: ignore[index]


def test_a_folder_that_is_deleted_at_the_very_end_is_made_again_with_the_network_and_the_pictures(
    tmp_path: Path,
) -> None:
    folder = directory(tmp_path / "runs", unlike(NETWORK))
    folder.save("model.pt", b"weights")
    folder.save("mistakes.png", b"a picture")
    shutil.rmtree(tmp_path / "runs")
    folder.finish({"folds": []})
    saved = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.suffix != ".json"}
    assert saved == {"model.pt": b"weights", "mistakes.png": b"a picture"}
    assert {path.name for path in folder.path.glob("*.json")} == {"config.json", "results.json"}


def test_a_folder_that_was_made_again_is_still_this_processes_own(tmp_path: Path) -> None:
    folder = directory(tmp_path / "runs", unlike(NETWORK))
    shutil.rmtree(tmp_path / "runs")
    folder.save_checkpoint("final", {"history": [1]})
    assert directory(tmp_path / "runs", unlike(NETWORK)).path != folder.path


def test_a_folder_that_cannot_be_made_again_ends_with_one_line(tmp_path: Path) -> None:
    folder = directory(tmp_path / "runs", unlike(NETWORK))
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("no folder")
    said = f"{path_from_here(folder.path)} cannot be made again (Not a directory)."
    with pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        folder.save("report.md", b"")


def test_a_file_system_that_cannot_sync_a_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files_only(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", of_files_only)
    save_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_where_not_one_epoch_was_done_nothing_else_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory(tmp_path, unlike(NETWORK)).__exit__(KeyboardInterrupt, None, None)
    assert capsys.readouterr().err == "Not one epoch is saved: the same command starts from the beginning.\n"


def test_a_run_that_is_cut_off_again_before_its_first_epoch_says_what_an_earlier_attempt_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = directory(tmp_path, unlike(NETWORK))
    first.save_checkpoint("fold-1", {"history": [1]})
    first.__exit__(KeyboardInterrupt, None, None)
    again = directory(tmp_path, unlike(NETWORK))
    again.__exit__(KeyboardInterrupt, None, None)
    assert capsys.readouterr().err.count("Every finished epoch is in") == 2


def test_a_folder_that_cannot_be_made_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = f"{path_from_here(tmp_path / 'file')} cannot be written (File exists). Mend that."
    with pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        directory(tmp_path / "file", unlike(NETWORK))
