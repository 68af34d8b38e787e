"""The loop over epochs: what is saved and printed, and when, if the run is cut off at each of its steps."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Configure, Start, finish, run_dirs, slow, wait_for

import main_tutorial
from experiment import run, training
from experiment.results import ExperimentResult
from experiment.run_directory import RunDirectory
from experiment.wandb_logging import WandbRuns


@pytest.mark.parametrize("step", ["make_result", "draw_figures", *slow("folds_table")])
def test_run_cut_off_after_training_resumes_without_training(
    step: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def interrupt_here(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    def train_again(*_arguments: Any) -> None:
        raise AssertionError("an epoch was trained again")

    script = configure(main_tutorial, EPOCHS=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, step, interrupt_here)
        with pytest.raises(SystemExit) as end:
            script.main()
    assert end.value.code == 130
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "model.pt").exists() and not (run_dir / "results.json").exists()
    assert "resumes the run" in capsys.readouterr().err
    monkeypatch.setattr(training, "_submit_epoch", train_again)
    assert script.main().run_dir == run_dir


def test_results_json_is_written_after_the_tables_are_printed_and_before_they_are_logged(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_before = []
    finished_when_logged = []

    def finish_run(folder: RunDirectory, results: dict[str, Any]) -> None:
        printed_before.append(capsys.readouterr().out)
        original(folder, results)

    def log_results(_runs: WandbRuns, result: ExperimentResult) -> None:
        finished_when_logged.append((result.run_dir / "results.json").exists())

    original = RunDirectory.finish
    monkeypatch.setattr(RunDirectory, "finish", finish_run)
    monkeypatch.setattr(WandbRuns, "log_results", log_results)
    configure(main_tutorial, EPOCHS=1).main()
    (output,) = printed_before
    assert "Cross-validation" in output and "Time taken" in output
    assert finished_when_logged == [True]


@pytest.mark.parametrize("mode", ["disabled", *slow("offline")])
def test_run_whose_folder_is_deleted_ends_with_one_line_and_makes_no_folder(
    mode: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def delete_folder(folder: RunDirectory, *arguments: Any) -> None:
        original(folder, *arguments)
        shutil.rmtree(folder.path)

    original = RunDirectory.save_checkpoint
    monkeypatch.setattr(RunDirectory, "save_checkpoint", delete_folder)
    with pytest.raises(SystemExit) as end:
        configure(main_tutorial, WANDB_MODE=mode).main()
    assert end.value.code == 1 and run_dirs(tmp_path) == []
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith(" was deleted during the run. Run the same command again.")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_interrupted_before_its_first_epoch_leaves_no_folder(
    number: int, start_script: Start, tmp_path: Path
) -> None:
    process = start_script("main_cnn", DATASET="FashionMNIST")  # its first epoch takes long
    wait_for(lambda: list((tmp_path / "runs").glob("*/config.json")), process)
    process.send_signal(number)
    _, errors = finish(process, status=128 + number)
    assert "No epoch was finished" in errors and errors.endswith(f"Stopped by {signal.Signals(number).name}.\n")
    assert run_dirs(tmp_path) == []
