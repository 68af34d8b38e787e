"""docs/filters.py: the figure it saves, and one line for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA_DIR, REPOSITORY


def run_filters(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "docs" / "filters.py"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_figure_is_saved_in_the_run_directory_only(run_dir: Path) -> None:
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
def test_help_is_printed() -> None:
    run = run_filters("--help")
    assert run.returncode == 0 and run.stdout.startswith("usage: filters.py")


@pytest.mark.slow
def test_a_missing_run_is_one_line() -> None:
    run = run_filters("no-such-run")
    assert run.returncode == 2 and "no-such-run" in run.stderr and "Traceback" not in run.stderr
