"""The house: which room may import which, what importing costs and changes, and how light a worker is."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_fit, slow, start_python

from data_utils import load_dataset

FILES = sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("experiment/*.py")])
LEVELS = ["main_cnn main_tutorial", "experiment.run", "experiment.*", "train_utils", "data_utils"]
HEAVY = "torchvision sklearn scipy wandb matplotlib pydantic joblib"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(module: str) -> set[str]:
    """Return the project's own modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def level(module: str) -> int:
    if module in ("main_cnn", "main_tutorial"):
        return 0
    return LEVELS.index(module) if module in LEVELS else 2


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"models"}))
def test_imports_run_downwards_only(module: str) -> None:
    below = {other for other in MODULES if level(other) > level(module)}
    beside = {other for other in MODULES if level(module) == level(other) == 2}
    assert imports(module) - {"models"} <= below | beside


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_entry_scripts_import_the_networks(module: str) -> None:
    assert ("models" in imports(module)) == (level(module) == 0)


def test_the_networks_import_nothing_of_the_project() -> None:
    assert not imports("models")


@pytest.mark.parametrize(
    ("module", "stands_on"),
    [
        ("errors", []),
        ("results", []),
        ("workers", []),
        ("settings", ["errors", "wandb_sweep"]),
        ("plan", ["errors", "settings"]),
        ("console", ["results"]),
        ("figures", ["console", "errors", "results", "settings"]),
        ("run_directory", ["console", "errors", "network"]),
    ],
)
def test_a_room_of_the_experiment_stands_on_these_at_most(module: str, stands_on: list[str]) -> None:
    rooms = {name for name in imports(f"experiment.{module}") if name.startswith("experiment.")}
    assert rooms <= {f"experiment.{name}" for name in stands_on}


def test_no_import_runs_in_a_circle() -> None:
    left = {module: imports(module) for module in MODULES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_the_house_has_the_rooms_of_the_design() -> None:
    rooms = {module.removeprefix("experiment.") for module in MODULES if module.startswith("experiment.")}
    assert rooms == set(
        "run plan training network settings workers run_directory results past_runs compare classify wandb_runs "
        "wandb_key wandb_sweep console figures errors".split()
    )


IMPORTING = """
import logging, signal, sys
before = (sys.excepthook, sys.stdin, sys.stdout, sys.stderr, logging.root.level, logging.root.handlers[:])
signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
import main_cnn, main_tutorial, experiment.compare
assert signals == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
assert before == (sys.excepthook, sys.stdin, sys.stdout, sys.stderr, logging.root.level, logging.root.handlers)
assert logging.getLogger("matplotlib").level == logging.NOTSET
print(*({"wandb", "sklearn", "scipy", "matplotlib", "torchvision", "dask", "distributed"} & set(sys.modules)))
"""


def test_importing_changes_nothing_in_the_process_and_waits_for_no_library_that_only_a_run_needs() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTING], cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


@pytest.mark.parametrize("imported", ["models, train_utils, data_utils", "experiment.workers"])
def test_a_worker_is_light(imported: str) -> None:
    code = f"import sys, {imported}; print(*(set({HEAVY!r}.split()) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize(
    "home", ["", *slow("/proc/none", "/proc")], ids=["a home", "no home", "a home without write permission"]
)
def test_a_run_prints_nothing_on_standard_error(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if home:  # nobody can write there, not even root
        monkeypatch.setenv("HOME", home)
        monkeypatch.delenv("NETRC")  # W&B shall look for it there
    options = ["--dataset=Digits", "--folds=2", "--epochs=1", "--wandb-mode=offline", f"--runs-dir={tmp_path / 'runs'}"]
    run = start_python(tmp_path, str(REPOSITORY / "main_tutorial.py"), *options)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and errors == ""
    assert "wandb sync" in output


def test_a_worker_that_has_trained_is_light(tmp_path: Path) -> None:
    load_dataset("Digits", tmp_path)  # which takes scikit-learn, once
    fit = make_fit(DATA_DIR=tmp_path, EPOCHS=1)
    code = f"""
import pickle, sys, train_utils
train_utils.run_epoch(pickle.loads({pickle.dumps(fit)!r}), 1, None)
print(*(set({HEAVY!r}.split()) & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_only_what_a_reader_came_for_stands_at_the_root() -> None:
    at_the_root = {module for module in MODULES if not module.startswith("experiment")}
    assert at_the_root == {"main_cnn", "main_tutorial", "models", "train_utils", "data_utils"}
