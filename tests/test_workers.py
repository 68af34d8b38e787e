"""Worker processes: what comes back of a call, and what the death of a worker, or of the parent, costs."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, start_python

from experiment.workers import ThisProcess, WorkerDiedError, WorkerProcesses


class Unpicklable(Exception):
    """An exception that nobody can unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_value_error() -> None:
    raise ValueError("of the worker's")


def raise_unpicklable() -> None:
    raise Unpicklable("not ", "sent")


def print_loudly() -> str:
    print("a line from the network")
    os.write(1, b"bytes from below\n")
    return "the answer"


def sleep_and_return(seconds: float, size: int = 0) -> bytes:
    time.sleep(seconds)
    return bytes(size)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(2) as pool:
        yield pool


def test_results_come_back_in_the_order_of_the_calls(pool: WorkerProcesses) -> None:
    assert list(pool.map(pow, range(6), [2] * 6)) == [0, 1, 4, 9, 16, 25]


def test_two_workers_compute_side_by_side(pool: WorkerProcesses) -> None:
    list(pool.map(sleep_and_return, [0.0, 0.0]))
    started = time.monotonic()
    list(pool.map(sleep_and_return, [1.0, 1.0]))
    assert time.monotonic() - started < 1.9


def test_an_exception_comes_back_with_the_workers_traceback(pool: WorkerProcesses) -> None:
    with pytest.raises(ValueError, match="of the worker's") as error:
        pool.submit(raise_value_error).result()
    assert 'raise ValueError("of the worker' in error.value.__notes__[0]


def test_an_exception_that_cannot_be_sent_comes_back_in_words(pool: WorkerProcesses) -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: not sent"):
        pool.submit(raise_unpicklable).result()


def test_what_a_call_prints_does_not_get_among_the_answers(
    pool: WorkerProcesses, capfd: pytest.CaptureFixture[str]
) -> None:
    with WorkerProcesses(1) as fresh:  # one whose standard error is the captured one
        assert fresh.submit(print_loudly).result() == "the answer"
        assert fresh.submit(pow, 2, 3).result() == 8
    output, errors = capfd.readouterr()
    assert output == "" and "a line from the network" in errors and "bytes from below" in errors


def test_a_worker_is_in_a_session_of_its_own(pool: WorkerProcesses) -> None:
    assert pool.submit(os.getsid, 0).result() != os.getsid(0)


@pytest.mark.parametrize("moment", ["idle", "computing", "sending"])
def test_a_killed_worker_costs_its_own_call_alone(moment: str) -> None:
    with WorkerProcesses(2) as pool:
        victim = psutil.Process(pool.submit(os.getpid).result())
        if moment == "idle":
            victim.kill()
            calls = [pool.submit(pow, 2, n) for n in range(2)]
        else:  # both are busy; the answer of 500 MB takes a while
            size = 500_000_000 if moment == "sending" else 0
            calls = [pool.submit(sleep_and_return, 0.5, size) for _ in range(2)]
            time.sleep(0.7 if moment == "sending" else 0.2)
            victim.kill()
        errors = [call.exception() for call in calls]
        assert sum(isinstance(error, WorkerDiedError) for error in errors) <= 1
        assert all(error is None or isinstance(error, WorkerDiedError) for error in errors)
        if moment != "sending":  # where it may have been sent already
            assert sum(error is None for error in errors) == 1
        assert list(pool.map(pow, [2] * 4, range(4))) == [1, 2, 4, 8]


def test_shutting_down_kills_a_worker_in_the_middle_of_a_call() -> None:
    with WorkerProcesses(1) as pool:
        worker = psutil.Process(pool.submit(os.getpid).result())
        pool.submit(time.sleep, 60)
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 2 and not worker.is_running()


PARENT = """
    import os, time
    from experiment.workers import WorkerProcesses

    class OfThisScript:
        def forward(self):
            return helper() + 1

    def helper():
        return 41

    def call():
        return OfThisScript().forward()

    pool = WorkerProcesses(2)
    print(*pool.map(call_pid := lambda _: os.getpid(), range(2)), pool.submit(call).result(), flush=True)
"""


def test_workers_end_with_a_parent_that_is_killed_in_the_middle_of_their_calls(tmp_path: Path) -> None:
    code = textwrap.dedent(PARENT) + "pool.submit(time.sleep, 600); pool.submit(time.sleep, 600); time.sleep(600)"
    parent = start_python(tmp_path, "-c", code)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()[:2]]
    time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(set(workers), timeout=5)
    parent.communicate()
    assert not alive


@pytest.mark.parametrize("script", [True, False], ids=["a script without a guard", "python -c"])
def test_what_is_defined_in_the_main_program_is_sent_along(script: bool, tmp_path: Path) -> None:
    code = textwrap.dedent(PARENT) + "pool.shutdown()"
    (tmp_path / "script.py").write_text(code)
    run = start_python(tmp_path, *(["script.py"] if script else ["-c", code]))
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert output.split()[-1] == "42" and errors == ""


def test_a_folder_named_experiment_in_the_working_directory_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "__init__.py").write_text("raise ImportError('not this one')")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n" + textwrap.dedent(PARENT) + "pool.shutdown()"
    )
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "42"


def test_this_process_computes_at_once_and_keeps_an_exception_for_who_asks() -> None:
    pool = ThisProcess()
    assert pool.submit(pow, 2, 3).done()
    assert isinstance(pool.submit(raise_value_error).exception(), ValueError)
