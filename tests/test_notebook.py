"""In a notebook: a script pasted into a cell runs, pictures appear under it, a mistake is one line."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import DATA_DIR, REPOSITORY, SMALL
from nbclient import NotebookClient

import main_cnn
import main_tutorial
from experiment.results import ExperimentResult


@pytest.fixture(autouse=True)
def repository_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def run_cells(folder: Path, *cells: str) -> list[list[dict[str, Any]]]:
    """Return what each cell of a notebook shows."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=240, allow_errors=True, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [cell.outputs for cell in notebook.cells]


def pasted(script: Any, folder: Path, **constants: Any) -> str:
    """Return a whole script, with some constants changed, as somebody pastes it into a cell."""
    text = Path(script.__file__).read_text()
    small = SMALL | {"EPOCHS": 1, "DATA_DIR": str(DATA_DIR), "RUNS_DIR": str(folder / "runs")} | constants
    for name, value in small.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(line, f"{name} = {value!r}")
    return text


def shown(outputs: list[dict[str, Any]]) -> str:
    """Return all that is shown as text."""
    texts = [output.get("text", "") for output in outputs]
    texts += ["\n".join(output.get("traceback", [])) for output in outputs]
    return "".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("script", [main_cnn, main_tutorial])
def test_a_script_that_is_pasted_into_a_cell_runs_and_shows_its_pictures(script: Any, tmp_path: Path) -> None:
    (outputs,) = run_cells(tmp_path, pasted(script, tmp_path))
    assert "Report, with pictures: runs/" in shown(outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_a_mistake_in_a_setting_is_one_line_once(tmp_path: Path) -> None:
    (outputs,) = run_cells(tmp_path, pasted(main_tutorial, tmp_path, EPOCHS=0))
    assert shown(outputs).strip().splitlines() == [
        "Bad configuration:",
        "  EPOCHS must be an integer of at least 1, got 0",
    ]


def test_a_result_is_three_lines(cnn_result: ExperimentResult) -> None:
    lines = repr(cnn_result).splitlines()
    assert len(lines) == 3 and str(cnn_result.run_dir) in lines[0]
    assert cnn_result.final is not None and f"{cnn_result.final.accuracy:.4f}" in lines[1]
