"""Failures outside training that must not end a run: terminals, streams, signals, figures, locks."""

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
from data_files import DatasetError
from experiment import run
from experiment.errors import ConfigurationError, RunError, nonfatal, user_errors


@pytest.mark.slow
def test_an_ascii_terminal_does_not_end_the_run(start_script: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start_script("main_tutorial", EPOCHS=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_standard_output_that_is_not_a_file_is_accepted(configure: Configure) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        configure(main_tutorial, EPOCHS=1).main()
    assert "Cross-validation" in output.getvalue()


OPTIONS = "--dataset Digits --folds 2 --epochs 1 --wandb-mode disabled --workers 2"
COMMAND = (
    f"{sys.executable} {REPOSITORY / 'main_tutorial.py'} {OPTIONS} --runs-dir=RUNS"  # RUNS is replaced in each test
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
    ids=["closed pipe", "full", "both full", "no stdout", "no stderr", "no streams"],
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


def run_command(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        COMMAND.replace("RUNS", str(tmp_path / "runs")).split(),
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_unusual_environment_variables_do_not_end_the_run(tmp_path: Path) -> None:
    others = {"PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "1", "TMPDIR": "/nonexistent", "LC_ALL": "C"}
    ended = run_command(tmp_path, **others, HOME="/nonexistent")
    assert ended.returncode == 0 and ended.stderr == ""
    assert_finished(tmp_path)


@pytest.mark.slow
def test_an_unknown_matplotlib_backend_costs_only_the_figures(tmp_path: Path) -> None:
    ended = run_command(tmp_path, MPLBACKEND="nonsense")
    assert ended.returncode == 0 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("Without the figures: ValueError: Key backend: 'nonsense'")
    assert_finished(tmp_path, figures=False)


@pytest.mark.slow
@pytest.mark.parametrize(("ignored", "status"), [(False, 128 + signal.SIGHUP), (True, 0)], ids=["plain", "nohup"])
def test_a_closed_terminal_ends_the_run_except_under_nohup(ignored: bool, status: int, tmp_path: Path) -> None:
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


def test_figures_and_a_comparison_that_fail_cost_one_line_each(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(run, "draw_figures", fail)
    monkeypatch.setattr(run, "compare_with_nearest", fail)
    result = configure(main_tutorial, EPOCHS=1).main()
    assert "Without the figures: MemoryError: no memory\nWithout a comparison: MemoryError" in capfd.readouterr().err
    assert (result.run_dir / "results.json").exists() and (result.run_dir / "report.md").exists()


@pytest.mark.slow
def test_a_lock_that_cannot_be_created_costs_one_line(
    unfinished: Path, configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(FileNotFoundError):
        (unfinished / ".lock").unlink()
    (unfinished / ".lock").mkdir()
    result = configure(main_tutorial, FOLDS=3, EPOCHS=6).main()
    assert result.environment["resumed"] and "Without a lock: " in capfd.readouterr().err
    assert (unfinished / "results.json").exists()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with user_errors():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigurationError("EPOCHS is missing"), 2, "Bad configuration:\n  EPOCHS is missing\n"),
        (RunError("no disk"), 1, "The run failed: no disk\n"),
        (DatasetError("no data"), 1, "The run failed: no data\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "Stopped by SIGTERM.\n"),
        (KeyboardInterrupt("text"), 130, "Stopped by SIGINT.\n"),
        (KeyboardInterrupt(), 130, "Stopped by SIGINT.\n"),
    ],
)
def test_a_users_mistake_becomes_one_message_and_an_exit_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, user_errors():
        raise error
    assert (end.value.code, capsys.readouterr().err) == (status, message)


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_a_nonfatal_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with nonfatal("the figures"):
        raise MemoryError("no memory")
    assert capsys.readouterr().err == "Without the figures: MemoryError: no memory\n"
