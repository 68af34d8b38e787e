"""What the user sees in the terminal."""

import re
from dataclasses import replace

import pytest
from conftest import Start, all_fits

from experiment.console import display_name, final_text, folds_text, format_seconds, time_text
from experiment.results import ExperimentResult


@pytest.mark.slow
def test_without_a_terminal_there_are_rows_and_no_bar(start_script: Start) -> None:
    process = start_script("main_tutorial")
    output, errors = process.communicate(timeout=60)
    assert re.findall(r"^ +(\d) │", output, re.MULTILINE) == ["1", "2"]
    assert "it/s" not in errors and "\r" not in errors


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3:05"), (3723, "1:02:03")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("resumed", "line"), [(False, "Time taken: 1:05"), (True, "Time taken: 1:05 since it went on")]
)
def test_the_time_of_a_run_that_was_cut_off_is_called_a_part_of_it(
    resumed: bool, line: str, cnn_result: ExperimentResult
) -> None:
    environment = cnn_result.environment | {"seconds": 65, "resumed": resumed}
    assert time_text(replace(cnn_result, environment=environment)) == line


def test_a_class_named_by_a_digit_is_not_taken_for_a_figure() -> None:
    assert [display_name(name) for name in ("8", "8 - eight", "Coat")] == ["class 8", "8 - eight", "Coat"]


def test_nothing_of_the_tables_is_wider_than_80_columns(cnn_result: ExperimentResult) -> None:
    for text in (folds_text(cnn_result), final_text(all_fits(cnn_result)[-1])):
        assert max(len(line) for line in text.splitlines()) <= 80
