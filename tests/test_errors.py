"""Failures outside training that must not end a run (streams, terminals, figures, locks); exit status and signals."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FIGURES, REPOSITORY, Configure, run_dirs

import main_tutorial
from data_files import DatasetError
from experiment import run
from experiment.errors import ConfigurationError, ExitError, RunError, nonfatal, user_errors


def test_a_standard_output_that_is_not_a_file_is_accepted(configure: Configure) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        configure(main_tutorial, EPOCHS=1).main()
    assert "Cross-validation" in output.getvalue()


def training_command(tmp_path: Path, epochs: int = 1) -> str:
    options = f"--dataset Digits --folds 2 --epochs {epochs} --wandb-mode disabled --workers 2"
    return f"{sys.executable} {REPOSITORY / 'main_tutorial.py'} {options} --runs-dir {tmp_path / 'runs'}"


def run_shell(command: str, **variables: str) -> str:
    """Run a shell command that succeeds; return what it printed on standard error."""
    arguments = ["bash", "-o", "pipefail", "-c", command]
    ended = subprocess.run(arguments, env=os.environ | variables, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def assert_finished(tmp_path: Path, figures: bool = True) -> None:
    """Check that the one run in the folder has its results, and its figures."""
    (run_dir,) = run_dirs(tmp_path)
    assert (run_dir / "results.json").exists()
    assert all((run_dir / name).exists() == figures for name in FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    ["| head -1", ">/dev/full", ">/dev/full 2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-"],
    ids=["closed pipe", "full", "both full", "no stdout", "no stderr", "no streams"],
)
def test_standard_streams_that_fail_do_not_end_the_run(redirection: str, tmp_path: Path) -> None:
    assert run_shell(f"{training_command(tmp_path)} {redirection}") == ""
    assert_finished(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "1", "TMPDIR": "/proc/none", "HOME": "/proc/none", "LC_ALL": "C"},
    ],
    ids=["ASCII terminal", "others"],
)
def test_unusual_environment_variables_do_not_end_the_run(variables: dict[str, str], tmp_path: Path) -> None:
    assert run_shell(training_command(tmp_path), **variables) == ""
    assert_finished(tmp_path)


@pytest.mark.slow
def test_an_unknown_matplotlib_backend_costs_only_the_figures(tmp_path: Path) -> None:
    errors = run_shell(training_command(tmp_path), MPLBACKEND="nonsense")
    assert errors.startswith("Without the figures: ValueError: Key backend: 'nonsense'") and errors.count("\n") == 1
    assert_finished(tmp_path, figures=False)


@pytest.mark.slow
@pytest.mark.parametrize(("ignored", "status"), [(False, 128 + signal.SIGHUP), (True, 0)], ids=["plain", "nohup"])
def test_a_closed_terminal_ends_the_run_except_under_nohup(ignored: bool, status: int, tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execv(sys.executable, training_command(tmp_path, epochs=15).split())
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
    assert (result.run_dir / "results.json").exists() and (result.run_dir / "report.html").exists()


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
        (KeyboardInterrupt(3), 130, "Stopped by SIGINT.\n"),
        (KeyboardInterrupt(), 130, "Stopped by SIGINT.\n"),
    ],
)
def test_a_users_mistake_becomes_one_message_and_an_exit_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, user_errors():
        raise error
    assert type(end.value) is SystemExit and end.value.__suppress_context__
    assert (end.value.code, capsys.readouterr().err) == (status, message)


def test_in_a_notebook_a_users_mistake_is_an_exit_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: "a shell"))
    with pytest.raises(ExitError, match="^The run failed: no disk$"), user_errors():
        raise RunError("no disk")


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_a_nonfatal_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with nonfatal("the figures"):
        raise MemoryError("no memory")
    assert capsys.readouterr().err == "Without the figures: MemoryError: no memory\n"


def test_a_deleted_working_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(SystemExit) as ended, user_errors():
        os.getcwd()
    assert ended.value.code == 1
    message = "The run failed: the working directory was deleted. Change to a folder that exists.\n"
    assert capsys.readouterr().err == message


def test_a_missing_file_in_an_existing_working_directory_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError), user_errors():
        raise FileNotFoundError
