"""The modules of the program: which may import which, what importing costs and changes, and what a worker loads."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_fit, slow, start_python

from data_files import load_dataset

SCRIPTS = {"main_cnn", "main_tutorial", "compare", "classify"}
FOR_WORKERS = ["train_utils", "data_files", "data_utils"]
EXPERIMENT = (
    "run settings resources prepare model_check identity training executors run_directory results terminal formatting "
    "predictions plots charts pages report unfinished_runs wandb_logging wandb_key wandb_sweep files errors"
).split()
COMPARISON = "run_reader changes statistics pair pair_page overview index forest_plot".split()
ALLOWED_IN_COMPARISON = {
    f"experiment.{name}" for name in ("identity", "files", "errors", "formatting", "plots", "charts", "pages")
}
HEAVY = "torchvision sklearn scipy wandb matplotlib pydantic joblib jinja2"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for folder in (".", "experiment", "comparison") for path in (REPOSITORY / folder).glob("*.py")]
MODULES = {module_name(path): path for path in FILES}


def imports(module: str) -> set[str]:
    """Return the project's own modules that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def imports_at_run_time(module: str) -> set[str]:
    """Return the same without those that only type checkers read."""
    tree = ast.parse(MODULES[module].read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def level(module: str) -> int:
    """Return the level of a module: it may import those of higher numbers and, within the packages, of its own."""
    if module in SCRIPTS:
        return 0
    if module == "experiment.run":
        return 1
    return 3 + FOR_WORKERS.index(module) if module in FOR_WORKERS else 2


def test_the_modules_are_those_of_the_design() -> None:
    packages = {f"experiment.{name}" for name in EXPERIMENT} | {f"comparison.{name}" for name in COMPARISON}
    assert set(MODULES) == SCRIPTS | {"models", "experiment", "comparison"} | set(FOR_WORKERS) | packages


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"models"}))
def test_imports_point_downwards(module: str) -> None:
    below = {other for other in MODULES if level(other) > level(module)}
    beside = {other for other in MODULES if level(module) == level(other) == 2}
    assert imports(module) - {"models"} <= below | beside


@pytest.mark.parametrize("module", [f"comparison.{name}" for name in COMPARISON])
def test_comparison_imports_little_of_experiment(module: str) -> None:
    of_experiment = {name for name in imports(module) if name.startswith("experiment.")}
    assert of_experiment <= ALLOWED_IN_COMPARISON


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"main_cnn", "main_tutorial", "classify"}))
def test_only_entry_scripts_import_the_networks(module: str) -> None:
    assert "models" not in imports(module)


def test_networks_import_nothing_of_the_project() -> None:
    assert not imports("models")


def test_imports_form_no_circle() -> None:
    left = {module: imports_at_run_time(module) for module in MODULES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left


IMPORTING = """
import logging, signal, sys
before = (sys.excepthook, sys.stdin, sys.stdout, sys.stderr, logging.root.level, logging.root.handlers[:])
signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
import main_cnn, main_tutorial, compare, classify
assert signals == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
assert before == (sys.excepthook, sys.stdin, sys.stdout, sys.stderr, logging.root.level, logging.root.handlers)
assert logging.getLogger("matplotlib").level == logging.NOTSET
print(*({"wandb", "sklearn", "scipy", "matplotlib", "torchvision", "dask", "distributed", "jinja2"} & set(sys.modules)))
"""


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


def test_importing_the_scripts_changes_nothing_and_loads_no_library_that_only_a_run_needs() -> None:
    run = run_code(IMPORTING)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


@pytest.mark.parametrize("imported", ["compare", "classify", ", ".join(f"comparison.{name}" for name in COMPARISON)])
def test_a_command_loads_torch_only_when_it_is_needed(imported: str) -> None:
    run = run_code(f"import sys, {imported}; print(*({{'torch', 'matplotlib'}} & set(sys.modules)))")
    assert (run.stdout.strip(), run.stderr) == ("", "")


@pytest.mark.parametrize("imported", ["models, train_utils, data_utils, data_files", "experiment.executors"])
def test_a_worker_loads_no_heavy_library(imported: str) -> None:
    run = run_code(f"import sys, {imported}; print(*(set({HEAVY!r}.split()) & set(sys.modules)))")
    assert (run.stdout.strip(), run.stderr) == ("", "")


def test_a_worker_that_has_trained_has_loaded_no_heavy_library(tmp_path: Path) -> None:
    load_dataset("Digits", tmp_path)  # loads scikit-learn, once
    fit = make_fit(DATA_DIR=tmp_path, EPOCHS=1)
    code = f"""
import pickle, sys, train_utils
train_utils.run_epoch(pickle.loads({pickle.dumps(fit)!r}), 1, None)
print(*(set({HEAVY!r}.split()) & set(sys.modules)))
"""
    run = run_code(code)
    assert (run.stdout.strip(), run.stderr) == ("", "")


@pytest.mark.parametrize(
    "home", slow("", "/proc/none", "/proc"), ids=["a home", "no home", "a home without write permission"]
)
def test_a_run_prints_nothing_on_standard_error(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if home:  # not writable, not even for root
        monkeypatch.setenv("HOME", home)
        monkeypatch.delenv("NETRC")  # so that W&B looks for it there
    options = ["--dataset=Digits", "--folds=2", "--epochs=1", "--wandb-mode=offline", f"--runs-dir={tmp_path / 'runs'}"]
    run = start_python(tmp_path, str(REPOSITORY / "main_tutorial.py"), *options)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and errors == ""
    assert "wandb sync" in output
