"""A run's folder: what goes on in it after a kill, what starts anew, and what is never touched."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS, Configure, Start, computed, finish, run_dirs, saved_epochs, slow

import main_tutorial
from experiment.errors import RunError
from experiment.run_directory import RunDirectory, save_atomically


def test_a_killed_run_goes_on_and_ends_in_the_same_results(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = saved_epochs(unfinished)
    trained: list[None] = []
    script = configure(main_tutorial, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        save = RunDirectory.save_checkpoint
        patch.setattr(RunDirectory, "save_checkpoint", lambda *arguments: trained.append(save(*arguments)))
        result = script.main()
    assert "Going on with the unfinished run" in capsys.readouterr().out
    assert result.run_dir == unfinished and result.environment["resumed"] is True
    assert done > 0 and len(trained) == 4 * SETTINGS["EPOCHS"] - done, "an epoch was trained twice"
    assert computed(unfinished) == undisturbed


@pytest.mark.parametrize("position", [0.6, *slow(0.0, 0.3, 0.999)])
def test_a_damaged_checkpoint_is_reported_and_its_fit_starts_over(
    position: float,
    unfinished: Path,
    configure: Configure,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = next(unfinished.glob("*.pt"))
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    content[place : place + 8] = bytes(byte ^ 255 for byte in content[place : place + 8])
    path.write_bytes(content)
    result = configure(main_tutorial, **SETTINGS).main()
    assert f"{path.name} cannot be used, so {path.stem} starts over" in capsys.readouterr().err
    assert result.run_dir == unfinished and computed(unfinished) == undisturbed


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_reported(
    unfinished: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(unfinished.glob("*.pt"))
    path.write_bytes(path.read_bytes()[:-1000])
    configure(main_tutorial, **SETTINGS).main()
    assert f"{path.stem} starts over" in capsys.readouterr().err


def test_a_checkpoint_of_another_fit_is_not_used(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(unfinished.glob("*.pt"))
    other = path.with_name("fold-1.pt" if path.name != "fold-1.pt" else "fold-2.pt")
    other.write_bytes(path.read_bytes())
    configure(main_tutorial, **SETTINGS).main()
    assert f"{other.stem} starts over" in capsys.readouterr().err
    assert computed(unfinished) == undisturbed


@pytest.mark.parametrize(
    "change",
    [
        {"RNG_SEED": 1},
        *slow({"RESUME": False}, {"EPOCHS": 5}, {"FOLDS": 2}, {"BATCH_SIZE": 32}, {"LEARNING_RATE": 0.002}),
        *slow({"LR_SCHEDULE": "cosine"}, {"MIRROR": True}, {"PRECISION": "float32"}),
    ],
)
def test_a_run_that_is_not_identical_starts_anew(
    change: dict[str, Any], unfinished: Path, configure: Configure
) -> None:
    precision = json.loads((unfinished / "config.json").read_text())["identity"]["precision"]
    if change == {"PRECISION": precision}:
        change = {"PRECISION": "bfloat16"}
    result = configure(main_tutorial, **SETTINGS | change).main()
    assert result.run_dir != unfinished and result.environment["resumed"] is False
    assert not (unfinished / "results.json").exists()


@pytest.mark.parametrize(
    "change", [{"WANDB_PROJECT_NAME": "other"}, *slow({"WORKERS": 2}, {"DATA_DIR": "data/elsewhere"})]
)
def test_how_many_workers_there_are_and_where_it_is_logged_does_not_matter(
    change: dict[str, Any], unfinished: Path, configure: Configure, tmp_path: Path
) -> None:
    if "DATA_DIR" in change:
        change = {"DATA_DIR": tmp_path / change["DATA_DIR"]}
    assert configure(main_tutorial, **SETTINGS | change).main().run_dir == unfinished


def test_a_finished_run_is_never_touched(configure: Configure) -> None:
    script = configure(main_tutorial)
    first = script.main()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}
    assert script.main().run_dir != first.run_dir
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}


@pytest.mark.slow
def test_two_runs_started_at_once_do_not_share_a_directory(
    unfinished: Path, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    both = [start_script("main_tutorial", **SETTINGS) for _ in range(2)]
    outputs = [finish(process)[0] for process in both]
    assert sum("Going on with" in output for output in outputs) == 1
    assert [computed(path) for path in run_dirs(tmp_path)] == [undisturbed] * 2


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
    assert not directory(tmp_path, unlike(NETWORK)).resumed


def test_a_folder_that_is_deleted_while_the_run_is_on_is_made_again_with_all_that_is_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(tmp_path / "runs", unlike(NETWORK))
    folder.save_checkpoint("fold-1", {"history": [1]})
    shutil.rmtree(tmp_path / "runs")
    folder.save_checkpoint("final", {"history": [1, 2]})
    folder.__exit__(KeyboardInterrupt, None, None)
    errors = capsys.readouterr().err
    assert "is gone: it is made again" in errors and "Every finished epoch is in" in errors
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
    with pytest.raises(RunError, match="cannot be written"):
        directory(tmp_path / "file", unlike(NETWORK))


def test_a_folder_whose_name_is_no_text_will_do(configure: Configure, tmp_path: Path) -> None:
    result = configure(main_tutorial, EPOCHS=1, RUNS_DIR=f"{tmp_path}/br\udcfcder").main()
    assert (result.run_dir / "results.json").exists() and b"br\xfcder" in os.fsencode(result.run_dir)
