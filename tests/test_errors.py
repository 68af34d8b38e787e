"""What may not end a run: a terminal that shows little, an output that is no file."""

import contextlib
import io

import pytest
from conftest import Configure, Start

import main_tutorial


@pytest.mark.slow
def test_output_that_cannot_show_every_character_does_not_end_the_run(
    start_script: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start_script("main_tutorial", EPOCHS=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_standard_output_that_is_no_file_will_do(configure: Configure) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        configure(main_tutorial, EPOCHS=1).main()
    assert "Cross-validation" in output.getvalue()
