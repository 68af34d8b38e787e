"""Runs that were cut off: what goes on after a kill, what starts anew, and what is never touched."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS, Configure, Start, computed, finish, run_dirs, saved_epochs, slow

import main_tutorial
from experiment.run_directory import RunDirectory


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


def test_a_folder_whose_name_is_no_text_will_do(configure: Configure, tmp_path: Path) -> None:
    result = configure(main_tutorial, EPOCHS=1, RUNS_DIR=f"{tmp_path}/br\udcfcder").main()
    assert (result.run_dir / "results.json").exists() and b"br\xfcder" in os.fsencode(result.run_dir)
