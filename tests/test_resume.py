"""Resuming: which unfinished run is resumed, with the same bits, and what is never changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS, Configure, Start, computed, finish, run_dirs, saved_epochs, slow

import main_tutorial
from experiment.run_directory import RunDirectory


def test_a_killed_run_resumes_with_the_same_bits(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = saved_epochs(unfinished)
    trained: list[None] = []
    script = configure(main_tutorial, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        save = RunDirectory.save_checkpoint
        patch.setattr(RunDirectory, "save_checkpoint", lambda *arguments: trained.append(save(*arguments)))
        result = script.main()
    assert "Resuming the unfinished run" in capsys.readouterr().out
    assert result.run_dir == unfinished and result.environment["resumed"] is True
    assert done > 0 and len(trained) == 4 * SETTINGS["EPOCHS"] - done, "an epoch was trained twice"
    assert computed(unfinished) == undisturbed


@pytest.mark.parametrize("position", [0.6, *slow(0.0, 0.3, 0.999)])
def test_a_damaged_checkpoint_is_reported_and_its_fit_starts_from_the_beginning(
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
    assert f"{path.name} cannot be used, so {path.stem} starts from the beginning" in capsys.readouterr().err
    assert result.run_dir == unfinished and computed(unfinished) == undisturbed


def test_a_checkpoint_of_another_fit_is_not_used(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(unfinished.glob("*.pt"))
    other = path.with_name("fold-1.pt" if path.name != "fold-1.pt" else "fold-2.pt")
    other.write_bytes(path.read_bytes())
    configure(main_tutorial, **SETTINGS).main()
    assert f"{other.stem} starts from the beginning" in capsys.readouterr().err
    assert computed(unfinished) == undisturbed


@pytest.mark.parametrize(
    "change",
    [
        {"RNG_SEED": 1},
        *slow({"RESUME": False}, {"EPOCHS": 5}, {"FOLDS": 2}, {"BATCH_SIZE": 32}, {"LEARNING_RATE": 0.002}),
        *slow({"LR_SCHEDULE": "cosine"}, {"MIRROR": True}, {"PRECISION": "float32"}),
    ],
)
def test_a_run_with_another_identity_starts_a_new_run(
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
def test_workers_folders_and_logging_are_no_part_of_the_identity(
    change: dict[str, Any], unfinished: Path, configure: Configure, tmp_path: Path
) -> None:
    if "DATA_DIR" in change:
        change = {"DATA_DIR": tmp_path / change["DATA_DIR"]}
    assert configure(main_tutorial, **SETTINGS | change).main().run_dir == unfinished


def test_a_finished_run_is_never_changed(configure: Configure) -> None:
    script = configure(main_tutorial)
    first = script.main()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}
    assert script.main().run_dir != first.run_dir
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}


@pytest.mark.slow
def test_two_runs_started_at_the_same_time_have_their_own_directories(
    unfinished: Path, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    both = [start_script("main_tutorial", **SETTINGS) for _ in range(2)]
    outputs = [finish(process)[0] for process in both]
    assert sum("Resuming the unfinished run" in output for output in outputs) == 1
    assert [computed(path) for path in run_dirs(tmp_path)] == [undisturbed] * 2


def test_a_folder_name_that_is_not_utf_8_is_accepted(configure: Configure, tmp_path: Path) -> None:
    result = configure(main_tutorial, EPOCHS=1, RUNS_DIR=f"{tmp_path}/br\udcfcder").main()
    assert (result.run_dir / "results.json").exists() and b"br\xfcder" in os.fsencode(result.run_dir)
