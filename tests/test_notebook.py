"""In a notebook: a script that is pasted into a cell runs, its report appears under it, a mistake is one message."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import DATA_DIR, REPOSITORY, SMALL
from nbclient import NotebookClient

import main_cnn
import main_tutorial
from experiment.results import ExperimentResult


def run_cell(folder: Path, script: Any, **constants: Any) -> list[dict[str, Any]]:
    """Paste a whole script, with some constants changed, into a notebook's cell; return the cell's outputs."""
    code = Path(script.__file__).read_text()
    small = SMALL | {"EPOCHS": 1, "DATA_DIR": str(DATA_DIR), "RUNS_DIR": str(folder / "runs")} | constants
    for name, value in small.items():
        (line,) = (line for line in code.splitlines() if line.startswith(f"{name} = "))
        code = code.replace(line, f"{name} = {value!r}")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=240, allow_errors=True, resources=resources).execute()
    return notebook.cells[0].outputs


def text_of(outputs: list[dict[str, Any]]) -> str:
    """Return everything that is shown as text."""
    texts = [output.get("text", "") for output in outputs]
    tracebacks = ["\n".join(output.get("traceback", [])) for output in outputs]
    return "".join(texts + tracebacks)


@pytest.mark.slow
@pytest.mark.parametrize("script", [main_cnn, main_tutorial])
def test_script_pasted_into_a_cell_runs_and_shows_its_report(script: Any, tmp_path: Path) -> None:
    outputs = run_cell(tmp_path, script)
    assert "Report, with pictures: runs/" in text_of(outputs)
    (frame,) = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert frame.startswith("<iframe srcdoc=") and frame.count("&lt;figure&gt;&lt;div") == 3
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_mistake_in_a_setting_is_one_message(tmp_path: Path) -> None:
    outputs = run_cell(tmp_path, main_tutorial, EPOCHS=0)
    expected = ["Bad configuration:", "  EPOCHS must be an integer of at least 1, got 0"]
    assert text_of(outputs).strip().splitlines() == expected


def test_result_is_displayed_in_three_lines(cnn_result: ExperimentResult) -> None:
    lines = repr(cnn_result).splitlines()
    assert len(lines) == 3 and str(cnn_result.run_dir) in lines[0]
    assert cnn_result.final is not None and f"{cnn_result.final.accuracy:.4f}" in lines[1]
