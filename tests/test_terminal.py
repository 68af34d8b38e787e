"""What the user sees in the terminal, and images in a notebook."""

import contextlib
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import IPython
import IPython.display
import pytest
from conftest import Start, all_fits
from hand_made import HISTORIES, Clock, make_hand_made_result

from experiment import terminal
from experiment.results import ExperimentResult, History
from experiment.terminal import Progress, print_line, warn

NOTHING_DONE: dict[str, History] = {"final": [], "fold-1": [], "fold-2": []}


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


class FakeTerminal(io.StringIO):
    """A stream that claims to be a terminal, and can be closed as a window is."""

    is_closed = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.is_closed:
            raise OSError(5, "Input/output error")
        return super().write(text)


def begin(histories: dict[str, History] = NOTHING_DONE, diverged: tuple[str, ...] = ()) -> Progress:
    """Return a progress of two epochs per fit that has printed its heading."""
    progress = Progress(histories, 2)
    progress.begin(histories, diverged)
    return progress


def table_rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines below the table's heading."""
    return capsys.readouterr().out.splitlines()[5:]


# The table of epochs


def test_heading_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    begin()
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Means over the 2 folds, ± their standard deviation:",
        "",
        " epoch │ train loss  accuracy │ validation loss  accuracy ± deviation │   time",
        "───────┼──────────────────────┼───────────────────────────────────────┼────────",
    ]


def test_rows_have_means_over_the_folds_and_the_time_and_only_the_first_is_followed_by_an_estimate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = begin()
    all_folds_done = []
    for epoch in range(2):
        for fold in ("fold-1", "fold-2"):
            clock.now += 30
            all_folds_done.append(progress.step(fold, HISTORIES[fold][epoch]))
    assert all_folds_done == [False, True, False, True]
    assert table_rows(capsys) == [
        "     1 │     1.1000    0.4500 │          0.9000    0.3750 ± 0.1768    │   1:00",
        "       │ about 2:00 left",  # two of six epochs took 60 seconds
        "     2 │     0.7000    0.6500 │          0.6000    0.6250 ± 0.1768    │   2:00",
    ]


def test_final_fit_has_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert begin().step("final", HISTORIES["final"][0]) is False
    assert table_rows(capsys) == []


def test_resumed_run_prints_its_earlier_rows_without_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    begin(HISTORIES | {"final": []})
    assert [row[:17] for row in table_rows(capsys)] == ["     1 │     1.10", "     2 │     0.70"]


def test_estimate_of_a_resumed_run_counts_only_the_epochs_since_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = begin(NOTHING_DONE | {"fold-1": HISTORIES["fold-1"][:1]})
    clock.now += 10
    progress.step("fold-2", HISTORIES["fold-2"][0])
    assert table_rows(capsys)[1] == "       │ about 40 s left"  # one epoch took 10 seconds, four remain


def test_finished_run_has_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(("fold-1", "fold-2"), 1)
    progress.begin({"fold-1": [], "fold-2": []})
    for fold in ("fold-1", "fold-2"):
        progress.step(fold, HISTORIES[fold][0])
    assert "left" not in capsys.readouterr().out


def test_rows_do_not_wait_for_a_fold_that_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    progress = begin()
    progress.step("fold-1", HISTORIES["fold-1"][0] | {"train/loss": float("nan")}, diverged=True)
    progress.step("fold-2", HISTORIES["fold-2"][0])
    assert table_rows(capsys)[0].startswith("     1 │     1.2000    0.4000 │          1.0000    0.2500 ± 0.0000 ")


def test_rows_do_not_wait_for_a_fold_that_diverged_before_the_run_was_resumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = begin(NOTHING_DONE | {"fold-1": HISTORIES["fold-1"][:1]}, diverged=("fold-2",))
    assert progress.step("fold-1", HISTORIES["fold-1"][1]) is True
    assert [row.split()[0] for row in table_rows(capsys) if "left" not in row] == ["1", "2"]


def test_table_is_at_most_80_columns_wide(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = begin()
    clock.now += 100 * 3600
    for fold in ("fold-1", "fold-2"):
        progress.step(fold, HISTORIES[fold][0])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


# The bar


def test_bar_shows_the_share_that_is_done_and_the_latest_accuracy() -> None:
    with contextlib.redirect_stderr(FakeTerminal()) as stream, begin() as progress:
        progress.step("fold-1", HISTORIES["fold-1"][1])
    last = stream.getvalue().split("\r")[-1]
    assert re.fullmatch(r" 17% .* 1/6 epochs, .* left, fold-1: validation accuracy 0\.7500\s*", last)


def test_bar_shows_the_training_accuracy_of_the_final_fit() -> None:
    with contextlib.redirect_stderr(FakeTerminal()) as stream, begin() as progress:
        progress.step("final", HISTORIES["final"][1])
    assert stream.getvalue().rstrip().endswith("left, final: training accuracy 0.8125")


def test_bar_of_a_resumed_run_starts_where_the_run_was_stopped() -> None:
    done = NOTHING_DONE | {"fold-1": HISTORIES["fold-1"]}
    with contextlib.redirect_stderr(FakeTerminal()) as stream, begin(done) as progress:
        progress.step("fold-2", HISTORIES["fold-2"][0])
    assert " 50% " in stream.getvalue() and " 3/6 epochs" in stream.getvalue()


def test_bar_is_full_at_the_end_if_a_fit_diverged() -> None:
    with contextlib.redirect_stderr(FakeTerminal()) as stream, begin() as progress:
        progress.step("fold-1", HISTORIES["fold-1"][0], diverged=True)
        for fit in ("fold-2", "final"):
            for metrics in HISTORIES[fit]:
                progress.step(fit, metrics)
    assert "100% " in stream.getvalue() and " 5/5 epochs" in stream.getvalue()


def test_closed_terminal_does_not_end_the_run() -> None:
    with contextlib.redirect_stderr(FakeTerminal()) as stream, begin() as progress:
        stream.is_closed = True
        time.sleep(0.2)  # the bar is drawn at most ten times per second
        progress.step("final", HISTORIES["final"][0])
        warn("nobody reads this")
    assert progress.histories["final"] == HISTORIES["final"][:1]


@pytest.mark.slow
def test_without_a_terminal_there_are_rows_and_no_bar(start_script: Start) -> None:
    process = start_script("main_tutorial")
    output, errors = process.communicate(timeout=60)
    assert re.findall(r"^ +(\d) │", output, re.MULTILINE) == ["1", "2"]
    assert " left" not in errors and "\r" not in errors


# Lines


@pytest.mark.parametrize(("function", "stream"), [(print_line, "out"), (warn, "err")])
def test_lines_go_to_standard_output_and_warnings_to_standard_error(
    function: Callable[[str], None], stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function("a line")
    captured = capsys.readouterr()
    assert getattr(captured, stream) == "a line\n"
    assert captured.out + captured.err == "a line\n"


def test_closed_pipe_does_not_end_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, contextlib.redirect_stdout(stream):
        print_line("nobody reads this")
        print_line("nor this")


# The tables of the results


def test_folds_table(result: ExperimentResult) -> None:
    assert terminal.folds_table(result).splitlines() == [
        "Cross-validation",
        "  fold      accuracy     loss",
        "  fold-1      0.7500   0.5000",
        "  fold-2      0.5000   0.7000",
        "  accuracy 0.6250 ± 0.1768 · loss 0.6000 ± 0.1414 (mean ± standard deviation)",
    ]


def test_folds_table_without_folds_to_average(result: ExperimentResult) -> None:
    one_fold = terminal.folds_table(replace(result, folds=result.folds[:1]))
    assert one_fold.splitlines()[2:] == ["  fold-1      0.7500   0.5000"]
    assert terminal.folds_table(replace(result, folds=[])) == "Cross-validation: all folds diverged"


def test_test_table(result: ExperimentResult) -> None:
    assert terminal.test_table(all_fits(result)[-1]).splitlines() == [
        "Test set, 10 images",
        "  class           precision   recall       F1",
        "  Coat               0.6667   0.5000   0.5714",
        "  Shirt              0.6000   0.7500   0.6667",
        "  Bag                1.0000   1.0000   1.0000",
        "  macro avg          0.7556   0.7500   0.7460",
        "  weighted avg       0.7067   0.7000   0.6952",
        "  accuracy 0.7000 · loss 0.9000 (mean cross-entropy per image)",
    ]


def test_test_table_with_a_digit_as_class_name_and_thousands_of_images(result: ExperimentResult) -> None:
    final = all_fits(result)[-1]
    macro_avg = final.report["macro avg"] | {"support": 10000.0}
    final = replace(final, report={"8": final.report["Coat"], "macro avg": macro_avg})
    assert terminal.test_table(final).splitlines()[:4] == [
        "Test set, 10,000 images",
        "  class        precision   recall       F1",
        "  class 8         0.6667   0.5000   0.5714",
        "  macro avg       0.7556   0.7500   0.7460",
    ]


@pytest.mark.parametrize(
    ("resumed", "line"), [(False, "Time taken: 1:05"), (True, "Time taken: 1:05 since it was resumed")]
)
def test_duration_line(resumed: bool, line: str, result: ExperimentResult) -> None:
    environment = result.environment | {"seconds": 65, "resumed": resumed}
    assert terminal.duration_line(replace(result, environment=environment)) == line


# Notebooks (`test_notebook.py` has a real one)


def test_page_is_shown_only_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(IPython.display, "display", lambda page, **_: shown.append(page.data))
    page = '<p title="a">é</p><nav aria-label="Pages">'.encode()
    for shell in (None, SimpleNamespace()):  # plain Python, IPython in a terminal
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        terminal.show_page(page, "id", update=False)
        assert shown == []
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel="a kernel"))
    terminal.show_page(page, "id", update=False)
    (frame,) = shown
    assert 'srcdoc="&lt;p title=&quot;a&quot;&gt;é&lt;/p&gt;&lt;nav hidden aria-label=&quot;Pages&quot;&gt;"' in frame
