"""Puts small faults into each room, one at a time, and says how many of them the room's own fast tests notice.

    make mutants                            # all rooms, one after another, the quick ones first: hours
    make mutants ROOMS="results console"    # these
    make mutants ROOMS="--again console"    # what survived there the last time: after more tests, for the same room

What survives is listed by name; `cd .mutants/results && ../../.venv/bin/mutmut show <name>` shows the fault. Each room
is a copy of the repository in `.mutants/`, so what is being edited meanwhile takes no part.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

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
LONGEST = 300  # seconds that a room's tests take at most, also on a busy machine

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"one of {', '.join(ROOMS)}")
    parser.add_argument("--again", action="store_true", help="only the faults that survived the last time")
    arguments = parser.parse_args()
    unknown = [room for room in arguments.rooms if room not in ROOMS]
    if unknown:
        parser.error(f"no such room: {', '.join(unknown)}. There are {', '.join(ROOMS)}")
    lines = []
    for room in arguments.rooms or ROOMS:
        codes = codes_of(room) if arguments.again else {}
        survivors = [name for name, code in codes.items() if is_missed(code)]
        if survivors or not arguments.again:
            copy_to(COPIES / room, room)
            run_mutmut(COPIES / room, survivors)
            codes |= {name: code for name, code in codes_of(room).items() if name in survivors or name not in codes}
            save_codes(room, codes)
        lines.append(score_of(room, codes))
        print_table(lines)


def codes_of(room: str) -> dict[str, int | None]:
    """Return what mutmut noted of each fault: what pytest ended with, or why it was not tried."""
    path, _ = ROOMS[room]
    content = json.loads((COPIES / room / "mutants" / f"{path}.meta").read_text())
    return content["exit_code_by_key"]


def save_codes(room: str, codes: dict[str, int | None]) -> None:
    """Keep what is known of each fault, also of those that were not tried again, where `mutmut results` shows it."""
    meta = COPIES / room / "mutants" / f"{ROOMS[room][0]}.meta"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"exit_code_by_key": codes}))


def is_missed(code: int | None) -> bool:
    """Return whether no test noticed a fault."""
    return code in (SURVIVED, NO_TESTS)


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


def run_mutmut(folder: Path, faults: list[str]) -> None:
    """Try these faults, or all, one at a time: the machine is shared."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    command = [str(MUTMUT), "run", "--max-children", "1", *faults]
    first_seen: dict[psutil.Process, float] = {}
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None:
            end_what_hangs(psutil.Process(process.pid), folder / "mutants", first_seen)
            time.sleep(1)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def end_what_hangs(mutmut: psutil.Process, folder: Path, first_seen: dict[psutil.Process, float]) -> None:
    """End the tests of a fault that wait for ever, and so notice it; mutmut's own limit does not end all of them."""
    with contextlib.suppress(psutil.Error):  # something has just ended
        for process in mutmut.children(recursive=True):
            seconds = time.monotonic() - first_seen.setdefault(process, time.monotonic())
            if seconds > LONGEST and process.cwd() == str(folder):
                process.kill()


def score_of(room: str, codes: dict[str, int | None]) -> str:
    """Return the room's row of the table; a fault that makes a test hang or crash is noticed, too."""
    missed = sum(is_missed(code) for code in codes.values())
    not_tried = sum(code in (None, NOT_TRIED) for code in codes.values())
    noticed = len(codes) - missed - not_tried
    return f"| `{room}` | {len(codes)} | {noticed} | {100 * noticed / len(codes):.1f} % | {not_tried} |"


if __name__ == "__main__":
    main()
