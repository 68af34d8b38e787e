"""Puts small faults into each room, one at a time, and says how many of them the room's own fast tests notice.

    make mutants                            # all rooms, one after another, the quick ones first: hours
    make mutants ROOMS="results console"    # these

What survives is listed by name; `cd .mutants/results && ../../.venv/bin/mutmut show <name>` shows the fault. Each room
is a copy of the repository in `.mutants/`, so what is being edited meanwhile takes no part.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COPIES = REPOSITORY / ".mutants"
MUTMUT = Path(sys.executable).parent / "mutmut"
CARRIED = ("main_cnn.py", "main_tutorial.py", "models.py", "wandb_api_key.txt", "README.md", "docs", "sweep.yaml")
ADDED_TO_CONFTEST = """
import shutil
import matplotlib.figure, scipy.special, scipy.stats, sklearn.metrics, sklearn.model_selection  # once, not a fault

_start = subprocess.Popen.__init__


def _start_beside_mutmuts_settings(process, *arguments, cwd=None, **keywords):
    if cwd and not (Path(cwd) / "pyproject.toml").exists():
        shutil.copy(REPOSITORY / "pyproject.toml", cwd)
    _start(process, *arguments, cwd=cwd, **keywords)


subprocess.Popen.__init__ = _start_beside_mutmuts_settings
"""
SURVIVED, NO_TESTS = 0, 33  # what mutmut notes of a fault, where it is not that a test failed
NOT_TRIED = 255  # mutmut calls it a time-out; seen where a test's name has characters by which pytest cannot find it

MEMORY = 12 * 2**30  # bytes of address space a process may have: a fault may let a loop collect without end

# A room → its file and its tests.
ROOMS = {
    "results": ("experiment/results.py", "tests/test_results.py"),
    "console": ("experiment/console.py", "tests/test_console.py"),
    "figures": ("experiment/figures.py", "tests/test_figures.py"),
    "past_runs": ("experiment/past_runs.py", "tests/test_past_runs.py"),
    "compare": ("experiment/compare.py", "tests/test_compare.py"),
    "settings": ("experiment/settings.py", "tests/test_settings.py"),
    "plan": ("experiment/plan.py", "tests/test_plan.py"),
    "run_directory": ("experiment/run_directory.py", "tests/test_run_directory.py"),
    "wandb_key": ("experiment/wandb_key.py", "tests/test_wandb_key.py"),
    "network": ("experiment/network.py", "tests/test_network.py"),
    "data_utils": ("data_utils.py", "tests/test_data_utils.py"),
    "train_utils": ("train_utils.py", "tests/test_train_utils.py"),
}


def main() -> None:
    """Measure the rooms that the command line names, or all."""
    rooms = sys.argv[1:] or list(ROOMS)
    unknown = [room for room in rooms if room not in ROOMS]
    if unknown:
        sys.exit(f"No such room: {', '.join(unknown)}. There are {', '.join(ROOMS)}.")
    lines = []
    for room in rooms:
        copy_to(COPIES / room, room)
        run_mutmut(COPIES / room)
        lines.append(score_of(COPIES / room, room))
        print_table(lines)


def print_table(rows: list[str]) -> None:
    """Print the table of the rooms that are done."""
    headings = ["| room | faults | noticed | share | not tried |", "| --- | --- | --- | --- | --- |"]
    print("\n".join(headings + rows), flush=True)


def copy_to(folder: Path, room: str) -> None:
    """Copy the repository, with mutmut's settings for this room."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("experiment", "tests", *CARRIED):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for name in ("data_utils.py", "train_utils.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    with open(folder / "tests" / "conftest.py", "a", encoding="utf-8") as file:
        file.write(ADDED_TO_CONFTEST)
    (folder / "mutants").mkdir()
    (folder / "mutants" / "data").symlink_to(REPOSITORY / "data")
    with open(folder / "pyproject.toml", "a", encoding="utf-8") as file:
        file.write(settings_of(room))


def settings_of(room: str) -> str:
    """Return mutmut's settings for a room."""
    path, tests = ROOMS[room]
    values = {
        "source_paths": ["experiment", "data_utils.py", "train_utils.py"],
        "only_mutate": [path],
        "also_copy": list(CARRIED),
        "pytest_add_cli_args": ["-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": [tests],
        "process_isolation": "forkserver",  # torch's threads do not survive a fork
        "timeout_constant": 60.0,  # seconds: on a busy machine a test may take long without being stuck
        "use_git_change_detection": False,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]  # TOML writes these as JSON does
    return "\n".join(["", "[tool.mutmut]", *lines, ""])


def run_mutmut(folder: Path) -> None:
    """Try each fault, one at a time: the machine is shared."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    subprocess.run([MUTMUT, "run", "--max-children", "1"], cwd=folder, env=environment, check=False)


def score_of(folder: Path, room: str) -> str:
    """Return the room's row of the table; a fault that makes a test hang or crash is noticed, too."""
    path, _ = ROOMS[room]
    content = json.loads((folder / "mutants" / f"{path}.meta").read_text())
    codes = Counter(content["exit_code_by_key"].values())
    faults = codes.total()
    missed = codes[SURVIVED] + codes[NO_TESTS]
    not_tried = codes[NOT_TRIED] + codes[None]
    noticed = faults - missed - not_tried
    return f"| `{room}` | {faults} | {noticed} | {100 * noticed / faults:.1f} % | {not_tried} |"


if __name__ == "__main__":
    main()
