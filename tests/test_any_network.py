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
    assert "Going on with" not in printed and "2 at a time" in " ".join(printed.split())
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()


EDITED = """
SCALE = 1.0

def helper(images):
    return images * SCALE

class Edited(Own):
    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift
        with torch.no_grad():
            self.layers[3].bias.fill_(0.1)  # a comment

    def forward(self, images):
        return super().forward(helper(images)) + self.shift

"""
EDITS = {
    "a helper function": ("return images * SCALE", "return -images * SCALE"),
    "a constant beside the class": ("SCALE = 1.0", "SCALE = 1.5"),
    "an initialisation": ("fill_(0.1)", "fill_(0.2)"),
    "the argument of a lambda": ("Edited(0.0)", "Edited(0.5)"),
    "a method that is inherited": ("(1 + self.slope)", "(2 + self.slope)"),
}
KINDS_OF_CPU = {"AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}


def script_with(edit: tuple[str, str], tmp_path: Path) -> str:
    run = fill(RUN, tmp_path, 40).replace("run_experiment(Own,", "run_experiment(lambda: Edited(0.0),")
    code = f"import torch\n{NETWORK}{EDITED}{run}"
    assert edit[0] in code
    (tmp_path / "script.py").write_text(code.replace(*edit))
    return "script.py"


def begin_and_kill(script: str, tmp_path: Path) -> None:
    process = start_python(tmp_path, script)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_a_killed_run_does_not_go_on_with_another_network(edit: str, tmp_path: Path) -> None:
    begin_and_kill(script_with(("", ""), tmp_path), tmp_path)
    output, errors = finish(start_python(tmp_path, script_with(EDITS[edit], tmp_path)))
    assert "Going on with" not in output and errors == ""
    assert [(path / "results.json").exists() for path in run_dirs(tmp_path)] == [False, True]


@pytest.mark.slow
def test_a_killed_run_goes_on_though_a_comment_was_reworded(tmp_path: Path) -> None:
    begin_and_kill(script_with(("", ""), tmp_path), tmp_path)
    output, _ = finish(start_python(tmp_path, script_with(("# a comment", "# another one"), tmp_path)))
    assert "Going on with the unfinished run" in output
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_CPU)
def test_a_run_that_was_begun_on_another_kind_of_cpu_goes_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_with(('"WORKERS": 2', '"PRECISION": "float32", "WORKERS": 2'), tmp_path)
    with monkeypatch.context() as patch:
        for name, value in KINDS_OF_CPU[kind].items():
            patch.setenv(name, value)
        begin_and_kill(script, tmp_path)
    output, _ = finish(start_python(tmp_path, script))
    assert "Going on with the unfinished run" in output


@pytest.mark.slow
def test_a_user_without_a_name_and_a_home_trains(tmp_path: Path) -> None:
    """As with ``docker run -u 12345`` and on OpenShift; with WANDB_MODE = "auto", which looks for a key."""
    as_nobody = ["unshare", "-U", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME", "-u", "NETRC"]
    if shutil.which("unshare") is None or subprocess.run([*as_nobody, "true"]).returncode != 0:
        pytest.skip("no user can be made up here, so nothing was tested")
    options = ["--dataset=Digits", "--folds=2", "--epochs=1", f"--data-dir={DATA_DIR}", f"--runs-dir={tmp_path}"]
    command = [*as_nobody, sys.executable, str(REPOSITORY / "main_tutorial.py"), *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (run.returncode, run.stderr) == (0, "")
    assert "W&B: upload the runs with" in run.stdout and list(tmp_path.glob("*/results.json"))
