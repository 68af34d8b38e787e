"""The page of all runs: its groups, rows and states, its size and time, and several processes that write it."""

import html
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, start_python
from filelock import FileLock
from hand_made import HISTORIES, make_experiment
from synthetic_runs import BASE, BETTER, make_identity, make_run, write_json

from comparison.index import write_index
from comparison.run_reader import read_run
from experiment import pages
from experiment.errors import RunError
from experiment.pages import relative_url
from experiment.report import unfinished_page


def write(runs_dir: Path) -> str:
    return write_index(runs_dir).read_text(encoding="utf-8")


def rows_of(page: str) -> list[str]:
    """Return the rows of all tables as text."""
    bodies = re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL)
    rows = [row for body in bodies for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    return [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", row)).split()) for row in rows]


def make_unfinished(path: Path, resume: bool = True, **changes: Any) -> Path:
    path.mkdir(parents=True)
    write_json(path / "config.json", {"resume": resume, "identity": make_identity(**changes), "wandb_id": "x"})
    (path / "report.html").write_text(
        '<html data-state="running"><noscript>reload</noscript><script>"running"</script>', encoding="utf-8"
    )
    return path


def test_rows_are_grouped_by_their_images_the_newest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000")
    make_run(tmp_path / "N-20261126-183100", BETTER, minutes=1, mirror=True)
    make_run(tmp_path / "K-20261126-183200", minutes=2, images="77", dataset="KMNIST")
    make_run(tmp_path / "N-20261126-183300", [*BASE[:4], np.nan], minutes=3, mirror=True, epochs=3)
    page = write(tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "FashionMNIST, 5 folds, RNG_SEED 314",
        "KMNIST, 5 folds, RNG_SEED 314",
    ]
    assert rows_of(page) == [
        "26 Nov 18:33 EPOCHS 10 → 3 0.9233 0.0767 identical (fold-5 diverged) 42 s",
        "26 Nov 18:31 MIRROR False → True 0.9322 0.0678 better 42 s",
        "26 Nov 18:30 no earlier result 0.9232 0.0768 baseline 42 s",
        "26 Nov 18:32 no earlier result 0.9232 0.0768 baseline 42 s",
    ]
    assert page.count('class="diamond filled"') == 2 and page.count('<svg class="axis"') == 2


def test_a_run_can_be_chosen_as_the_baseline(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000")
    chosen = read_run(make_run(tmp_path / "N-20261126-183100", BETTER, minutes=1, mirror=True))
    page = write_index(tmp_path, chosen).read_text()
    assert "Baseline: N-20261126-183100." in page
    assert [row.split()[-3] for row in rows_of(page)] == ["baseline", "worse"]


def test_runs_on_the_same_images_in_another_shape_are_one_group(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000", source="s")
    make_run(tmp_path / "N-20261126-183100", BETTER, minutes=1, images="77", source="s", image_shape=[3, 64, 64])
    page = write(tmp_path)
    assert page.count("<h2>") == 1
    assert rows_of(page)[0].startswith("26 Nov 18:31 IMAGE_SHAPE (1, 28, 28) → (3, 64, 64) 0.9322 0.0678 better")


def test_macro_f1_of_unequal_classes_has_columns_and_a_verdict(tmp_path: Path) -> None:
    unequal: dict[str, Any] = {"class_sizes": {"Coat": 90, "Shirt": 30}}
    make_run(tmp_path / "N-20261126-183000", losses=[0.0767, 0.0769, 0.0767, 0.0769, 0.0768], **unequal)
    make_run(tmp_path / "N-20261126-183100", BETTER, losses=[0.0768] * 5, minutes=1, mirror=True, **unequal)
    page = write(tmp_path)
    assert "Macro F1 − baseline" in page and page.count('<svg class="axis"') == 3
    assert rows_of(page) == [
        "26 Nov 18:31 MIRROR False → True 0.9322 0.0768 0.8322 better (accuracy), not significant (loss), better "
        "(macro F1) 42 s",
        "26 Nov 18:30 no earlier result 0.9232 0.0768 0.8232 baseline 42 s",
    ]


def test_running_and_stopped_runs_are_rows_and_a_killed_runs_page_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000")
    running = make_unfinished(tmp_path / "N-20261126-183100", mirror=True)
    stopped = make_unfinished(tmp_path / "N-20261126-183200")
    (stopped / ".lock").touch()
    with FileLock(running / ".lock"):
        newest, running_row, _ = rows_of(write(tmp_path))
    assert running_row == "26 Nov 18:31 MIRROR False → True running"
    assert newest == "26 Nov 18:32 repetition stopped; the same command resumes it"
    assert 'data-state="running"' in (running / "report.html").read_text(encoding="utf-8")
    assert (stopped / "report.html").read_text(encoding="utf-8") == (
        '<html data-state="stopped"><script>"running"</script>'
    )


def test_rows_show_the_seconds_and_the_year_where_runs_are_not_told_apart_otherwise(tmp_path: Path) -> None:
    year = datetime.now().year
    names = ("N-20191126-183000", f"N-{year}0126-183000", f"N-{year}0126-183001", f"N-{year}0127-183001")
    for minutes, name in enumerate(names):
        make_run(tmp_path / name, minutes=minutes)
    times = [row.split(" repetition")[0].split(" no earlier")[0] for row in rows_of(write(tmp_path))]
    assert times == ["27 Jan 18:30", "26 Jan 18:30:01", "26 Jan 18:30:00", "26 Nov 2019 18:30"]


def test_rows_show_the_epochs_of_unfinished_runs_and_which_have_failed(tmp_path: Path) -> None:
    runs = [make_unfinished(tmp_path / f"N-20261126-18300{number}", epochs=number + 1) for number in range(3)]
    checkpoints = {name: {"history": history, "failure": None} for name, history in HISTORIES.items()}
    for run, state in zip(runs, ("failed", "interrupted", "running"), strict=True):
        (run / "report.html").write_bytes(unfinished_page(make_experiment(), run, checkpoints, state))
    with FileLock(runs[2] / ".lock"):
        states = [re.findall("(?:running|failed|stopped).*", row) for row in rows_of(write(tmp_path))]
    assert states == [
        ["running, 6 of 6 epochs"],
        ["stopped after 6 of 6 epochs; the same command resumes it"],
        ["failed after 6 of 6 epochs; the same command resumes it"],
    ]


def test_row_of_a_run_without_resume_says_that_it_needs_it(tmp_path: Path) -> None:
    make_unfinished(tmp_path / "N-20261126-183000", resume=False)
    (row,) = rows_of(write(tmp_path))
    assert row.endswith("stopped; the same command, with RESUME = True, resumes it")


def test_page_reloads_itself_only_while_a_run_is_running(tmp_path: Path) -> None:
    with FileLock(make_unfinished(tmp_path / "run") / ".lock"):
        page = write(tmp_path)
        assert 'data-state="running"' in page and "Stop reloading</button>" in page and 'http-equiv="refresh"' in page
    page = write(tmp_path)
    assert 'data-state=""' in page and "Stop reloading</button>" not in page and 'http-equiv="refresh"' not in page


def test_page_of_a_killed_run_in_a_folder_of_another_user_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path, _content: bytes) -> None:
        raise RunError("Permission denied")

    monkeypatch.setattr(pages, "write_atomically", refuse)
    run = make_unfinished(tmp_path / "run")
    (run / ".lock").touch()
    assert "stopped" in rows_of(write(tmp_path))[0]


def test_folder_that_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path) -> None:
    make_unfinished(tmp_path / "old")
    write_json(tmp_path / "old" / "config.json", {"folds": 2})
    (row,) = rows_of(write(tmp_path))
    assert row.startswith("old ") and "written by another version of this program" in row


def test_folder_without_runs_has_a_page(tmp_path: Path) -> None:
    assert "There is no run yet." in write(tmp_path)


def test_names_of_folders_are_text_and_links_lead_to_them(tmp_path: Path) -> None:
    name = """<b>&"'🐈#?%"""
    make_run(tmp_path / name)
    (tmp_path / name / "report.html").touch()
    page = write(tmp_path)
    assert "<b>" not in page and rows_of(page)[0].startswith(f"{name} no earlier")
    assert relative_url(name, "report.html") == "%3Cb%3E%26%22%27%F0%9F%90%88%23%3F%25/report.html"
    assert f'<a href="{relative_url(name, "report.html")}"' in page


def test_page_of_300_runs_is_small_and_quickly_written(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    rng = np.random.default_rng(0)
    for number in range(300):
        accuracies = BASE + rng.normal(0, 0.003, 5)
        make_run(
            runs_dir / f"N-20261126-{number:06}", accuracies, minutes=number, epochs=1 + number, classes="abcdefghij"
        )
    code = (
        "import time; from pathlib import Path; from comparison.index import write_index;"
        "start = time.process_time(); write_index(Path('runs')); print(time.process_time() - start)"
    )
    output, errors = start_python(tmp_path, "-c", code).communicate(timeout=60)
    assert errors == "" and float(output) < 2  # processor time, which other tests beside this one do not lengthen
    assert (runs_dir / "index.html").stat().st_size < 1e6


def test_index_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", BETTER, minutes=1)
    code = "import sys; from pathlib import Path; from comparison.index import write_index; write_index(Path('runs'));"
    code += "print({'torch', 'matplotlib'} & set(sys.modules))"
    assert start_python(tmp_path, "-c", code).communicate(timeout=60) == ("set()\n", "")


@pytest.mark.slow
def test_processes_that_write_it_at_the_same_time_leave_one_whole_page(tmp_path: Path) -> None:
    for number in range(20):
        make_run(tmp_path / "runs" / f"N-20261126-{number:06}", BASE + number / 1e4, minutes=number, epochs=1 + number)
    command = (str(REPOSITORY / "compare.py"), "--runs-dir", "runs")
    processes = [start_python(tmp_path, *command) for _ in range(4)]
    for process in processes:
        assert process.wait(60) == 0
    page = (tmp_path / "runs" / "index.html").read_text(encoding="utf-8")
    assert len(rows_of(page)) == 20 and page.endswith("</html>")
    assert not list((tmp_path / "runs").glob(".*unfinished"))
