"""What may not end a run: a terminal that shows little, an output that is no file."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FIGURES, REPOSITORY, Configure, Start

import main_tutorial
from experiment import run
from experiment.errors import user_errors


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


OPTIONS = "--dataset Digits --folds 2 --epochs 1 --wandb-mode disabled --workers 2"
COMMAND = (
    f"{sys.executable} {REPOSITORY / 'main_tutorial.py'} {OPTIONS} --runs-dir=RUNS"  # RUNS is replaced by the test's
)


def assert_finished(tmp_path: Path, figures: bool = True) -> None:
    """Check that the one run in the folder has its results, and its figures."""
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "results.json").exists()
    assert all((run_dir / name).exists() == figures for name in FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        f"set -o pipefail; {COMMAND} | head -1",
        f"{COMMAND} >/dev/full",
        f"{COMMAND} >/dev/full 2>/dev/full",
        f"{COMMAND} >&-",
        f"{COMMAND} 2>&-",
        f"{COMMAND} <&- >&- 2>&-",
    ],
    ids=["a pipe that is closed", "full", "both full", "no output", "no errors", "nothing at all"],
)
def test_standard_streams_that_fail_do_not_end_the_run(command: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        ["bash", "-c", command.replace("RUNS", str(tmp_path / "runs"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0 and ended.stderr == ""
    assert_finished(tmp_path)


@pytest.mark.slow
def test_what_others_set_in_the_environment_does_not_end_the_run(tmp_path: Path) -> None:
    others = {"PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "1", "TMPDIR": "/nonexistent", "LC_ALL": "C"}
    environment = os.environ | others | {"HOME": "/nonexistent"}
    ended = subprocess.run(
        COMMAND.replace("RUNS", str(tmp_path / "runs")).split(),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0 and ended.stderr == ""
    assert_finished(tmp_path)


@pytest.mark.slow
def test_a_strange_backend_of_matplotlibs_costs_the_figures_alone(tmp_path: Path) -> None:
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    ended = subprocess.run(
        COMMAND.replace("RUNS", str(tmp_path / "runs")).split(),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("Without the figures: ValueError: Key backend: 'nonsense'")
    assert_finished(tmp_path, figures=False)


@pytest.mark.slow
@pytest.mark.parametrize(("ignored", "status"), [(False, 128 + signal.SIGHUP), (True, 0)], ids=["plain", "nohup"])
def test_a_terminal_that_goes_away_ends_the_run_unless_under_nohup(ignored: bool, status: int, tmp_path: Path) -> None:
    """The status is asked of the shell's own child, as the terminal's end reaches it: SIGHUP, and no more output."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execv(
            sys.executable, COMMAND.replace("--epochs 1", "--epochs 15").replace("RUNS", str(tmp_path / "runs")).split()
        )
    shown = b""
    while b"\r\n     1" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    if ignored:
        assert_finished(tmp_path)
    else:
        assert time.monotonic() - started < 5


def test_a_figure_and_a_comparison_that_fail_cost_a_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(run, "draw_figures", fail)
    monkeypatch.setattr(run, "against_nearest", fail)
    result = configure(main_tutorial, EPOCHS=1).main()
    assert "Without the figures: MemoryError: no room\nWithout a comparison: MemoryError" in capfd.readouterr().err
    assert (result.run_dir / "results.json").exists() and (result.run_dir / "report.md").exists()


@pytest.mark.slow
def test_a_lock_that_cannot_be_had_costs_a_line(
    unfinished: Path, configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(FileNotFoundError):
        (unfinished / ".lock").unlink()
    (unfinished / ".lock").mkdir()
    result = configure(main_tutorial, FOLDS=3, EPOCHS=6).main()
    assert result.environment["resumed"] and "Without a lock: " in capfd.readouterr().err
    assert (unfinished / "results.json").exists()


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As Ctrl-C is for what a script has started behind `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with user_errors():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)
