"""A run directory: which one is resumed, what is saved in it and how, and what is printed about it."""

import errno
import os
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from experiment import run_directory
from experiment.errors import RunError
from experiment.files import relative_to_cwd
from experiment.run_directory import RunDirectory

NETWORK = {
    "name": "Dyn[3]",
    "printed": "Dyn()",
    "parameters": 3,
    "fingerprint": {"logits": [1.0, -2.0], "gradients": [3.0]},
}


def directory(runs_dir: Path, name: str = "Dyn[3]", resume: bool = True, **changes: Any) -> RunDirectory:
    """Return the run directory of an experiment on Digits, with some of its network's record changed."""
    identity = {"network": NETWORK | changes, "epochs": 2}
    config = SimpleNamespace(runs_dir=runs_dir, resume=resume, dataset="Digits", device="cpu")
    record = {"data_dir": "für/mich", "identity": identity}
    experiment = SimpleNamespace(
        config=config, model=SimpleNamespace(name=name), identity=identity, config_record=record
    )
    return RunDirectory(experiment)  # type: ignore[arg-type]  # all that it uses of an Experiment


def test_a_folder_is_named_by_its_time_and_numbered_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = directory(tmp_path).path.name
    began = datetime.strptime(name, "Dyn[3]-Digits-%Y%m%d-%H%M%S")
    assert abs(datetime.now() - began) < timedelta(minutes=1)
    monkeypatch.setattr(time, "strftime", lambda _: "20261126-183000")
    folders = [directory(tmp_path, "Net", resume=False) for _ in range(3)]
    names = [folder.path.name for folder in folders]
    assert names == [f"Net-Digits-20261126-183000{number}" for number in ("", "-2", "-3")]


def test_a_locked_run_is_not_resumed(tmp_path: Path) -> None:
    busy = directory(tmp_path)
    assert directory(tmp_path).path != busy.path


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(3)])
def test_a_state_that_could_not_be_loaded_again_is_refused_after_the_first_epoch(value: Any, tmp_path: Path) -> None:
    folder = directory(tmp_path)
    with pytest.raises(RunError, match=r"returned a state with numpy\._core\.multiarray"):
        folder.save_checkpoint("fold-1", {"history": [1], "state": {"average": value}})


def test_the_newest_unfinished_run_is_resumed(tmp_path: Path) -> None:
    folders = [directory(tmp_path, "Net", resume=False) for _ in range(3)]
    for folder, when in zip(folders, (100, 300, 200), strict=True):
        folder.__exit__(None, None, None)
        os.utime(folder.path / "config.json", (when, when))
    again = directory(tmp_path, "Net")
    assert again.path == folders[1].path and again.wandb_id == folders[1].wandb_id


def test_an_unfinished_run_with_another_name_is_not_resumed(tmp_path: Path) -> None:
    for name in ("Network", "Ne"):
        directory(tmp_path, name).__exit__(None, None, None)
    assert not directory(tmp_path, "Net").resumed


def test_a_finished_run_keeps_neither_checkpoints_nor_its_lock(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    folder.save_checkpoint("fold-1", {"history": [1]})
    folder.save("model.pt", b"weights")
    folder.finish({"folds": []})
    assert {path.name for path in folder.path.iterdir()} == {"config.json", "model.pt", "results.json"}
    assert not directory(tmp_path).resumed


def test_config_json_is_readable(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    content = (folder.path / "config.json").read_bytes().decode()
    assert content.startswith('{\n  "data_dir": "für/mich",\n  "identity": {\n    "network": {\n')
    assert re.fullmatch("[0-9a-f]{8}", folder.wandb_id)
    assert content.endswith(f'  "wandb_id": "{folder.wandb_id}"\n}}\n')


def test_incomplete_files_are_deleted_when_a_run_is_resumed(tmp_path: Path) -> None:
    first = directory(tmp_path)
    first.__exit__(None, None, None)
    (first.path / ".fold-1.pt.123.unfinished").write_bytes(b"half")
    assert directory(tmp_path).path == first.path
    assert {path.name for path in first.path.iterdir()} == {".lock", "config.json"}


def test_a_missing_checkpoint_is_none_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert directory(tmp_path).load_checkpoint("fold-1") is None
    assert capsys.readouterr().err == ""


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    folder.save_checkpoint("fold-1", {"state": torch.arange(3.0), "history": [{"epoch": 1}], "failure": None})
    loaded = folder.load_checkpoint("fold-1")
    assert loaded is not None and torch.equal(loaded.pop("state"), torch.arange(3.0))
    assert loaded == {"history": [{"epoch": 1}], "failure": None, "belongs_to": f"fold-1 {folder.wandb_id}"}


class RunsCode:
    """Makes a folder when it is unpickled, as a checkpoint from an untrusted source may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what is called."""
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    folder.save_checkpoint("fold-1", {"history": [1, 2], "state": RunsCode(tmp_path / "made")})
    assert folder.load_checkpoint("fold-1") is None and not (tmp_path / "made").exists()


def test_a_run_whose_lock_was_deleted_can_be_finished(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    (folder.path / ".lock").unlink()
    folder.finish({"folds": []})
    assert (folder.path / "results.json").exists()


def test_an_unusable_checkpoint_is_one_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = directory(tmp_path)
    folder.save_checkpoint("fold-1", {"history": [7.5]})
    content = (folder.path / "fold-1.pt").read_bytes()
    (folder.path / "fold-2.pt").write_bytes(content)
    place = content.index(b"history")
    (folder.path / "fold-1.pt").write_bytes(content[:place] + b"HISTORY" + content[place + 7 :])
    assert folder.load_checkpoint("fold-1") is None and folder.load_checkpoint("fold-2") is None
    begin = f"{folder.path.name}/"
    assert capsys.readouterr().err.splitlines() == [
        f"{begin}fold-1.pt cannot be used, so fold-1 starts from the beginning: it is damaged",
        f"{begin}fold-2.pt cannot be used, so fold-2 starts from the beginning: it belongs to another run",
    ]


def test_resuming_is_printed_with_how_to_start_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = directory(tmp_path)
    with first:
        assert capsys.readouterr().out == ""
    with directory(tmp_path):
        printed = f"Resuming the unfinished run in {first.path.name} (RESUME = False starts a new one).\n"
        assert capsys.readouterr().out == printed
    assert capsys.readouterr().err == ""


def test_each_failed_attempt_prints_where_the_epochs_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    directory(tmp_path).save_checkpoint("final", {"history": [1]})
    for _ in range(2):
        with pytest.raises(KeyError), directory(tmp_path) as folder:
            raise KeyError
        message = f"Every finished epoch is saved in {folder.path.name}: the same command, with RESUME = True, "
        assert folder.resumed and capsys.readouterr().err == f"{message}resumes the run.\n"


@pytest.mark.parametrize("name", ["<lambda>", "a/b:c"])
def test_characters_that_folder_names_cannot_have_are_replaced(name: str, tmp_path: Path) -> None:
    assert re.fullmatch(r"[\w.-]+", directory(tmp_path, name).path.name)


@pytest.mark.parametrize(
    ("change", "resumed"),
    [
        ({"fingerprint": {"logits": [1.0001, -2.0], "gradients": [3.0]}}, True),
        ({"fingerprint": {"logits": [1.01, -2.0], "gradients": [3.0]}}, False),
        ({"printed": "Dyn(more)"}, False),
        ({"parameters": 4}, False),
    ],
)
def test_a_run_is_resumed_with_a_network_of_the_same_fingerprint(
    change: dict[str, Any], resumed: bool, tmp_path: Path
) -> None:
    directory(tmp_path).__exit__(None, None, None)
    assert directory(tmp_path, **change).resumed == resumed


def test_folders_that_are_not_runs_are_ignored(tmp_path: Path) -> None:
    for number, content in enumerate(("", "[]", "{", '{"identity": 3}', '{"identity": {"network": {}}}')):
        (tmp_path / f"Dyn[3]-Digits-{number}").mkdir()
        (tmp_path / f"Dyn[3]-Digits-{number}" / "config.json").write_text(content)
    unfinished = directory(tmp_path)
    assert not unfinished.resumed
    unfinished.__exit__(None, None, None)
    os.utime(unfinished.path / "config.json", (1, 1))  # the others are newer
    assert directory(tmp_path).path == unfinished.path


def test_a_file_system_without_locks_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    first = directory(tmp_path)
    assert directory(tmp_path).path == first.path
    printed = "Without a lock: OSError: [Errno 37] No locks available"
    assert [line.startswith(printed) for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_a_run_without_a_finished_epoch_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = directory(tmp_path)
    folder.__exit__(KeyboardInterrupt, None, None)
    assert capsys.readouterr().err.startswith("No epoch was finished, so nothing is saved")
    assert not folder.path.exists()


@pytest.mark.parametrize("error", [RunError("no space"), KeyboardInterrupt()])
def test_a_run_that_fails_while_its_config_is_written_leaves_no_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path, _content: bytes) -> None:
        raise error

    monkeypatch.setattr(run_directory, "write_atomically", fail)
    with pytest.raises(type(error)):
        directory(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = "cannot be written (it is not a folder). Fix the permissions or change RUNS_DIR."
    with pytest.raises(RunError, match=re.escape(f"{relative_to_cwd(tmp_path / 'file')} {message}")):
        directory(tmp_path / "file")
