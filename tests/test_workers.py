"""Worker processes: each may die at any moment, answers alone come back, and none outlives its parent."""

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
from conftest import slow, start_python, wait_for, wait_until_idle
from experiment.workers import ThisProcess, WorkerDiedError, WorkerProcesses

# What is sent is defined inside the tests, or is the standard library's: a worker shall not import the tests.


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerProcesses]:
    """Two workers, for the tests that leave both alive."""
    with WorkerProcesses(2) as pool:
        yield pool


@pytest.fixture
def mortal_pool() -> Iterator[WorkerProcesses]:
    """Two workers, of which a test may kill any."""
    with WorkerProcesses(2) as pool:
        yield pool


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def slowly(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that lets another worker take the next call meanwhile."""

    def call() -> Any:
        time.sleep(0.3)
        return function()

    return call


def assert_the_pool_works(pool: WorkerProcesses, without: int) -> None:
    """Both workers answer, and that process is none of them."""
    futures = [pool.submit(slowly(os.getpid)) for _ in range(2)]
    processes = {future.result(timeout=30) for future in futures}
    assert len(processes) == 2 and without not in processes


def test_calls_are_computed_in_other_processes_side_by_side(pool: WorkerProcesses) -> None:
    assert_the_pool_works(pool, without=os.getpid())


def test_more_calls_than_workers_are_all_answered(pool: WorkerProcesses) -> None:
    futures = [pool.submit(pow, number, 2) for number in range(50)]
    assert [future.result(timeout=30) for future in futures] == [number**2 for number in range(50)]


def test_a_call_may_have_keywords(pool: WorkerProcesses) -> None:
    assert pool.submit(int, "ff", base=16).result(timeout=30) == 255


def test_what_no_other_process_can_import_is_sent_along(pool: WorkerProcesses) -> None:
    factor = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    result = pool.submit(lambda given: Local(factor * given.value), Local(2)).result(timeout=30)
    assert type(result) is Local and result.value == 6


PROGRAM = """
import os
from experiment.workers import WorkerProcesses

OFFSET = 40

class Number:
    def __init__(self, value):
        self.value = value

    def more(self):
        return Number(OFFSET + self.value)

class OwnError(Exception):
    pass

def compute(number):
    if os.getpid() == parent:
        raise AssertionError("computed in the parent")
    return number.more()

def fail():
    raise OwnError("as planned")

parent = os.getpid()
with WorkerProcesses(1) as pool:
    result, error = pool.submit(compute, Number(2)).result(), pool.submit(fail).exception()
print(type(result) is Number, result.value, type(error) is OwnError, error)
"""


@pytest.mark.parametrize("kind", ["a script without a guard", *slow("-c", "standard input")])
def test_what_the_running_program_defines_is_sent_along(kind: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM)
    arguments = {"-c": ["-c", PROGRAM], "standard input": ["-"]}.get(kind, ["script.py"])
    run = start_python(tmp_path, *arguments, stdin=subprocess.PIPE)
    output, errors = run.communicate(PROGRAM if kind == "standard input" else "", timeout=30)
    assert (output, errors) == ("True 42 True as planned\n", "")


def test_a_worker_is_in_a_session_of_its_own_where_ctrl_c_does_not_reach_it(pool: WorkerProcesses) -> None:
    sessions = [pool.submit(slowly(lambda: (os.getsid(0), os.getpid()))).result(30) for _ in range(2)]
    assert all(session == process != os.getsid(0) for session, process in sessions)


def test_an_idle_worker_that_is_killed_costs_one_call(mortal_pool: WorkerProcesses) -> None:
    killed = mortal_pool.submit(os.getpid).result(timeout=30)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: psutil.Process(killed).status() == psutil.STATUS_ZOMBIE)
    futures = [mortal_pool.submit(slowly(os.getpid)) for _ in range(2)]
    errors = [future.exception(timeout=30) for future in futures]
    assert sorted(map(type, errors), key=str) == sorted([type(None), WorkerDiedError], key=str)
    assert_the_pool_works(mortal_pool, without=killed)


def test_a_worker_that_is_killed_while_it_computes_costs_its_call_alone(
    mortal_pool: WorkerProcesses, tmp_path: Path
) -> None:
    def compute(name: str, seconds: float) -> int:
        (tmp_path / name).write_text(str(os.getpid()))
        time.sleep(seconds)
        return os.getpid()

    long, short = mortal_pool.submit(compute, "long", 100), mortal_pool.submit(compute, "short", 2)
    wait_until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("long", "short")))
    os.kill(killed := int((tmp_path / "long").read_text()), signal.SIGKILL)
    assert isinstance(long.exception(timeout=5), WorkerDiedError)
    assert short.result(timeout=30) == int((tmp_path / "short").read_text())
    assert_the_pool_works(mortal_pool, without=killed)


SENDING = """
import time
from experiment.workers import WorkerProcesses

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
    """Return a parent that is stopped, and one of its workers; both workers have more to send than a pipe takes."""
    parent = start_python(folder, "-c", SENDING)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.send_signal(signal.SIGSTOP)
    workers = psutil.Process(parent.pid).children()
    wait_until_idle(workers)
    return parent, workers[0]


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_sends_costs_its_call_alone(tmp_path: Path) -> None:
    parent, worker = stop_while_workers_send(tmp_path)
    worker.kill()
    parent.send_signal(signal.SIGCONT)
    output, errors = parent.communicate(timeout=30)
    assert (output, errors) == ("NoneType WorkerDiedError\n1 2 4 8\n", "")


def test_a_worker_that_is_killed_while_it_takes_a_call_costs_that_call_alone(mortal_pool: WorkerProcesses) -> None:
    killed = mortal_pool.submit(os.getpid).result(timeout=30)
    os.kill(killed, signal.SIGSTOP)
    futures = [mortal_pool.submit(len, bytes(10**7)) for _ in range(2)]  # one call fills the pipe of the stopped worker
    wait_until(lambda: any(future.done() for future in futures))
    time.sleep(0.2)
    os.kill(killed, signal.SIGKILL)
    errors = [future.exception(timeout=30) for future in futures]
    assert sorted(map(type, errors), key=str) == sorted([type(None), WorkerDiedError], key=str)
    assert_the_pool_works(mortal_pool, without=killed)


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_are_started_again_and_buried(mortal_pool: WorkerProcesses) -> None:
    before = {child.pid for child in psutil.Process().children()}
    for _ in range(4):
        futures = [mortal_pool.submit(slowly(lambda: os.kill(os.getpid(), 9))) for _ in range(2)]
        assert all(isinstance(future.exception(timeout=30), WorkerDiedError) for future in futures)
    after = {child.pid for child in psutil.Process().children()}
    assert len(after) == len(before) and len(after - before) == 2
    assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in after)


@pytest.mark.parametrize("end", [lambda: os._exit(0), *slow(lambda: sys.exit(0))], ids=["os._exit", "sys.exit"])
def test_a_call_that_ends_its_process_costs_itself_alone(mortal_pool: WorkerProcesses, end: Callable[[], None]) -> None:
    ending = mortal_pool.submit(slowly(end))
    answer = mortal_pool.submit(slowly(slowly(lambda: 1)))
    assert isinstance(ending.exception(timeout=30), WorkerDiedError)
    assert answer.result(timeout=30) == 1
    assert mortal_pool.submit(abs, -1).result(timeout=30) == 1


def test_an_exception_comes_back_with_the_workers_traceback_as_a_note(pool: WorkerProcesses) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "what is looked for", "nowhere")

    error = pool.submit(fail).exception(timeout=30)
    assert isinstance(error, FileNotFoundError) and error.filename == "nowhere"
    (note,) = error.__notes__
    assert note.startswith("In a worker process:\nTraceback") and "in fail" in note


def test_an_exception_that_cannot_be_taken_out_again_comes_back_in_words(pool: WorkerProcesses) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:  # what pickle gives back has one argument
            super().__init__(f"{one} and {two}")

    def fail() -> None:
        raise Odd(1, 2)

    error = pool.submit(fail).exception(timeout=30)
    assert isinstance(error, RuntimeError) and "1 and 2" in str(error) and "in fail" in str(error)


def test_an_exception_that_cannot_be_pickled_comes_back_in_words(pool: WorkerProcesses) -> None:
    def fail() -> None:
        error = ValueError("it holds a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    error = pool.submit(fail).exception(timeout=30)
    assert isinstance(error, RuntimeError) and "ValueError: it holds a lock" in str(error) and "in fail" in str(error)


def test_a_result_that_cannot_be_sent_is_an_exception_and_no_death(pool: WorkerProcesses) -> None:
    error = pool.submit(lambda: (number for number in range(3))).exception(timeout=30)
    assert error is not None and not isinstance(error, WorkerDiedError)
    assert "generator" in str(error)


def test_an_argument_that_cannot_be_sent_is_an_exception_and_no_death(pool: WorkerProcesses) -> None:
    error = pool.submit(len, (number for number in range(3))).exception(timeout=30)
    assert error is not None and not isinstance(error, WorkerDiedError)
    assert_the_pool_works(pool, without=os.getpid())


TALK = """
import os
from experiment.workers import WorkerProcesses

def talk():
    print("said by Python", flush=True)
    os.write(1, b"said by C\\n")
    os.system("echo said by a program")
    return "answer"

with WorkerProcesses(1) as pool:
    print(pool.submit(talk).result())
"""


def test_what_is_printed_goes_to_standard_error_and_not_among_the_answers(tmp_path: Path) -> None:
    output, errors = start_python(tmp_path, "-c", TALK).communicate(timeout=30)
    assert (output, errors) == ("answer\n", "said by Python\nsaid by C\nsaid by a program\n")


def test_what_python_prints_before_a_worker_listens_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a debugger's part in each process does, a sitecustomize, or a .pth file."""
    (tmp_path / "sitecustomize.py").write_text("print('Here I am, and this is more than eight bytes.')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerProcesses(1) as pool:
        assert [pool.submit(pow, 2, power).result(timeout=60) for power in (3, 4)] == [8, 16]


def test_a_call_that_reads_standard_input_takes_no_call_away(pool: WorkerProcesses) -> None:
    assert isinstance(pool.submit(input).exception(timeout=30), EOFError)  # so does a breakpoint that was left
    futures = [pool.submit(lambda: os.system("head -c 1 >/dev/null </dev/stdin; true")) for _ in range(2)]
    futures += [pool.submit(abs, -1) for _ in range(4)]
    assert [future.result(timeout=30) for future in futures] == [0, 0, 1, 1, 1, 1]


def test_shutting_down_kills_a_worker_that_is_stopped() -> None:
    with WorkerProcesses(1) as pool:
        process = pool.submit(os.getpid).result(timeout=30)
        os.kill(process, signal.SIGSTOP)
        future = pool.submit(len, bytes(10**7))  # more than its pipe takes
        time.sleep(0.2)
        started = time.monotonic()
    assert time.monotonic() - started < 2 and not psutil.pid_exists(process)
    assert isinstance(future.exception(timeout=1), WorkerDiedError)


def test_shutting_down_kills_workers_that_still_compute() -> None:
    started = time.monotonic()
    with WorkerProcesses(2) as pool:
        process = pool.submit(os.getpid).result(timeout=30)
        futures = [pool.submit(time.sleep, 100) for _ in range(4)]
        time.sleep(0.2)
    assert time.monotonic() - started < 20 and not psutil.pid_exists(process)
    assert all(future.cancelled() or isinstance(future.exception(), WorkerDiedError) for future in futures)
    with pytest.raises(RuntimeError):
        pool.submit(abs, 1)


PARENT = """
import os, sys, time
from experiment.workers import WorkerProcesses
pool = WorkerProcesses(2)
futures = [pool.submit(lambda: (time.sleep(0.3), os.getpid())[1]) for _ in range(2)]
print(*[future.result() for future in futures], flush=True)
future = pool.submit(lambda: [0 for _ in iter(int, 1)])  # for ever, and never letting another thread have the lock long
time.sleep(100)
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    parent = start_python(tmp_path, "-c", PARENT)
    assert parent.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(processes) == 2
    wait_for(lambda: max(process.cpu_percent() for process in processes) > 10, parent)  # one of them computes
    parent.kill()
    assert not psutil.wait_procs(processes, timeout=5)[1]
    parent.communicate(timeout=10)


@pytest.mark.slow
def test_no_worker_outlives_a_parent_that_is_killed_while_the_worker_sends(tmp_path: Path) -> None:
    parent, worker = stop_while_workers_send(tmp_path)
    parent.kill()
    assert not psutil.wait_procs([worker], timeout=5)[1]
    parent.communicate(timeout=10)


@pytest.mark.slow
def test_a_folder_named_experiment_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = "import experiment.workers as w\nwith w.WorkerProcesses(1) as pool: print(pool.submit(abs, -3).result())"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "script.py").write_text(code)
    run = start_python(tmp_path, str(tmp_path / "elsewhere" / "script.py"))
    output, errors = run.communicate(timeout=30)
    assert (output, errors) == ("3\n", "")


def test_this_process_computes_at_once_and_keeps_the_exception() -> None:
    with ThisProcess() as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
        assert isinstance(pool.submit(int, "x").exception(), ValueError)


def test_a_worker_that_could_not_be_started_again_is_started_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no room for a process")

    with WorkerProcesses(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("experiment.workers._start", refuse)
            assert isinstance(pool.submit(os._exit, 1).exception(), OSError)
        assert isinstance(pool.submit(pow, 2, 3).exception(), WorkerDiedError)
        assert pool.submit(pow, 2, 3).result() == 8
