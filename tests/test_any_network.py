"""Networks that users define where they please: in a script of their own, in a notebook's cell, in a shell."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from conftest import DATA_DIR, REPOSITORY, checkpoints, finish, run_dirs, start_python, wait_for
from nbclient import NotebookClient

NETWORK = """
from torch import nn
import main_tutorial
from experiment.run import run_experiment
from experiment.settings import TrainingConfig

class Own(nn.Module):
    slope = 0.1

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.layers(images) * (1 + self.slope)

"""
RUN = """
settings = {{"DATASET": "Digits", "FOLDS": 2, "EPOCHS": {epochs}, "WORKERS": 2, "WANDB_MODE": "disabled"}}
settings |= {{"DATA_DIR": {data_dir!r}, "RUNS_DIR": {runs_dir!r}}}
result = run_experiment(Own, TrainingConfig.from_constants(vars(main_tutorial) | settings))
"""
GUARDED = "if __name__ == '__main__':" + textwrap.indent(RUN, "    ")


def fill(run: str, tmp_path: Path, epochs: int) -> str:
    return run.format(epochs=epochs, data_dir=str(DATA_DIR), runs_dir=str(tmp_path / "runs"))


def write_script(run: str, tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(NETWORK + fill(run, tmp_path, 40))
    return "script.py"


def start_shell(tmp_path: Path) -> subprocess.Popen[str]:
    """Start Python's interactive shell and type the network and the run into it."""
    shell = start_python(tmp_path, "-i", "-q", stdin=subprocess.PIPE)
    assert shell.stdin is not None
    shell.stdin.write(NETWORK.replace("\n\n    def", "\n    def") + fill(RUN, tmp_path, 40) + "\n")
    shell.stdin.close()
    shell.stdin = None
    return shell


def run_notebook(tmp_path: Path, epochs: int, first: str = "") -> str:
    """Run a notebook whose first cell has the network and whose second one the run; return what it printed."""
    cells = [first + NETWORK, fill(RUN, tmp_path, epochs)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return "".join(output.get("text", "") for output in notebook.cells[1].outputs)


@pytest.mark.slow
@pytest.mark.parametrize("run", [RUN, GUARDED], ids=["without a guard", "with a guard"])
def test_a_network_of_ones_own_script_trains_and_goes_on_after_kill_9(run: str, tmp_path: Path) -> None:
    script = write_script(run, tmp_path)
    process = start_python(tmp_path, script)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output, errors = finish(start_python(tmp_path, script))
    assert "Going on with the unfinished run" in output and errors == ""
    (run_dir,) = run_dirs(tmp_path)
    assert run_dir.name.startswith("Own-Digits-") and (run_dir / "results.json").exists()


@pytest.mark.slow
def test_a_network_of_the_interactive_shell_trains_and_goes_on_after_kill_9(tmp_path: Path) -> None:
    process = start_shell(tmp_path)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output, errors = finish(start_shell(tmp_path))
    assert "Going on with the unfinished run" in output, errors
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()


@pytest.mark.slow
def test_a_network_of_a_notebooks_cell_trains_and_goes_on_after_kill_9(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_any_network import run_notebook
run_notebook(Path({str(tmp_path)!r}), 40)
"""
    process = start_python(tmp_path, "-c", code)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)  # the kernel is in this process's group
    process.communicate()
    assert "Going on with the unfinished run" in run_notebook(tmp_path, 40)
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()


@pytest.mark.slow
def test_a_notebook_that_finds_the_repository_by_sys_path_trains_at_its_first_try(tmp_path: Path) -> None:
    printed = run_notebook(tmp_path, 2, first=f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n")
    assert "Going on with" not in printed and "2 at a time" in printed
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()


LINES = [
    "            nn.MaxPool2d(kernel_size=2, stride=2),  # 7 × 7\n",
    "            nn.BatchNorm2d(64),\n            nn.ReLU(),\n        )\n",
]
EDITS = {  # of conv_stack in models.py: what stands there, and what a reader makes of it
    "as it is": (LINES[0], LINES[0]),
    "a layer added": (LINES[0], f"{LINES[0]}            nn.GELU(),\n"),
    "convolution and norm added": (LINES[0], f"{LINES[0]}            nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64),\n"),
    "the last norm taken out": (LINES[1], "            nn.ReLU(),\n        )\n"),
    "the last activation taken out": (LINES[1], "            nn.BatchNorm2d(64),\n        )\n"),
}
IDENTIFY = """
import json, main_cnn
from conftest import make_fit
from experiment.run_directory import identify
from experiment.settings import TrainingConfig

network = main_cnn.ConvolutionalNeuralNetwork
print(json.dumps(identify(TrainingConfig.from_constants(vars(main_cnn)), make_fit(network), network())))
"""


def copy_repository(edit: str, folder: Path) -> Path:
    """Copy the program into a folder, with its network edited."""
    folder.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(REPOSITORY / "experiment", folder / "experiment")
    shutil.copytree(DATA_DIR / "Digits", folder / "data" / "Digits")
    models = (folder / "models.py").read_text(encoding="utf-8")
    assert models.count(EDITS[edit][0]) == 1
    (folder / "models.py").write_text(models.replace(*EDITS[edit]), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["convolution and norm added", "the last norm taken out"])
def test_a_conv_stack_that_was_edited_in_models_py_trains_and_does_not_go_on_with_another_run(
    edit: str, tmp_path: Path
) -> None:
    def start(edit: str, epochs: int) -> subprocess.Popen[str]:
        folder = copy_repository(edit, tmp_path / f"{edit}, {epochs} epochs")
        options = f"--dataset=Digits --folds=2 --epochs={epochs} --workers=2 --wandb-mode=disabled --batch-size=256"
        runs = f"--runs-dir={tmp_path / 'runs'}"
        return start_python(tmp_path, str(folder / "main_cnn.py"), *options.split(), runs)

    process = start("as it is", 3)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output, errors = finish(start(edit, 3))
    assert "Going on with" not in output and errors == ""
    assert [(path / "results.json").exists() for path in run_dirs(tmp_path)] == [False, True]


@pytest.mark.slow
def test_each_edit_of_the_conv_stack_has_another_identity_and_the_same_one_has_the_same(tmp_path: Path) -> None:
    def identity(number: int, edit: str) -> str:
        folder = copy_repository(edit, tmp_path / f"{number}")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
        return subprocess.check_output([sys.executable, "-c", IDENTIFY], cwd=folder, env=environment, text=True)

    identities = [identity(*each) for each in enumerate(["as it is", *EDITS])]
    assert identities[0] == identities[1] and len(set(identities)) == len(EDITS)


def test_a_class_without_source_has_the_same_identity_in_two_processes_and_another_when_it_changes() -> None:
    def source(slope: str) -> str:
        code = NETWORK.replace("return self.layers(images)", f"return {slope} * self.layers(images)")
        code += "from experiment.run_directory import _source_of\nprint(_source_of(Own()))"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)

    assert source("2") == source("2") != source("3")
