"""Worker processes as an Executor of the standard library: each has pipes of its own, and may die at any moment.

A worker computes what it is sent and knows nothing of the rest. It ends as soon as its parent has, however that ended.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import IO, Any

import cloudpickle

from data_utils import PROJECT_DIR

# The parent's sys.path comes first of all: a folder named "experiment" in the working directory is none of ours.
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; import experiment.workers; experiment.workers.serve()"

MARK = b"\0experiment.workers\0"  # begins each message: a debugger or a sitecustomize may print before a worker listens


class WorkerDiedError(BrokenExecutor):
    """A worker process ended before it had answered; another has been started in its place."""


class ThisProcess(Executor):
    """Computes what it is given here and at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Call the function and return a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:  # whatever it is: who asks for the result gets it
            future.set_exception(error)
        return future


class WorkerProcesses(Executor):
    """A number of processes, for each of which a thread in this one sends calls and waits for the answers.

    What is sent may be defined in a script that is running, in a notebook or in an interactive shell: whatever other
    processes cannot import is sent along.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._processes = [_start() for _ in range(count)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._idle.put(number)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Let a worker call the function as soon as one is free.

        The future raises WorkerDiedError where the worker died meanwhile, and whatever the function raised, with the
        worker's traceback as a note.
        """
        return self._threads.submit(self._ask, (function, arguments, keywords))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Kill the workers, whatever they are at."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait, cancel_futures=True)
        for process in self._processes:
            _bury(process)

    def _ask(self, call: tuple[Any, ...]) -> Any:
        message = cloudpickle.dumps(call)
        number = self._idle.get()
        process = self._processes[number]
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, message)
            answer = _receive(process.stdout)
        except (OSError, EOFError, ValueError):  # ValueError: no process could be started the last time
            _bury(process)
            with self._lock:
                if not self._closed:
                    self._processes[number] = _start()
            raise WorkerDiedError("a worker process ended before it had answered") from None
        finally:
            self._idle.put(number)
        result, error = pickle.loads(answer)
        if error is not None:
            raise error
        return result


def _start() -> subprocess.Popen[bytes]:
    """Start a worker, out of reach of a Ctrl-C that is meant for this process."""
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    # Absolute, and ours first: os.chdir() may have been called since Python put '' into sys.path.
    search_path = [str(PROJECT_DIR), *(os.path.abspath(path) for path in sys.path)]
    command = [sys.executable, "-c", PROGRAM, *search_path]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart)


def _bury(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker, close its pipes and wait for its end."""
    with contextlib.suppress(OSError), process:  # what still lies in a pipe reaches nobody any more
        process.kill()


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(MARK)
    pipe.write(len(message).to_bytes(8))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """Return the next message; raise EOFError where the other end was closed before it was whole."""
    _skip_to_mark(pipe)
    header = pipe.read(8)
    size = int.from_bytes(header)
    message = pipe.read(size)
    if len(header) < 8 or len(message) < size:
        raise EOFError
    return message


def _skip_to_mark(pipe: IO[bytes]) -> None:
    last_bytes = b""
    while last_bytes != MARK:
        byte = pipe.read(1)
        if not byte:
            raise EOFError
        last_bytes = (last_bytes + byte)[-len(MARK) :]


def serve() -> None:
    """Be a worker: answer the calls from standard input on standard output until the parent is gone."""
    incoming, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a network that asks for input gets none of the calls
    os.dup2(2, 1)  # and what it prints goes to standard error, not among the answers
    sys.stdout = sys.stderr
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_take_calls, args=(incoming, calls), daemon=True).start()
    while True:
        answer = _answer(calls.get())
        with contextlib.suppress(OSError):  # no parent, no answer
            _send(answers, answer)


def _take_calls(incoming: IO[bytes], calls: queue.SimpleQueue[bytes]) -> None:
    """Take calls from the parent, also while an epoch is computed: at its end the parent is gone, and so are we."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls.put(_receive(incoming))
    os._exit(1)


def _answer(call: bytes) -> bytes:
    """Return the pickled (result, None) of a call, or (None, error)."""
    try:
        function, arguments, keywords = pickle.loads(call)
        return cloudpickle.dumps((function(*arguments, **keywords), None))
    except Exception as error:  # whatever it is, the parent decides what becomes of it
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            answer = cloudpickle.dumps((None, error))
            pickle.loads(answer)
        except Exception:  # an exception of the user's own that cannot be sent
            answer = pickle.dumps((None, RuntimeError("".join(traceback.format_exception_only(error)))))
        return answer
