"""docs/filters.py: what it draws, where it says that the picture lies, and what it never writes over."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA_DIR, REPOSITORY


def run_filters(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "docs" / "filters.py"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_picture_of_the_filters_lies_in_the_runs_folder_and_nowhere_else(run_dir: Path) -> None:
    tracked = REPOSITORY / "images" / "filters.png"
    before = tracked.read_bytes()
    run = run_filters(str(run_dir), "--data-dir", str(DATA_DIR))
    picture = run_dir / "filters.png"
    assert (run.returncode, run.stderr) == (0, "")
    assert picture.name in run.stdout and run_dir.name in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and tracked.read_bytes() == before


@pytest.mark.slow
def test_a_run_without_a_model_is_one_line(run_dir: Path) -> None:
    (run_dir / "model.pt").unlink()
    run = run_filters(str(run_dir))
    assert run.returncode == 2 and "has no model.pt" in run.stderr and len(run.stderr.splitlines()) == 2


@pytest.mark.slow
def test_it_has_a_help_and_draws_nothing_then() -> None:
    run = run_filters("--help")
    assert run.returncode == 0 and run.stdout.startswith("usage: filters.py")


@pytest.mark.slow
def test_a_run_that_is_not_there_is_one_line() -> None:
    run = run_filters("no-such-run")
    assert run.returncode == 2 and "no-such-run must name one run" in run.stderr and "Traceback" not in run.stderr
