"""What the user sees in the terminal."""

import re

import pytest
from conftest import Start

from experiment.console import format_seconds


@pytest.mark.slow
def test_without_a_terminal_there_are_rows_and_no_bar(start_script: Start) -> None:
    process = start_script("main_tutorial")
    output, errors = process.communicate(timeout=60)
    assert re.findall(r"^ +(\d) │", output, re.MULTILINE) == ["1", "2"]
    assert "it/s" not in errors and "\r" not in errors


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (185, "3:05"), (3723, "1:02:03")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
