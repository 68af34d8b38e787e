"""What the user sees in the terminal."""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython
import IPython.display
import pytest
from conftest import Start, all_fits
from hand_made import HISTORIES, make_hand_made_result

from experiment import console
from experiment.console import (
    Progress,
    display_name,
    final_text,
    folds_text,
    format_seconds,
    say,
    show_pictures,
    time_text,
    warn,
    wrap,
)
from experiment.results import ExperimentResult

FITS = ("final", "fold-1", "fold-2")


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


class Clock:
    """Stands for the time: it goes on by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def in_a_terminal() -> Iterator[Terminal]:
    """Let standard error, where the bar is drawn, be a terminal."""
    with contextlib.redirect_stderr(Terminal()) as terminal:
        yield terminal


def begin(fits: tuple[str, ...] = FITS, histories: dict[str, Any] | None = None) -> Progress:
    """Return a progress of two epochs a fit whose table has begun."""
    progress = Progress(fits, 2)
    progress.begin(histories or {name: [] for name in fits})
    return progress


def table_rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what stands below the table's heading, with the blanks that stand at the ends of lines."""
    return capsys.readouterr().out.splitlines()[5:]


# The table of epochs


def test_the_table_begins_with_what_its_columns_are(capsys: pytest.CaptureFixture[str]) -> None:
    begin()
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Means over the 2 folds, ± their standard deviation:",
        "",
        " epoch │ train loss  accuracy │ validation loss  accuracy ± deviation │   time",
        "───────┼──────────────────────┼───────────────────────────────────────┼────────",
    ]


def test_a_row_has_the_means_over_the_folds_and_the_time_since_the_beginning(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = begin()
    clock.now += 61
    assert progress.step("fold-1", HISTORIES["fold-1"][0]) is False
    assert progress.step("fold-2", HISTORIES["fold-2"][0]) is True
    assert table_rows(capsys) == [
        "     1 │     1.1000    0.4500 │          0.9000    0.3750 ± 0.1768    │   1:01",
        "       │ about 2:02 to go",  # two of six epochs took 61 seconds
    ]


def test_only_the_first_row_is_followed_by_how_long_the_rest_will_take(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = begin()
    for epoch in range(2):
        for fit in ("fold-1", "fold-2"):
            clock.now += 1
            progress.step(fit, HISTORIES[fit][epoch])
    assert table_rows(capsys) == [
        "     1 │     1.1000    0.4500 │          0.9000    0.3750 ± 0.1768    │    2 s",
        "       │ about 4 s to go",
        "     2 │     0.7000    0.6500 │          0.6000    0.6250 ± 0.1768    │    4 s",
    ]


def test_a_fold_that_diverged_before_the_run_was_cut_off_holds_no_row_up(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(FITS, 2)
    progress.begin({"final": [], "fold-1": HISTORIES["fold-1"][:1], "fold-2": []}, diverged=["fold-2"])
    assert progress.step("fold-1", HISTORIES["fold-1"][1]) is True
    assert [row.split()[0] for row in table_rows(capsys) if "to go" not in row] == ["1", "2"]


def test_the_final_fit_makes_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    progress = begin()
    assert progress.step("final", HISTORIES["final"][0]) is False
    assert table_rows(capsys) == []


def test_what_an_earlier_attempt_has_done_stands_in_the_table_and_not_in_the_forecast(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = {"final": [], "fold-1": HISTORIES["fold-1"][:1], "fold-2": []}
    progress = begin(histories=begun)
    assert table_rows(capsys) == []
    clock.now += 10
    progress.step("fold-2", HISTORIES["fold-2"][0])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("     1 │     1.1000")
    assert rows[1] == "       │ about 40 s to go"  # one epoch took 10 seconds, four are left


def test_a_run_that_goes_on_shows_the_rows_it_had_and_no_forecast_from_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(histories={"final": [], "fold-1": HISTORIES["fold-1"], "fold-2": HISTORIES["fold-2"]})
    assert [row[:17] for row in table_rows(capsys)] == ["     1 │     1.10", "     2 │     0.70"]


def test_a_run_that_is_done_with_its_first_row_has_nothing_to_go(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(("fold-1", "fold-2"), 1)
    progress.begin({"fold-1": [], "fold-2": []})
    for fit in ("fold-1", "fold-2"):
        clock.now += 1
        progress.step(fit, HISTORIES[fit][0])
    assert "to go" not in capsys.readouterr().out


def test_a_fold_that_diverged_is_no_longer_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    progress = begin()
    nan = {"epoch": 1, "train/loss": float("nan"), "train/accuracy": 0.1}
    progress.step("fold-1", nan | {"validation/loss": float("nan"), "validation/accuracy": 0.1}, diverged=True)
    progress.step("fold-2", HISTORIES["fold-2"][0])
    row = table_rows(capsys)[0]
    assert row.startswith("     1 │     1.2000    0.4000 │          1.0000    0.2500 ± 0.0000 ")


def test_no_row_is_wider_than_80_columns(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = begin()
    clock.now += 100 * 3600
    for fit in ("fold-1", "fold-2"):
        progress.step(fit, HISTORIES[fit][0])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


# The bar


def test_the_bar_says_how_far_it_is_and_what_came_last() -> None:
    with in_a_terminal() as terminal, begin() as progress:
        progress.step("fold-1", HISTORIES["fold-1"][1])
    last = terminal.getvalue().split("\r")[-1]
    assert re.fullmatch(r" 17% .* 1/6 epochs, .* left, fold-1: 0\.7500 in validation\s*", last)


def test_the_bar_says_of_the_final_fit_that_its_accuracy_is_one_of_training() -> None:
    with in_a_terminal() as terminal, begin() as progress:
        progress.step("final", HISTORIES["final"][1])
    assert terminal.getvalue().rstrip().endswith("left, final: 0.8125 in training")


def test_the_bar_begins_where_an_earlier_attempt_ended() -> None:
    with (
        in_a_terminal() as terminal,
        begin(histories={"final": [], "fold-1": HISTORIES["fold-1"], "fold-2": []}) as progress,
    ):
        progress.step("fold-2", HISTORIES["fold-2"][0])
    assert " 50% " in terminal.getvalue() and " 3/6 epochs" in terminal.getvalue()


def test_the_bar_is_full_at_the_end_though_a_fit_diverged() -> None:
    with in_a_terminal() as terminal, begin() as progress:
        progress.step("fold-1", HISTORIES["fold-1"][0], diverged=True)
        for fit in ("fold-2", "final"):
            for metrics in HISTORIES[fit]:
                progress.step(fit, metrics)
    assert "100% " in terminal.getvalue() and " 5/5 epochs" in terminal.getvalue()


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with begin() as progress:
        progress.step("fold-1", HISTORIES["fold-1"][0])
    assert capsys.readouterr().err == ""


class GoneTerminal(Terminal):
    """A terminal that was there when the bar began and whose window was closed then."""

    is_gone = False

    def write(self, text: str) -> int:
        if self.is_gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    with contextlib.redirect_stderr(GoneTerminal()) as gone, begin() as progress:
        gone.is_gone = True
        time.sleep(0.2)  # the bar is drawn ten times a second at most
        progress.step("final", HISTORIES["final"][0])
    assert progress.histories["final"] == HISTORIES["final"][:1]


@pytest.mark.slow
def test_without_a_terminal_there_are_rows_and_no_bar(start_script: Start) -> None:
    process = start_script("main_tutorial")
    output, errors = process.communicate(timeout=60)
    assert re.findall(r"^ +(\d) │", output, re.MULTILINE) == ["1", "2"]
    assert "it/s" not in errors and "\r" not in errors


# What is said


@pytest.mark.parametrize(("speak", "stream"), [(say, "out"), (warn, "err")])
def test_what_is_said_goes_to_standard_output_and_what_is_warned_of_to_standard_error(
    speak: Callable[[str], None], stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    speak("a line")
    captured = capsys.readouterr()
    assert getattr(captured, stream) == "a line\n"
    assert captured.out + captured.err == "a line\n"


def test_a_reader_that_is_gone_does_not_end_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, contextlib.redirect_stdout(stream):
        say("nobody reads this")
        say("nor this")


def test_a_sentence_is_broken_at_80_columns_but_no_word_is() -> None:
    name = "a-very-long-name/" * 6
    lines = wrap(f"{'word ' * 30}{name} and 1-2").splitlines()
    assert all(len(line) <= 80 for line in lines if name not in line)
    assert max(len(line) for line in lines[:2]) > 75
    assert [line for line in lines if name in line] == [name]


# The tables at the end


def test_the_table_of_the_folds(result: ExperimentResult) -> None:
    assert folds_text(result).splitlines() == [
        "Cross-validation",
        "  fold      accuracy     loss",
        "  fold-1      0.7500   0.5000",
        "  fold-2      0.5000   0.7000",
        "  accuracy 0.6250 ± 0.1768 · loss 0.6000 ± 0.1414 (mean ± standard deviation)",
    ]


def test_one_fold_has_no_mean_and_no_deviation(result: ExperimentResult) -> None:
    assert folds_text(replace(result, folds=result.folds[:1])).splitlines()[2:] == ["  fold-1      0.7500   0.5000"]


def test_the_table_of_the_test(result: ExperimentResult) -> None:
    assert result.final is not None
    assert final_text(result.final).splitlines() == [
        "Test set, 10 images",
        "  class           precision   recall       F1",
        "  Coat               0.6667   0.5000   0.5714",
        "  Shirt              0.6000   0.7500   0.6667",
        "  Bag                1.0000   1.0000   1.0000",
        "  macro avg          0.7556   0.7500   0.7460",
        "  weighted avg       0.7067   0.7000   0.6952",
        "  accuracy 0.7000 · loss 0.9000 (mean cross-entropy an image)",
    ]


def test_thousands_of_images_have_a_comma(result: ExperimentResult) -> None:
    assert result.final is not None
    report = result.final.report | {"macro avg": result.final.report["macro avg"] | {"support": 10000.0}}
    assert final_text(replace(result.final, report=report)).startswith("Test set, 10,000 images\n")


def test_classes_that_are_digits_are_called_classes_and_the_columns_stand(result: ExperimentResult) -> None:
    assert result.final is not None
    report = {"8": result.final.report["Coat"], "macro avg": result.final.report["macro avg"]}
    assert final_text(replace(result.final, report=report)).splitlines()[1:4] == [
        "  class        precision   recall       F1",
        "  class 8         0.6667   0.5000   0.5714",
        "  macro avg       0.7556   0.7500   0.7460",
    ]


def test_nothing_of_the_tables_is_wider_than_80_columns(result: ExperimentResult) -> None:
    for text in (folds_text(result), final_text(all_fits(result)[-1])):
        assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42.4, "42 s"), (59.6, "1:00"), (185, "3:05"), (3600, "1:00:00"), (3723, "1:02:03")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("resumed", "line"), [(False, "Time taken: 1:05"), (True, "Time taken: 1:05 since it went on")]
)
def test_the_time_of_a_run_that_was_cut_off_is_called_a_part_of_it(
    resumed: bool, line: str, result: ExperimentResult
) -> None:
    environment = result.environment | {"seconds": 65, "resumed": resumed}
    assert time_text(replace(result, environment=environment)) == line


def test_a_class_named_by_a_digit_is_not_taken_for_a_figure() -> None:
    assert [display_name(name) for name in ("8", "8 - eight", "Coat")] == ["class 8", "8 - eight", "Coat"]


# Notebooks (`test_notebook.py` has a real one)


def show(monkeypatch: pytest.MonkeyPatch, shell: object, *paths: Path) -> list[bytes]:
    """Return the pictures that IPython is told to display where `shell` is what runs."""
    shown: list[bytes] = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", lambda picture: shown.append(picture.data))
    show_pictures(paths)
    return shown


def test_in_a_notebook_pictures_are_shown_and_in_a_terminal_they_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in pictures:
        path.write_bytes(path.stem.encode())
    notebook, terminal = SimpleNamespace(kernel="a kernel"), SimpleNamespace()
    assert show(monkeypatch, notebook, *pictures) == [b"one", b"two"]
    assert show(monkeypatch, terminal, *pictures) == []
    assert show(monkeypatch, None, *pictures) == []


def test_where_ipython_was_never_imported_it_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    show_pictures([tmp_path / "none.png"])


def test_a_stream_that_is_not_there_or_was_closed_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        warn("to nobody")
    monkeypatch.setattr(sys, "stderr", None)
    Progress(FITS, 1)
