"""Networks of every kind, defined anywhere, are trained as they are in memory; their errors show the user's line."""

import functools
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    DATA_DIR,
    NETWORK_SOURCE,
    REPOSITORY,
    Configure,
    checkpoints,
    finish,
    run_dirs,
    slow,
    start_python,
    wait_for,
)
from nbclient import NotebookClient
from torch import Tensor, nn

import main_tutorial
from experiment.executors import WorkerProcesses, _user_modules, pickle_by_value
from experiment.identity import same_fingerprint
from experiment.model_check import check_model
from models import NeuralNetwork

# --- A network is sent to workers by value, as it is in memory ---


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(1) as pool:
        yield pool


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return a module of the user's own, imported from its file."""
    (tmp_path / "users_own.py").write_text(NETWORK_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("users_own")
    del sys.modules["users_own"]


def fingerprint(model_class: Callable[[], nn.Module]) -> dict[str, list[float]]:
    return check_model(model_class, "cpu", "float32").fingerprint


def fingerprint_in_worker(model_class: Callable[[], nn.Module], pool: Executor) -> dict[str, list[float]]:
    return pool.submit(check_model, pickle_by_value(model_class), "cpu", "float32").result().fingerprint


def test_constant_changed_in_memory_reaches_the_workers(module: ModuleType, pool: Executor) -> None:
    before = fingerprint(module.Net)
    module.SCALE = 0.01  # type: ignore[attr-defined]  # defined in NETWORK_SOURCE
    assert not same_fingerprint(before, fingerprint(module.Net))
    assert same_fingerprint(fingerprint_in_worker(module.Net, pool), fingerprint(module.Net))


def test_method_replaced_in_memory_reaches_the_workers(module: ModuleType, pool: Executor) -> None:
    module.Net.forward = lambda self, images: -self.layers(images.flatten(1))
    assert same_fingerprint(fingerprint_in_worker(module.Net, pool), fingerprint(module.Net))


def test_module_edited_after_its_import_is_sent_as_it_is_in_memory(module: ModuleType, pool: Executor) -> None:
    Path(str(module.__file__)).write_text(NETWORK_SOURCE.replace("SCALE = 1.0", "SCALE = 2.0"))
    assert same_fingerprint(fingerprint_in_worker(module.Net, pool), fingerprint(module.Net))


def test_class_of_a_module_that_cannot_be_imported_reaches_the_workers(tmp_path: Path, pool: Executor) -> None:
    (tmp_path / "cannot_be_imported.py").write_text(NETWORK_SOURCE)
    model_class = runpy.run_path(str(tmp_path / "cannot_be_imported.py"))["Net"]
    assert same_fingerprint(fingerprint_in_worker(model_class, pool), fingerprint(model_class))


@pytest.mark.parametrize(
    "model_class",
    [
        functools.partial(lambda width: nn.Sequential(nn.Flatten(), nn.Linear(width, 10)), width=784),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    ],
    ids=["partial", "lambda"],
)
def test_partial_and_lambda_reach_the_workers(model_class: Callable[[], nn.Module], pool: Executor) -> None:
    assert same_fingerprint(fingerprint_in_worker(model_class, pool), fingerprint(model_class))


def test_only_the_users_own_modules_are_sent(module: ModuleType) -> None:
    sent = {module.__name__ for module in _user_modules()}
    assert {"users_own", "models", "main_cnn", __name__} <= sent
    for name in ("torch.nn", "numpy", "pytest", "json", "pathlib", "experiment.prepare", "experiment", "train_utils"):
        assert name in sys.modules and name not in sent


def network_with_a_lock() -> type[nn.Module]:
    """Return a network that uses a lock, which exists only in this process."""
    lock = threading.Lock()

    class Locking(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            with lock:
                return super().forward(images)

    return Locking


def test_network_that_cannot_be_sent_is_a_bad_configuration(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, NeuralNetwork=network_with_a_lock(), WORKERS=2, WANDB_MODE="offline").main()
    assert stop.value.code == 2 and not (tmp_path / "runs").exists()
    output, errors = capsys.readouterr()
    assert (output, errors) == (
        "",
        "Bad configuration:\n  the network cannot be sent to other processes: cannot pickle '_thread.lock' object. "
        "Create what it needs in its own __init__, or set WORKERS = 1\n",
    )


def test_network_that_cannot_be_sent_trains_in_this_process(configure: Configure) -> None:
    assert configure(main_tutorial, NeuralNetwork=network_with_a_lock(), EPOCHS=1).main().final is not None


# --- Errors during training ---


class Raising(NeuralNetwork):
    """Raises an error in training, but not for the few images of the model check."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or raise."""
        if len(images) > 8:
            time.sleep(0.5)  # so that the other fits are waiting
            raise OSError("as planned")
        return super().forward(images)


class Exiting(NeuralNetwork):
    """Ends its process in training."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or exit."""
        if len(images) > 8:
            sys.exit("as planned")
        return super().forward(images)


def network_that_needs_process(number: int) -> type[nn.Module]:
    """Return a network that can only be built in one process."""

    class OnlyHere(NeuralNetwork):
        def __init__(self) -> None:
            super().__init__()
            if os.getpid() != number:
                raise OSError("as planned")

    return OnlyHere


def shown(error: pytest.ExceptionInfo[Exception]) -> str:
    """Return the traceback that a user sees."""
    return "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("network", "line", "workers"),
    [
        (Raising, 'raise OSError("as planned")', 1),
        (Exiting, 'sys.exit("as planned")', 2),
        *slow(
            (Raising, 'raise OSError("as planned")', 2),
            (Exiting, 'sys.exit("as planned")', 1),
            (network_that_needs_process(os.getpid()), 'raise OSError("as planned")', 2),
        ),
    ],
)
def test_error_in_the_first_epoch_shows_the_users_line_and_leaves_no_run(
    network: type[nn.Module], line: str, workers: int, configure: Configure, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises((OSError, RuntimeError), match="as planned") as error:
        configure(main_tutorial, NeuralNetwork=network, WORKERS=workers).main()
    assert line in shown(error)
    assert "killed" not in capsys.readouterr().err
    assert run_dirs(tmp_path) == []


def make_threads() -> Executor:
    return ThreadPoolExecutor(2)


def make_processes() -> Executor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize("make_pool", [make_threads, *slow(make_processes)])
def test_error_in_an_executor_that_was_passed_in_shows_the_users_line(
    make_pool: Callable[[], Executor], configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_pool() as executor, pytest.raises(OSError, match="as planned") as error:
        configure(main_tutorial, NeuralNetwork=Raising).main(executor=executor)
    assert 'raise OSError("as planned")' in shown(error)
    assert "lost an epoch" not in capsys.readouterr().err


def test_after_an_error_waiting_epochs_are_cancelled(configure: Configure) -> None:
    futures = []

    class RecordingExecutor(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **keywords: Any) -> Any:
            futures.append(super().submit(*arguments, **keywords))
            return futures[-1]

    with RecordingExecutor(1) as executor, pytest.raises(OSError, match="as planned"):
        configure(main_tutorial, NeuralNetwork=Raising, FOLDS=5).main(executor=executor)
    assert len(futures) == 8  # two calls before training, and the first epoch of each fit
    assert sum(future.cancelled() for future in futures) >= 4


# --- Whole runs ---


@pytest.mark.parametrize("workers", [1, *slow(2)])
def test_run_restores_threads_and_random_generators(workers: int, configure: Configure) -> None:
    def process_state() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()
        return torch.get_rng_state().tolist(), numpy_state[1].tolist(), torch.get_num_threads()

    torch.set_num_threads(2)
    torch.manual_seed(5)
    np.random.seed(6)
    before = process_state()
    configure(main_tutorial, EPOCHS=1, WORKERS=workers).main()
    assert process_state() == before


def small_resnet() -> nn.Module:
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return network


@pytest.mark.slow
def test_torchvision_network_trains_in_workers(configure: Configure) -> None:
    result = configure(main_tutorial, NeuralNetwork=small_resnet, EPOCHS=1, WORKERS=2).main()
    assert result.final.accuracy > 0.5 and result.run_dir.name.startswith("ResNet-Digits-")


# --- Runs of a user's own script, shell or notebook ---

SCRIPT = """
import torch
from torch import nn
import main_tutorial
from experiment.run import run_experiment
from experiment.settings import TrainingConfig

def helper(images):
    return images * 1.5

class Own(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 10))
        self.shift = shift  # a comment
    def forward(self, images):
        return self.layers(helper(images)) + self.shift

"""
RUN = f"""
settings = {{"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 40, "PRECISION": "float32", "WORKERS": 2}}
settings |= {{"WANDB_MODE": "disabled", "DATA_DIR": {str(DATA_DIR)!r}, "RUNS_DIR": RUNS_DIR}}
result = run_experiment(lambda: Own(0.0), TrainingConfig.from_constants(vars(main_tutorial) | settings))
"""
NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
from test_any_network import run_notebook
print(run_notebook({folder!r}))
"""


def start_script_file(tmp_path: Path, code: str = SCRIPT + RUN) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(f"RUNS_DIR = {str(tmp_path / 'runs')!r}\n{code}")
    return start_python(tmp_path, "script.py")


def start_guarded_script(tmp_path: Path) -> subprocess.Popen[str]:
    return start_script_file(tmp_path, f"{SCRIPT}if __name__ == '__main__':{textwrap.indent(RUN, '    ')}")


def start_shell(tmp_path: Path) -> subprocess.Popen[str]:
    """Start Python's interactive shell and type the network and the run into it."""
    shell = start_python(tmp_path, "-i", "-q", stdin=subprocess.PIPE)
    assert shell.stdin is not None
    shell.stdin.write(f"RUNS_DIR = {str(tmp_path / 'runs')!r}\n{SCRIPT}{RUN}\n")
    shell.stdin.close()
    shell.stdin = None
    return shell


def start_notebook(tmp_path: Path) -> subprocess.Popen[str]:
    """Start a process that runs a notebook; the kernel is in its process group."""
    code = NOTEBOOK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    return start_python(tmp_path, "-c", code)


def run_notebook(folder: str) -> str:
    """Run a notebook with the network in one cell and the run in the next; return what it printed."""
    first = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nRUNS_DIR = {folder + '/runs'!r}\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (first + SCRIPT, RUN)])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": folder}}).execute()
    return "".join(output.get("text", "") for output in notebook.cells[1].outputs)


def kill_after_a_checkpoint(process: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_script_file, start_guarded_script, start_shell, start_notebook])
def test_killed_run_of_a_network_defined_anywhere_resumes(
    start: Callable[[Path], subprocess.Popen[str]], tmp_path: Path
) -> None:
    kill_after_a_checkpoint(start(tmp_path), tmp_path)
    output, _ = finish(start(tmp_path))
    assert "Resuming the unfinished run" in output
    (run_dir,) = run_dirs(tmp_path)
    assert run_dir.name.startswith("Own-Digits-") and (run_dir / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "resumes"),
    [("images * 1.5", "images * 2", False), ("Own(0.0)", "Own(0.5)", False), ("# a comment", "# another", True)],
)
def test_killed_run_resumes_only_with_the_same_network(old: str, new: str, resumes: bool, tmp_path: Path) -> None:
    kill_after_a_checkpoint(start_script_file(tmp_path), tmp_path)
    output, errors = finish(start_script_file(tmp_path, (SCRIPT + RUN).replace(old, new)))
    assert ("Resuming" in output) == resumes and errors == ""
    finished = [(path / "results.json").exists() for path in run_dirs(tmp_path)]
    assert finished == ([True] if resumes else [False, True])


@pytest.mark.slow
def test_killed_run_resumes_on_another_kind_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        patch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        kill_after_a_checkpoint(start_script_file(tmp_path), tmp_path)
    output, _ = finish(start_script_file(tmp_path))
    assert "Resuming the unfinished run" in output


@pytest.mark.slow
def test_workers_find_the_program_after_os_chdir(tmp_path: Path) -> None:
    """The program is found by a relative path in sys.path."""
    first = f"import os, sys\nsys.path.insert(0, '')\nimport main_tutorial\nos.chdir({str(tmp_path)!r})\n"
    code = f"{first}RUNS_DIR = {str(tmp_path)!r}\n{SCRIPT}{RUN.replace('40', '1')}"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
def test_user_without_a_name_and_a_home_trains(tmp_path: Path) -> None:
    """As with ``docker run -u 12345``; WANDB_MODE is "auto", which looks for a key in the home."""
    as_nobody = ["unshare", "-U", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME", "-u", "NETRC"]
    if shutil.which("unshare") is None or subprocess.run([*as_nobody, "true"]).returncode != 0:
        pytest.skip("unshare is not permitted here")
    options = ["--dataset=Digits", "--folds=2", "--epochs=1", f"--data-dir={DATA_DIR}", f"--runs-dir={tmp_path}"]
    command = [*as_nobody, sys.executable, str(REPOSITORY / "main_tutorial.py"), *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and list(tmp_path.glob("*/results.json"))
    assert len(run.stderr.splitlines()) <= 1  # W&B needs a home directory
