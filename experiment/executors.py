"""Executors that compute epochs: worker processes, this process, or one that the caller passes in.

A worker process has its own pipes and may be killed at any moment. It computes what it is sent and ends with its
parent, however the parent ended. The user's own code is sent by value, as it is in memory.
"""

import contextlib
import io
import marshal
import os
import pickle
import queue
import site
import subprocess
import sys
import sysconfig
import threading
import traceback
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import IO, TYPE_CHECKING, Any

import cloudpickle

import experiment
from data_files import PROJECT_DIR
from experiment.errors import RunError
from train_utils import CloudpickledFactory

if TYPE_CHECKING:
    from experiment.settings import TrainingConfig

# The parent's sys.path comes first: a folder named "experiment" in the working directory must not be imported.
BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; import experiment.executors; experiment.executors.serve()"
MESSAGE_MAGIC = b"\0experiment.executors\0"  # starts each message: a debugger may print before a worker reads its pipe
SHUTDOWN_SECONDS = 2  # that `shutdown` waits for each thread
PROJECT_MODULES = ("experiment", "comparison", "train_utils", "data_utils", "data_files")  # workers can import them
_one_experiment_at_a_time = threading.RLock()  # random generators and W&B's settings belong to the whole process


@contextmanager
def make_executor(config: "TrainingConfig", executor: Executor | None) -> Iterator[Executor]:
    """Yield the executor that computes the epochs: the caller's, worker processes, or this process.

    An executor that was passed in is not shut down at the end. Experiments in several threads of this process wait for
    each other here.
    """
    with _one_experiment_at_a_time:
        if executor is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sending large graph")  # Dask, of each state above 10 MB
                yield executor
            return
        from experiment.resources import resolve_resources  # not at the top: workers import this module

        workers = resolve_resources(config).workers
        with WorkerProcesses(workers) if workers > 1 else SerialExecutor() as pool:
            yield pool


def uses_other_processes(pool: Executor) -> bool:
    """Return whether an executor may compute outside this process."""
    return not isinstance(pool, SerialExecutor)


def external_name(pool: Executor) -> str | None:
    """Return the class name of an executor that the caller passed in; None for the program's own."""
    return None if isinstance(pool, (SerialExecutor, WorkerProcesses)) else type(pool).__name__


def submit(pool: Executor, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Submit a call to an executor.

    Raises
    ------
    RunError
        If it accepts no more work, for example because it is broken.
    """
    try:
        return pool.submit(function, *arguments)
    except Exception as error:  # each kind of executor has its own
        raise RunError(f"{type(pool).__name__} accepts no more work: {error}") from None


class WorkerDiedError(BrokenExecutor):
    """A worker process ended before it returned a result; another one has been started in its place."""


class SerialExecutor(Executor):
    """Computes each call in this process, when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Call the function and return a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:  # of any type: the future raises it
            future.set_exception(error)
        return future


class WorkerProcesses(Executor):
    """A number of worker processes; for each, a thread of this process sends calls and waits for the results.

    The threads are daemons, and `shutdown` waits for them only for a while: if Ctrl-C interrupts the main thread while
    it has locked a future, the thread that sets its result waits forever.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._processes = [_start_worker() for _ in range(count)]
        self._threads = [threading.Thread(target=self._handle_calls, args=(n,), daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Let the next idle worker call the function.

        The future raises WorkerDiedError if the worker dies, and whatever the function raises, with the worker's
        traceback as a note.
        """
        if self._closed:
            raise RuntimeError("the workers have been shut down")
        future: Future[Any] = Future()
        self._calls.put((future, (function, arguments, keywords)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Kill the workers, busy or not, and cancel the calls that no worker has begun."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._calls.get_nowait()
                if item is not None:
                    item[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join(SHUTDOWN_SECONDS)
        for process in self._processes:
            _terminate(process)

    def _handle_calls(self, number: int) -> None:
        """Handle calls with one of the workers until `shutdown`."""
        while self._handle_next_call(number):
            pass

    def _handle_next_call(self, number: int) -> bool:
        """Handle one call; return False at the end. (A function, so that no call is kept in memory after it.)"""
        item = self._calls.get()
        if item is None:
            return False
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(self._call_in_worker(number, call))
            except Exception as error:  # of any type: the future raises it
                future.set_exception(error)
        return True

    def _call_in_worker(self, number: int, call: tuple[Any, ...]) -> Any:
        message = cloudpickle.dumps(call)
        process = self._processes[number]
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, message)
            reply = _receive(process.stdout)
        except (OSError, EOFError, ValueError):  # ValueError: the pipes are closed, since restarting the worker failed
            _terminate(process)
            with self._lock:
                if not self._closed:
                    self._processes[number] = _start_worker()
            raise WorkerDiedError("a worker process ended before it returned a result") from None
        result, error = pickle.loads(reply)
        if error is not None:
            raise error
        return result


def _start_worker() -> subprocess.Popen[bytes]:
    """Start a worker in a process group of its own, which Ctrl-C in the terminal does not reach."""
    own_group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it was deleted, and PyTorch cannot be imported without one
        folder = str(PROJECT_DIR)
    # Absolute paths, since os.chdir() may have been called; the project's own folder first.
    search_path = [str(PROJECT_DIR), *(os.path.join(folder, path) for path in sys.path)]
    command = [sys.executable, "-c", BOOTSTRAP, *search_path]
    environment = {name: value for name, value in os.environ.items() if name not in experiment.PINNING_VARIABLES}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, env=environment, **own_group
    )


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker, close its pipes and wait for its end."""
    with contextlib.suppress(OSError), process:  # OSError: closing flushes a pipe that nobody reads any more
        process.kill()


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(MESSAGE_MAGIC)
    pipe.write(len(message).to_bytes(8))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """Return the next message; raise EOFError if the other end was closed before it was complete."""
    _skip_to_magic(pipe)
    header = pipe.read(8)
    size = int.from_bytes(header)
    message = pipe.read(size)
    if len(header) < 8 or len(message) < size:
        raise EOFError
    return message


def _skip_to_magic(pipe: IO[bytes]) -> None:
    last_bytes = b""
    while last_bytes != MESSAGE_MAGIC:
        byte = pipe.read(1)
        if not byte:
            raise EOFError
        last_bytes = (last_bytes + byte)[-len(MESSAGE_MAGIC) :]


def serve() -> None:
    """Run a worker: read calls from standard input and write results to standard output until the parent ends."""
    calls_pipe, results_pipe = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a network that reads standard input must not read the calls
    os.dup2(2, 1)  # and what it prints goes to standard error, not between the results
    sys.stdout = sys.stderr
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(calls_pipe, calls), daemon=True).start()
    while True:
        reply = _compute_reply(calls.get())
        with contextlib.suppress(OSError):  # the parent has ended
            _send(results_pipe, reply)


def _read_calls(pipe: IO[bytes], calls: queue.SimpleQueue[bytes]) -> None:
    """Read calls, also during an epoch, and end this process at the end of the pipe: the parent has ended then."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls.put(_receive(pipe))
    os._exit(1)


def _compute_reply(call: bytes) -> bytes:
    """Return the pickled (result, None) of a call, or (None, error)."""
    try:
        function, arguments, keywords = pickle.loads(call)
        return cloudpickle.dumps((function(*arguments, **keywords), None))
    except Exception as error:  # of any type: the parent decides
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            reply = cloudpickle.dumps((None, error))
            pickle.loads(reply)
        except Exception:  # an exception of the user's own that cannot be pickled
            reply = pickle.dumps((None, RuntimeError("".join(traceback.format_exception_only(error)))))
        return reply


# --- Sending the user's own code ---


def pickle_by_value(factory: Callable[[], Any]) -> CloudpickledFactory:
    """Return a function or class with the user's own code in it, as it is in memory, for other processes.

    Raises
    ------
    Exception
        Whatever cloudpickle raises if something in it, such as a lock, cannot be pickled.
    """
    registered = []
    for module in _user_modules():
        if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
    try:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(factory)
        return CloudpickledFactory(buffer.getvalue())
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    return marshal.loads, (marshal.dumps(code),)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's pickler, but code objects keep their file name, so that a traceback can show the user's line."""

    dispatch_table = ChainMap({CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


def _user_modules() -> list[ModuleType]:
    """Return the modules that are neither installed nor a part of this program: other processes may lack them."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    folders += [os.path.realpath(folder) for folder in folders]
    installed = tuple(os.path.join(folder, "") for folder in folders)
    modules = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module.__name__ != name:
            continue
        if name.partition(".")[0] in PROJECT_MODULES:
            continue
        file = getattr(module, "__file__", None)
        if file and not str(file).startswith(installed):
            modules.append(module)
    return modules
