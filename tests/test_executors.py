"""Worker processes: each may be killed at any moment, only results come back, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, finish, slow, start_python, wait_for, wait_until_idle

from experiment.executors import SerialExecutor, WorkerDiedError, WorkerProcesses

# Functions are defined inside the tests or come from the standard library, since workers cannot import the tests.


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerProcesses]:
    """Two workers, for the tests that kill none."""
    with WorkerProcesses(2) as pool:
        yield pool


@pytest.fixture
def mortal_pool() -> Iterator[WorkerProcesses]:
    """Two workers that a test may kill."""
    with WorkerProcesses(2) as pool:
        yield pool


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def slowly(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that takes so long that the other worker takes the next call."""

    def call() -> Any:
        time.sleep(0.3)
        return function()

    return call


def assert_pool_works(pool: WorkerProcesses, without: int) -> None:
    """Check that both workers compute, and that neither is this process."""
    futures = [pool.submit(slowly(os.getpid)) for _ in range(2)]
    processes = {future.result(timeout=30) for future in futures}
    assert len(processes) == 2 and without not in processes


def test_workers_start_although_the_working_directory_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with WorkerProcesses(1) as pool:
        assert pool.submit(os.getcwd).result(timeout=60) == str(REPOSITORY)


def test_calls_are_computed_in_parallel_in_other_processes(pool: WorkerProcesses) -> None:
    assert_pool_works(pool, without=os.getpid())


def test_more_calls_than_workers_are_all_computed(pool: WorkerProcesses) -> None:
    futures = [pool.submit(pow, number, exp=2) for number in range(50)]
    assert [future.result(timeout=30) for future in futures] == [number**2 for number in range(50)]


def test_a_class_that_cannot_be_imported_is_sent_by_value(pool: WorkerProcesses) -> None:
    factor = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    result = pool.submit(lambda given: Local(factor * given.value), Local(2)).result(timeout=30)
    assert type(result) is Local and result.value == 6


def test_a_worker_has_its_own_session_which_ctrl_c_does_not_reach(pool: WorkerProcesses) -> None:
    sessions = [pool.submit(slowly(lambda: (os.getsid(0), os.getpid()))).result(30) for _ in range(2)]
    assert all(session == process != os.getsid(0) for session, process in sessions)


@pytest.mark.slow
def test_killing_an_idle_worker_costs_one_call(mortal_pool: WorkerProcesses) -> None:
    killed = mortal_pool.submit(os.getpid).result(timeout=30)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: psutil.Process(killed).status() == psutil.STATUS_ZOMBIE)
    futures = [mortal_pool.submit(slowly(os.getpid)) for _ in range(2)]
    errors = [future.exception(timeout=30) for future in futures]
    assert sorted(map(type, errors), key=str) == sorted([type(None), WorkerDiedError], key=str)
    assert_pool_works(mortal_pool, without=killed)


def test_killing_a_worker_that_computes_costs_only_its_call(mortal_pool: WorkerProcesses, tmp_path: Path) -> None:
    def compute(name: str, seconds: float) -> int:
        (tmp_path / name).write_text(str(os.getpid()))
        time.sleep(seconds)
        return os.getpid()

    long, short = mortal_pool.submit(compute, "long", 100), mortal_pool.submit(compute, "short", 2)
    wait_until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("long", "short")))
    os.kill(killed := int((tmp_path / "long").read_text()), signal.SIGKILL)
    assert isinstance(long.exception(timeout=5), WorkerDiedError)
    assert short.result(timeout=30) == int((tmp_path / "short").read_text())
    assert_pool_works(mortal_pool, without=killed)


SENDING = """
import time
from experiment.executors import WorkerProcesses

def compute():
    began = time.process_time()
    while time.process_time() < began + 1:
        pass
    return bytes(10**7)

with WorkerProcesses(2) as pool:
    futures = [pool.submit(compute) for _ in range(2)]
    print("computing", flush=True)
    print(*sorted(type(future.exception()).__name__ for future in futures))
    print(*[pool.submit(pow, 2, number).result() for number in range(4)])
"""


def stop_while_workers_send(folder: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """Return a stopped parent and one of its workers, both of which are blocked in sending a large result."""
    parent = start_python(folder, "-c", SENDING)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.send_signal(signal.SIGSTOP)
    workers = psutil.Process(parent.pid).children()
    wait_until_idle(workers)
    return parent, workers[0]


@pytest.mark.slow
def test_killing_a_worker_that_sends_costs_only_its_call(tmp_path: Path) -> None:
    parent, worker = stop_while_workers_send(tmp_path)
    worker.kill()
    parent.send_signal(signal.SIGCONT)
    output, errors = parent.communicate(timeout=30)
    assert (output, errors) == ("NoneType WorkerDiedError\n1 2 4 8\n", "")


@pytest.mark.slow
def test_killing_a_worker_that_receives_costs_only_that_call(mortal_pool: WorkerProcesses) -> None:
    killed = mortal_pool.submit(os.getpid).result(timeout=30)
    os.kill(killed, signal.SIGSTOP)
    futures = [mortal_pool.submit(len, bytes(10**7)) for _ in range(2)]  # larger than a pipe
    wait_until(lambda: any(future.done() for future in futures))
    time.sleep(0.2)
    os.kill(killed, signal.SIGKILL)
    errors = [future.exception(timeout=30) for future in futures]
    assert sorted(map(type, errors), key=str) == sorted([type(None), WorkerDiedError], key=str)
    assert_pool_works(mortal_pool, without=killed)


@pytest.mark.parametrize("end", slow(lambda: os._exit(0), lambda: sys.exit(0), lambda: os.kill(os.getpid(), 9)))
def test_workers_that_end_again_and_again_are_replaced_and_leave_no_zombie(
    end: Callable[[], None], mortal_pool: WorkerProcesses
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    for _ in range(2):
        ending, other = mortal_pool.submit(slowly(end)), mortal_pool.submit(slowly(slowly(lambda: 1)))
        assert isinstance(ending.exception(timeout=30), WorkerDiedError)
        assert other.result(timeout=30) == 1
    after = {child.pid for child in psutil.Process().children()}
    assert len(after) == len(before)
    assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in after)


def test_an_exception_has_the_workers_traceback_as_a_note(pool: WorkerProcesses) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "no such file", "nowhere")

    error = pool.submit(fail).exception(timeout=30)
    assert isinstance(error, FileNotFoundError) and error.filename == "nowhere"
    (note,) = error.__notes__
    assert note.startswith("In a worker process:\nTraceback") and "in fail" in note


def test_an_exception_that_cannot_be_sent_becomes_a_runtime_error(pool: WorkerProcesses) -> None:
    class TwoArguments(Exception):
        def __init__(self, one: int, two: int) -> None:  # pickle passes one
            super().__init__(f"{one} and {two}")

    def fail_to_unpickle() -> None:
        raise TwoArguments(1, 2)

    def fail_to_pickle() -> None:
        error = ValueError("it holds a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    for function, message in ((fail_to_unpickle, "1 and 2"), (fail_to_pickle, "ValueError: it holds a lock")):
        error = pool.submit(function).exception(timeout=30)
        assert isinstance(error, RuntimeError) and message in str(error) and f"in {function.__name__}" in str(error)


def test_results_and_arguments_that_cannot_be_sent_are_exceptions(pool: WorkerProcesses) -> None:
    for future in (pool.submit(threading.Lock), pool.submit(id, threading.Lock())):
        error = future.exception(timeout=30)
        assert error is not None and not isinstance(error, WorkerDiedError)
    assert_pool_works(pool, without=os.getpid())


TALK = """
import os
from experiment.executors import WorkerProcesses

def talk():
    print("from Python", flush=True)
    os.write(1, b"from C\\n")
    os.system("echo from a program")
    return "result"

with WorkerProcesses(1) as pool:
    print(pool.submit(talk).result())
"""


@pytest.mark.slow
def test_output_of_a_worker_goes_to_standard_error(tmp_path: Path) -> None:
    output, errors = start_python(tmp_path, "-c", TALK).communicate(timeout=30)
    assert (output, errors) == ("result\n", "from Python\nfrom C\nfrom a program\n")


def test_output_before_a_worker_listens_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('printed by sitecustomize, as a debugger may do')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerProcesses(1) as pool:
        assert [pool.submit(pow, 2, power).result(timeout=60) for power in (3, 4)] == [8, 16]


def test_a_call_that_reads_standard_input_reads_nothing(pool: WorkerProcesses) -> None:
    assert isinstance(pool.submit(input).exception(timeout=30), EOFError)
    futures = [pool.submit(lambda: os.system("head -c 1 >/dev/null </dev/stdin; true")) for _ in range(2)]
    futures += [pool.submit(abs, -1) for _ in range(4)]
    assert [future.result(timeout=30) for future in futures] == [0, 0, 1, 1, 1, 1]


def test_shutdown_kills_workers_that_compute_or_are_stopped() -> None:
    with WorkerProcesses(2) as pool:
        processes = [future.result(30) for future in [pool.submit(slowly(os.getpid)) for _ in range(2)]]
        os.kill(processes[0], signal.SIGSTOP)
        futures = [pool.submit(lambda data: time.sleep(100), bytes(10**7)) for _ in range(4)]  # larger than a pipe
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 2 and not any(map(psutil.pid_exists, processes))
    assert all(future.cancelled() or isinstance(future.exception(), WorkerDiedError) for future in futures)
    with pytest.raises(RuntimeError):
        pool.submit(abs, 1)


LOCKED = """
import time
from experiment.executors import WorkerProcesses
with WorkerProcesses(1) as pool:
    future = pool.submit(time.sleep, 100)
    future._condition.acquire()  # as if Ctrl-C had come between the lock and its release
"""


def test_shutdown_and_exit_do_not_wait_for_a_future_that_stays_locked(tmp_path: Path) -> None:
    finish(start_python(tmp_path, "-c", LOCKED))


PARENT = """
import os, sys, time
from experiment.executors import WorkerProcesses
pool = WorkerProcesses(2)
futures = [pool.submit(lambda: (time.sleep(0.3), os.getpid())[1]) for _ in range(2)]
print(*[future.result() for future in futures], flush=True)
future = pool.submit(lambda: [0 for _ in iter(int, 1)])  # forever, holding the interpreter lock
time.sleep(100)
"""


@pytest.mark.slow
def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    parent = start_python(tmp_path, "-c", PARENT)
    assert parent.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(processes) == 2
    wait_for(lambda: max(process.cpu_percent() for process in processes) > 10, parent)
    parent.kill()
    assert not psutil.wait_procs(processes, timeout=5)[1]
    parent.communicate(timeout=10)


@pytest.mark.slow
def test_no_worker_outlives_a_parent_that_is_killed_while_it_sends(tmp_path: Path) -> None:
    parent, worker = stop_while_workers_send(tmp_path)
    parent.kill()
    assert not psutil.wait_procs([worker], timeout=5)[1]
    parent.communicate(timeout=10)


@pytest.mark.slow
def test_a_folder_named_experiment_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "__init__.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "script.py").write_text(TALK)
    output, _ = start_python(tmp_path, str(tmp_path / "elsewhere" / "script.py")).communicate(timeout=30)
    assert output == "result\n"


def test_the_serial_executor_computes_in_this_process_and_keeps_exceptions() -> None:
    with SerialExecutor() as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
        assert isinstance(pool.submit(int, "x").exception(), ValueError)


@pytest.mark.slow
def test_a_worker_that_could_not_be_replaced_is_replaced_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no memory for a process")

    with WorkerProcesses(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("experiment.executors._start_worker", refuse)
            assert isinstance(pool.submit(os._exit, 1).exception(), OSError)
        assert isinstance(pool.submit(pow, 2, 3).exception(), WorkerDiedError)
        assert pool.submit(pow, 2, 3).result() == 8
