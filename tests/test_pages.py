"""The pages in a real browser: Chromium without a display; skipped where it or its driver is not installed."""

import html
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Start, finish, run_dirs, wait_for
from filelock import FileLock
from hand_made import HISTORIES, RUN_DIR, make_experiment, make_hand_made_result
from synthetic_runs import BASE, BETTER, NOISE, make_run

from comparison.index import write_index
from comparison.pair import compare_runs
from comparison.pair_page import write_pair_page
from comparison.run_reader import read_run
from experiment.plots import draw_figures
from experiment.report import report_page, unfinished_page
from models import NeuralNetwork

pytestmark = pytest.mark.slow
Open = Callable[..., Any]
NAME = """<b onmouseover="alert(1)">&"'🐈</b>"""
LONG_NAMES = [f"{NAME}-a-very-long-name-of-a-class-without-any-blank-{number}" for number in range(37)]
SCROLL_BAR = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return the installed Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Return a function that opens a file; in the end, no page has had an error or requested anything else."""
    contexts, problems = [], []

    def open_page(path: Path, width: int = 1440, scheme: str = "light", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: None if request.url == path.as_uri() else problems.append(request.url[:99]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a page of each kind and state, with names of classes and folders that contain markup."""
    runs_dir = tmp_path_factory.mktemp("pages") / "runs"
    before = make_run(runs_dir / f"before {NAME.replace('/', '')}", classes=LONG_NAMES)
    after = make_run(runs_dir / "N-20261126-183100", BETTER, minutes=1, mirror=True, classes=LONG_NAMES)
    for number in range(20):
        accuracies = NOISE + np.random.default_rng(number).normal(0, 0.002, 5)
        make_run(runs_dir / f"N-20261126-1832{number:02}", accuracies, minutes=2 + number, epochs=2 + number)
    make_run(runs_dir / "N-20261126-184000", [*BASE[:4], np.nan], minutes=40, learning_rate=0.1)
    pair = compare_runs(read_run(before), read_run(after))
    result = make_hand_made_result()
    assert result.final is not None
    classes = {name: result.final.report["Coat"] for name in LONG_NAMES}
    report = classes | result.final.report
    final = replace(result.final, report=report, confusion=np.eye(40, dtype=int).tolist())
    many = replace(result, final=final, run_dir=after)
    experiment = make_experiment(NAME)
    checkpoints = {name: {"history": history, "failure": None} for name, history in HISTORIES.items()}
    diverged = make_hand_made_result(failures={"fold-1": "fold-1 diverged."})
    contents = {
        "finished": report_page(many, experiment, NeuralNetwork, pair, draw_figures(result)),
        "diverged": report_page(diverged, experiment, NeuralNetwork, "", {}),
        "interrupted": unfinished_page(experiment, RUN_DIR, checkpoints, "interrupted", "SIGINT"),
        "failed": unfinished_page(experiment, RUN_DIR, checkpoints, "failed", NAME),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = after / f"{name}.html"
        paths[name].write_bytes(content)
    return paths | {"pair": write_pair_page(pair), "index": write_index(runs_dir)}


@pytest.mark.parametrize("name", ["finished", "diverged", "interrupted", "failed", "pair", "index"])
def test_page_fits_every_width_in_light_and_dark(name: str, pages: dict[str, Path], open_page: Open) -> None:
    for width in (320, 360, 800, 1160, 1280, 1440):
        for scheme, is_dark in (("light", False), ("dark", True)):
            page = open_page(pages[name], width, scheme)
            assert not page.evaluate(SCROLL_BAR), width
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (colour != "rgb(255, 255, 255)") == is_dark
            assert page.locator("h1").count() == 1 and page.locator("b").count() == 0
            for image in page.locator("img").all():
                assert image.get_attribute("alt") and image.evaluate("image => image.naturalWidth") > 0


def test_names_with_markup_are_shown_as_text(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["finished"])
    assert page.locator("h1").inner_text().startswith(NAME)
    assert page.get_by_role("rowheader", name=LONG_NAMES[36], exact=True).count() == 2  # F1 compared, and scores
    link = open_page(pages["index"]).get_by_role("rowheader", name="before ")
    assert link.inner_text() == f"before {NAME.replace('/', '')}"


def test_every_column_heading_sorts_the_rows(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["index"])

    def column(number: int) -> list[str]:
        cells = page.locator(f"tbody tr > :nth-child({number})").all_inner_texts()
        return [cell.strip() for cell in cells if cell.strip()]

    newest_first = column(1)
    accuracy = page.get_by_role("button", name="Accuracy")
    accuracy.click()
    assert column(3) == sorted(column(3), key=float) and column(1) != newest_first
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Accuracy")
    accuracy.focus()
    page.keyboard.press("Enter")
    assert column(3) == sorted(column(3), key=float, reverse=True)
    page.get_by_role("button", name="Run", exact=True).click()
    assert column(1) == newest_first[::-1]
    page.get_by_role("button", name="Changed").click()
    assert page.locator("th[aria-sort]").count() == 1 and len(column(2)) == len(newest_first)


def test_pages_are_complete_without_script(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["index"], script=False)
    assert page.locator("tbody tr").count() == 23 and page.get_by_text("MIRROR False → True").first.is_visible()
    assert open_page(pages["finished"], script=False).get_by_text("0.7000").first.is_visible()


def test_rows_that_are_equal_in_a_column_keep_their_order(pages: dict[str, Path], open_page: Open) -> None:
    page = open_page(pages["index"])
    newest_first = page.locator("tbody th").all_inner_texts()
    page.get_by_role("button", name="Took").click()  # all took 42 s
    assert page.locator("tbody th").all_inner_texts() == newest_first
    page.get_by_role("button", name="Took").click()
    assert page.locator("tbody th").all_inner_texts() == newest_first


def test_page_works_where_a_browser_stores_nothing(pages: dict[str, Path], tmp_path: Path, open_page: Open) -> None:
    sandbox = tmp_path / "server.html"  # servers of build artifacts show pages like this
    source = html.escape(pages["index"].read_text(encoding="utf-8"))
    sandbox.write_text(
        f'<!DOCTYPE html><iframe sandbox="allow-scripts" width="1300" srcdoc="{source}"></iframe>', encoding="utf-8"
    )
    frame = open_page(sandbox).frames[1]
    frame.get_by_role("button", name="Accuracy").click()
    assert frame.locator("th[aria-sort=ascending]").inner_text().startswith("Accuracy")


@pytest.mark.parametrize("name", ["finished", "pair", "index"])
def test_pages_are_printed_dark_on_light_with_tables_that_fit(
    name: str, pages: dict[str, Path], open_page: Open
) -> None:
    page = open_page(pages[name], 1000 if name == "index" else 680, "dark")  # A4 within its margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('table.cards')).display") == "table"
    assert not page.evaluate(SCROLL_BAR)


def running_page(epochs: int, **options: Any) -> bytes:
    histories = {name: history[:epochs] for name, history in HISTORIES.items()}
    checkpoints = {name: {"history": history, "failure": None} for name, history in histories.items()}
    return unfinished_page(make_experiment(), RUN_DIR, checkpoints, "running", **options)


def test_live_page_reloads_keeps_its_place_and_stops(tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(running_page(1, seconds_left=90))
    page = open_page(path, width=360)
    assert page.get_by_text("3 of 6 epochs are done, about 1:30 left.").is_visible()
    page.evaluate("scrollTo(0, 300)")
    path.write_bytes(running_page(2, seconds_left=80))
    page.get_by_text("6 of 6 epochs are done").wait_for(state="attached", timeout=8000)
    assert page.evaluate("scrollY") == 300
    page.get_by_role("button", name="Stop reloading").click()
    path.write_bytes(report_page(make_hand_made_result(), make_experiment(), NeuralNetwork, "", {}))
    time.sleep(6)
    assert page.get_by_text("6 of 6 epochs are done").is_visible()
    page.get_by_role("button", name="Reload every 5 seconds").click()
    page.get_by_text("Test set").wait_for(timeout=8000)
    page.evaluate("window.mark = 1")
    time.sleep(6)
    assert page.evaluate("window.mark") == 1  # it was not loaded again


def test_page_of_all_runs_reloads_keeps_its_order_and_stops(tmp_path: Path, open_page: Open) -> None:
    runs_dir = tmp_path / "runs"
    for number in range(40):
        make_run(runs_dir / f"N-20261126-1830{number:02}", BASE + number % 7 / 1000, minutes=number, epochs=number)
    unfinished = make_run(runs_dir / "N-20261126-190000")
    (unfinished / "results.json").rename(tmp_path / "results.json")
    (unfinished / "report.html").write_bytes(running_page(1))
    with FileLock(unfinished / ".lock"):
        page = open_page(write_index(runs_dir))
        assert page.get_by_text("running, 3 of 6 epochs").is_visible()
        page.get_by_role("button", name="Accuracy").press("Enter")
        rows = page.locator("tbody tr").all_inner_texts()
        page.evaluate("scrollTo(0, 500)")
        (unfinished / "report.html").write_bytes(running_page(2))
        write_index(runs_dir)
        page.get_by_text("running, 6 of 6 epochs").wait_for(state="attached", timeout=15000)
        assert page.locator("tbody tr").all_inner_texts()[:-1] == rows[:-1]  # the last row is that of the running run
        assert page.evaluate("scrollY") == 500
        assert page.evaluate("document.activeElement.textContent") == "Accuracy"
    (tmp_path / "results.json").rename(unfinished / "results.json")
    write_index(runs_dir)
    page.get_by_text("This page reloads itself").wait_for(state="detached", timeout=15000)


def test_page_is_not_reloaded_while_text_is_selected(tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(running_page(1))
    page = open_page(path)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('pre'))")
    path.write_bytes(running_page(2))
    time.sleep(6)
    assert page.get_by_text("3 of 6 epochs are done").is_visible()
    page.evaluate("getSelection().removeAllRanges()")
    page.get_by_text("6 of 6 epochs are done").wait_for(timeout=8000)


def test_page_in_a_notebook_keeps_its_place_and_is_not_reloaded(tmp_path: Path, open_page: Open) -> None:
    frame = '<div><iframe srcdoc="{}" style="width: 500px; height: 300px"></iframe></div>'
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html>{frame.format(html.escape(running_page(1).decode()))}", encoding="utf-8")
    page = open_page(notebook)
    inner = page.frames[1]
    inner.get_by_text("3 of 6 epochs are done").wait_for()
    assert not inner.get_by_role("button", name="Stop reloading").is_visible()
    inner.evaluate("scrollTo(0, 200); window.mark = 1")
    time.sleep(6)
    assert inner.evaluate("window.mark") == 1
    update = frame.format(html.escape(running_page(2).decode()))
    page.evaluate("update => document.querySelector('div').outerHTML = update", update)
    page.frames[1].get_by_text("6 of 6 epochs are done").wait_for()
    assert page.frames[1].evaluate("scrollY") == 200


def test_page_of_a_killed_run_stops_claiming_that_it_runs(tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(running_page(1, max_silence=3))
    page = open_page(path)
    assert page.get_by_text("Running.").is_visible()
    page.get_by_text("Stopped.").wait_for(timeout=10000)
    assert not page.get_by_text("Running.").is_visible()
    assert page.get_by_text("python main_tutorial.py").first.is_visible()
    page.evaluate("window.mark = 1")
    time.sleep(6)
    assert page.evaluate("window.mark") == 1


def test_live_page_without_script_is_reloaded_by_the_browser(tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(running_page(1))
    page = open_page(path, script=False)
    path.write_bytes(running_page(2))
    page.get_by_text("6 of 6 epochs are done").wait_for(timeout=15000)


def test_page_of_a_real_run_changes_until_it_is_finished(start_script: Start, tmp_path: Path, open_page: Open) -> None:
    process = start_script("main_tutorial", EPOCHS=60)
    path = wait_for(lambda: list((tmp_path / "runs").glob("*/report.html")), process)[0]
    page = open_page(path)
    assert page.get_by_text("Running.").is_visible()
    page.locator("svg.chart").first.wait_for(timeout=60000)
    finish(process)
    page.get_by_text("Test set").wait_for(timeout=8000)
    assert page.locator("figure img").count() == 3 and page.locator("progress").count() == 0
    index = open_page(tmp_path / "runs" / "index.html")
    (folder,) = run_dirs(tmp_path)
    assert index.locator("tbody a").get_attribute("href") == f"{folder.name}/report.html"
