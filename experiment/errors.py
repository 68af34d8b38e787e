"""Exceptions, exit status and signals.

Only a failure in the configuration, the data, the training or the results on disk ends a run. Any other failure
(Weights & Biases, the progress bar, a plot, the terminal) prints one line.
"""

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any


class ConfigurationError(ValueError):
    """A setting cannot be used; the message names it, what was found and what to do."""

    exit_status = 2


class RunError(RuntimeError):
    """The run cannot continue; the message says what to do."""

    exit_status = 1


class ExitError(Exception):
    """The end of a failed run in a notebook, which has no exit status; IPython shows only its message."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake, or an interruption, into one message and the right exit status.

    An exception whose class has an `exit_status` ends the program with that status and without a traceback: 2 for a bad
    configuration, 1 for a failed run. A signal ends it with 128 + its number. Errors of the program itself, and those
    in the user's own network, keep their traceback. What is changed in the process meanwhile (standard streams,
    signals, a logger) is restored at the end.
    """
    with ExitStack() as restore:
        restore.enter_context(_usable_standard_streams())
        restore.enter_context(_quiet_matplotlib())
        restore.enter_context(_signals_as_exceptions())
        try:
            yield
        except KeyboardInterrupt as interrupt:
            number = _signal_number(interrupt)
            _exit(128 + number, f"Stopped by {signal.Signals(number).name}.")
        except Exception as error:
            status = getattr(error, "exit_status", None)
            if isinstance(error, FileNotFoundError) and error.filename is None and not _working_directory_exists():
                _exit(1, "The run failed: the working directory was deleted. Change to a folder that exists.")
            if status is None:
                raise
            _exit(status, _message(error, status))


def _working_directory_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _message(error: Exception, status: int) -> str:
    if status != ConfigurationError.exit_status:
        return f"The run failed: {error}"
    lines = [f"  {line}" for line in str(error).splitlines()]
    return "\n".join(["Bad configuration:", *lines])


def _signal_number(interrupt: KeyboardInterrupt) -> int:
    """Return the number that our own handler put into the exception; SIGINT if it came from elsewhere."""
    number = interrupt.args[0] if interrupt.args else None
    return number if isinstance(number, signal.Signals) else signal.SIGINT


def _exit(status: int, message: str) -> None:
    if _in_notebook():
        raise ExitError(message) from None
    with suppress(OSError):  # the terminal may be closed
        print(message, file=sys.stderr)
    raise SystemExit(status) from None


def _in_notebook() -> bool:
    """Return whether IPython runs this code, as in a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


@contextmanager
def _usable_standard_streams() -> Iterator[None]:
    """Provide all three standard streams, able to print any text.

    If one is closed (``2>&-``), it is None in Python. The next file that is opened, such as a checkpoint, would get its
    file descriptor, and with it everything that is printed. A redirected stream on Windows may lack the characters of a
    table.
    """
    with ExitStack() as restore:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                number = os.open(os.devnull, os.O_RDWR)
                os.set_inheritable(number, True)  # for the workers
                restore.callback(setattr, sys, name, None)
                setattr(sys, name, restore.enter_context(os.fdopen(number, mode)))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                restore.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="replace")
        yield


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Hide matplotlib's warning about a home directory that is not writable: no plot needs one."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    # SIG_IGN: ignored on purpose, as under nohup. None: a handler that was not installed from Python.
    replaced = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def nonfatal(what: str) -> Iterator[None]:
    """Run code that must not end a run: any exception becomes one line."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            print(f"Without {what}: {type(error).__name__}: {error}", file=sys.stderr)


def end_traceback_at_user_code(error: Exception, *program_paths: str) -> None:
    """Drop the frames of a traceback after the last one of the user's code, which is outside these paths."""
    prefixes = tuple(path if path.endswith(".py") else os.path.join(path, "") for path in program_paths)
    trace, last_of_user = error.__traceback__, None
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(prefixes):
            last_of_user = trace
        trace = trace.tb_next
    if last_of_user is not None:
        last_of_user.tb_next = None
