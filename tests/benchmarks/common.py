"""What the benchmarks share: fits of a script trained whole, whole runs on fewer images, fresh processes."""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiment.plan import make_fits, make_plan
from experiment.workers import WorkerProcesses
from torch import nn

import main_cnn
from data_utils import load_dataset, path_of
from experiment.run import run_experiment
from experiment.settings import TrainingConfig
from models import ConvolutionalNeuralNetwork
from train_utils import Fit, State, accuracy_of, run_epoch


def config_of(script: ModuleType, **constants: Any) -> TrainingConfig:
    """Return a script's configuration with some constants changed."""
    return TrainingConfig.from_constants(vars(script) | constants)


def fits_of(
    script: ModuleType = main_cnn, model_class: type[nn.Module] = ConvolutionalNeuralNetwork, **constants: Any
) -> list[Fit]:
    """Return the fits of a script with some constants changed, the final one first."""
    config = config_of(script, **constants)
    dataset = load_dataset(config.dataset, path_of(config.data_dir))
    return make_fits(make_plan(config, None), model_class, config, dataset)


def workers_for(fits: int) -> int:
    """Return how many of so many fits are trained side by side on this machine."""
    return make_plan(config_of(main_cnn, FOLDS=fits - 1), None).workers


def train(fit: Fit) -> tuple[State, list[dict[str, Any]]]:
    """Train a fit for all its epochs; return the last state and the metrics of each epoch, as `run_epoch` does."""
    state: State | None = None
    history = []
    for epoch in range(1, fit.epochs + 1):
        state, metrics = run_epoch(fit, epoch, state)
        history.append(metrics)
    assert state is not None  # there is at least one epoch
    return state, history


def train_side_by_side(fits: list[Fit], workers: int) -> list[list[dict[str, Any]]]:
    """Return the history of each fit, as `train` has it."""
    with WorkerProcesses(workers) as pool:
        return list(pool.map(lambda fit: train(fit)[1], fits))


def test_figures(history: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the test accuracy and loss of a final fit."""
    loss, labels, probabilities = history[-1]["evaluation"]
    return accuracy_of(labels, probabilities), loss


def seconds_of_a_run(images: int, **constants: Any) -> float:
    """Return the wall time of a whole run of main_cnn.py on its first images, from nothing to the last file."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_fewer(images, Path(folder) / "data")
        config = config_of(main_cnn, **{"DATA_DIR": f"{folder}/data", "RUNS_DIR": folder} | constants)
        start = time.perf_counter()
        run_experiment(ConvolutionalNeuralNetwork, config)
        return time.perf_counter() - start


def write_fewer(images: int, data_dir: Path, dataset: str = "FashionMNIST", source: Path | None = None) -> None:
    """Write a data set with only the first of its training images; `source` is where the whole one lies."""
    source = source or path_of(main_cnn.DATA_DIR)
    load_dataset(dataset, source)  # unpacks it where that is still to do
    raw = data_dir / dataset / "raw"
    raw.mkdir(parents=True)
    for path in (source / dataset / "raw").glob("*-ubyte"):
        content = path.read_bytes()
        if path.name.startswith("train"):
            header, size = (16, 784) if "images" in path.name else (8, 1)
            content = content[:4] + images.to_bytes(4, "big") + content[8 : header + images * size]
        (raw / path.name).write_bytes(content)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a process in which nothing ran before, as in a script of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
