"""Which unfinished run is resumed on another machine, with what, and what is printed if it cannot be."""

import json
import os
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import Configure, computed, run_dirs
from filelock import FileLock

import main_tutorial
from experiment import resources
from experiment.run_directory import RunDirectory
from experiment.settings import TrainingConfig
from experiment.unfinished_runs import UnfinishedRun, find_mismatch, find_unfinished, identity_to_resume

NETWORK = {"name": "Net", "printed": "Net()", "parameters": 3, "fingerprint": {"logits": [1.0], "gradients": [3.0]}}
IDENTITY = {"epochs": 2, "device": "cpu", "precision": "bfloat16", "threads": 2, "torch": "2.14.1", "network": NETWORK}


def make_config(**constants: Any) -> TrainingConfig:
    return TrainingConfig.from_constants(vars(main_tutorial) | {"DATASET": "Digits"} | constants)


def begun_with(**changes: Any) -> list[UnfinishedRun]:
    return [UnfinishedRun(Path("runs/a"), IDENTITY | changes, "0")]


@pytest.mark.parametrize("change", [{"threads": 1}, {"precision": "float32"}])
def test_threads_and_precision_of_the_unfinished_run_are_kept(change: dict[str, Any]) -> None:
    assert identity_to_resume(make_config(), IDENTITY, begun_with(**change)) == IDENTITY | change


@pytest.mark.parametrize("change", [{"torch": "2.15.0"}, {"epochs": 3}, {"device": "cuda"}, {"seed": 1}])
def test_nothing_is_kept_of_a_run_that_cannot_be_resumed(change: dict[str, Any]) -> None:
    assert identity_to_resume(make_config(), IDENTITY, begun_with(threads=1, **change)) == IDENTITY


def test_a_precision_that_the_user_chose_is_not_replaced() -> None:
    config = make_config(PRECISION="bfloat16")
    assert identity_to_resume(config, IDENTITY, begun_with(precision="float32")) == IDENTITY


def test_the_newest_run_that_can_be_resumed_decides() -> None:
    runs = begun_with(epochs=3) + begun_with(threads=5) + begun_with(threads=6)
    assert identity_to_resume(make_config(), IDENTITY, runs)["threads"] == 5


def test_nothing_is_kept_of_a_run_that_another_process_trains(tmp_path: Path) -> None:
    run = UnfinishedRun(tmp_path, IDENTITY | {"threads": 1}, "0")
    with FileLock(tmp_path / ".lock"):
        assert identity_to_resume(make_config(), IDENTITY, [run]) == IDENTITY
    assert identity_to_resume(make_config(), IDENTITY, [run])["threads"] == 1


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"torch": "2.13.0"}, "torch (2.13.0, not 2.14.1)"),
        ({"torch": "2.13.0", "threads": 1}, "torch (2.13.0, not 2.14.1)"),
        (
            {"torch": "2.13.0", "network": NETWORK | {"fingerprint": {"logits": [2.0], "gradients": [3.0]}}},
            "torch (2.13.0, not 2.14.1)",
        ),
        ({"device": "cuda", "torch": "2.13.0"}, "torch (2.13.0, not 2.14.1) and device (cuda, not cpu)"),
    ],
)
def test_a_mismatch_names_what_differs_on_this_machine(change: dict[str, Any], difference: str) -> None:
    mismatch = find_mismatch(make_config(DEVICE="auto"), IDENTITY, begun_with(**change))
    assert mismatch is not None and mismatch[1] == difference


@pytest.mark.parametrize(
    "change", [{}, {"threads": 1}, {"epochs": 3, "torch": "2.13.0"}, {"network": NETWORK | {"printed": "Other()"}}]
)
def test_a_run_with_other_settings_is_no_mismatch(change: dict[str, Any]) -> None:
    assert find_mismatch(make_config(), IDENTITY, begun_with(**change)) is None


def test_a_device_that_the_user_chose_is_no_mismatch() -> None:
    assert find_mismatch(make_config(DEVICE="cpu"), IDENTITY, begun_with(device="cuda")) is None


def test_unfinished_runs_are_found_from_the_newest_to_the_oldest(tmp_path: Path) -> None:
    for number, name in enumerate(("Net-Digits-1", "Net-Digits-2", "Net-Digits-finished", "Net2-Digits-1")):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({"identity": IDENTITY, "wandb_id": str(number)}))
        os.utime(config, (number, number))
    (tmp_path / "Net-Digits-finished" / "results.json").write_text("{}")
    (tmp_path / "Net-Digits-pipe").mkdir()
    os.mkfifo(tmp_path / "Net-Digits-pipe" / "config.json")  # reading it would wait forever
    runs = find_unfinished(make_config(RUNS_DIR=str(tmp_path)), "Net")
    assert [(run.path.name, run.wandb_id) for run in runs] == [("Net-Digits-2", "1"), ("Net-Digits-1", "0")]


def interrupt_after(checkpoints: int, patch: pytest.MonkeyPatch) -> None:
    """Let the next run be interrupted when it has saved a number of checkpoints."""
    save = RunDirectory.save_checkpoint
    saved = []

    def save_and_count(*arguments: Any) -> None:
        save(*arguments)
        saved.append(arguments)
        if len(saved) == checkpoints:
            raise KeyboardInterrupt

    patch.setattr(RunDirectory, "save_checkpoint", save_and_count)


def set_machine(patch: pytest.MonkeyPatch, cores: int, bfloat16_is_faster: bool) -> None:
    patch.setattr(joblib, "cpu_count", lambda: cores)
    patch.setattr(resources, "_bfloat16_is_faster", lambda _device: bfloat16_is_faster)


@pytest.mark.slow
def test_a_run_is_resumed_on_another_machine_with_the_same_bits(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, cores=6, bfloat16_is_faster=True)
    undisturbed = configure(main_tutorial, RUNS_DIR=tmp_path / "undisturbed").main()
    script = configure(main_tutorial)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(3, patch)
        script.main()
    capsys.readouterr()
    set_machine(monkeypatch, cores=1, bfloat16_is_faster=False)
    result = script.main()
    (run_dir,) = run_dirs(tmp_path)
    output = capsys.readouterr().out
    assert "begun in bfloat16 with 2 threads per network" in " ".join(output.split())
    assert result.environment["resumed"] is True and result.environment["threads_per_fit"] == 2
    assert computed(run_dir) == computed(undisturbed.run_dir)


@pytest.mark.slow
def test_an_unfinished_run_of_another_torch_version_is_named(
    unfinished: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((unfinished / "config.json").read_text())
    config["identity"]["torch"] = "2.0.0"
    (unfinished / "config.json").write_text(json.dumps(config))
    script = configure(main_tutorial, FOLDS=config["folds"], EPOCHS=config["epochs"])
    result = script.main()
    output = " ".join(capsys.readouterr().out.split())
    assert "differs in torch (2.0.0, not " in output and "so this is a new run." in output
    assert result.run_dir != unfinished
