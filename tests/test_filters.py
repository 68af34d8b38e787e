"""docs/filters.py: the figure it saves, and one line for a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA_DIR, REPOSITORY


def run_filters(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "docs" / "filters.py"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_figure_is_saved_in_the_run_directory(run_dir: Path) -> None:
    run = run_filters("--runs-dir", str(run_dir.parent), "--data-dir", str(DATA_DIR))
    figure_path = run_dir / "filters.png"
    assert (run.returncode, run.stderr) == (0, "")
    assert figure_path.name in run.stdout and run_dir.name in run.stdout
    assert figure_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_run_without_a_model_is_one_line(run_dir: Path) -> None:
    (run_dir / "model.pt").unlink()
    run = run_filters(str(run_dir))
    assert run.returncode == 2 and "has no model.pt" in run.stderr and len(run.stderr.splitlines()) == 2
