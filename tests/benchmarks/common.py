"""Shared by the benchmarks: fits of a script, whole runs on fewer images, fresh processes."""

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

from torch import nn

import main_cnn
from data_files import load_dataset, resolve_path
from experiment.prepare import make_fits
from experiment.resources import resolve_resources
from experiment.run import run_experiment
from experiment.settings import TrainingConfig
from models import ConvolutionalNeuralNetwork
from train_utils import Fit, compute_accuracy


def make_config(script: ModuleType, **constants: Any) -> TrainingConfig:
    """Return a script's configuration with some constants changed."""
    return TrainingConfig.from_constants(vars(script) | constants)


def fits_of(
    script: ModuleType = main_cnn, model_class: type[nn.Module] = ConvolutionalNeuralNetwork, **constants: Any
) -> list[Fit]:
    """Return the fits of a script with some constants changed, the final fit first."""
    config = make_config(script, **constants)
    dataset = load_dataset(config.dataset, resolve_path(config.data_dir))
    return make_fits(config, resolve_resources(config), model_class, dataset)


def workers_for(fits: int) -> int:
    """Return how many of a number of fits are trained at the same time on this machine."""
    return resolve_resources(make_config(main_cnn, FOLDS=fits - 1)).workers


def final_metrics(history: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the test accuracy and loss of a final fit, given its history."""
    loss, labels, probabilities = history[-1]["evaluation"]
    return compute_accuracy(labels, probabilities), loss


def seconds_of_a_run(images: int, **constants: Any) -> float:
    """Return the wall time of a whole run of main_cnn.py on its first images, from preparation to the last file."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_fewer(images, Path(folder) / "data")
        config = make_config(main_cnn, **{"DATA_DIR": f"{folder}/data", "RUNS_DIR": folder} | constants)
        start = time.perf_counter()
        run_experiment(ConvolutionalNeuralNetwork, config)
        return time.perf_counter() - start


def write_fewer(images: int, data_dir: Path, dataset: str = "FashionMNIST", source: Path | None = None) -> None:
    """Write a data set with only the first of its training images; `source` is the folder of the whole one."""
    source = source or resolve_path(main_cnn.DATA_DIR)
    load_dataset(dataset, source)  # unpacks it if necessary
    raw = data_dir / dataset / "raw"
    raw.mkdir(parents=True)
    for path in (source / dataset / "raw").glob("*-ubyte"):
        content = path.read_bytes()
        if path.name.startswith("train"):
            header, size = (16, 784) if "images" in path.name else (8, 1)
            content = content[:4] + images.to_bytes(4, "big") + content[8 : header + images * size]
        (raw / path.name).write_bytes(content)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a new process, as in a script of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
