"""What may end a run, what the user is told then, and the exit status; signals.

Training, the data and the results on disk may end a run; nothing else may. What goes wrong beside them (Weights &
Biases, the bar, a figure, the terminal) costs a line of warning.
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

from data_utils import DatasetError


class ConfigurationError(ValueError):
    """A setting cannot be used; the message names it, what was found and what to do."""


class RunError(RuntimeError):
    """The run cannot go on; the message says what to do."""


class Failure(SystemExit, Exception):
    """The end of a failed run, with its exit status; an Exception, too, for ``wandb.agent(function=main)``.

    A mere SystemExit is a success to it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.code = status


class NotebookFailure(Exception):
    """The end of a failed run in a notebook, where there is no exit status; IPython shows its message and no more."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a mistake of the user's, or an interruption, into one message and the right exit status.

    Status 2 is a bad configuration, 1 a failed run, 128 + the signal's number an interruption. Errors of the program
    itself, and those in the user's own network, keep their traceback. What is changed in the process meanwhile
    (standard streams, signals, a logger) is as it was at the end.
    """
    with ExitStack() as undo:
        undo.enter_context(_standard_streams())
        undo.enter_context(_quiet_matplotlib())
        undo.enter_context(_signals_as_exceptions())
        try:
            yield
        except ConfigurationError as error:
            lines = [f"  {line}" for line in str(error).splitlines()]
            _fail(2, "\n".join(["Bad configuration:", *lines]))
        except (DatasetError, RunError) as error:
            _fail(1, f"The run failed: {error}")
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            _fail(128 + int(number), f"Stopped by {signal.Signals(number).name}.")
        except Exception as error:
            if not is_stop_of_an_agent(error):
                raise
            print("Stopped by W&B's agent.", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None


def _fail(status: int, message: str) -> None:
    if _is_notebook():
        raise NotebookFailure(message) from None
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr)
    raise Failure(status, message) from None


def _is_notebook() -> bool:
    """Return whether IPython runs this, as in a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def is_stop_of_an_agent(error: Exception) -> bool:
    """Return whether it is the bare exception that an agent of W&B's puts into the thread that it started."""
    return type(error) is Exception and not error.args and "wandb.agents.pyagent" in sys.modules


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Have all three standard streams, able to show any text.

    Python has None where one is closed, as by ``2>&-``, and whatever is opened next takes the stream's number: a
    checkpoint, to be printed into. A file on Windows may have no character for a table's lines.
    """
    with ExitStack() as undo:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                number = os.open(os.devnull, os.O_RDWR)
                os.set_inheritable(number, True)  # for the workers
                undo.callback(setattr, sys, name, None)
                setattr(sys, name, undo.enter_context(os.fdopen(number, mode)))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                undo.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="replace")
        yield


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Spare the user matplotlib's warning of a home directory that cannot be written: it needs none for a picture."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and the end of the terminal end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may set a handler
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    # Ignored, as under nohup and behind `&` in a script; or of a program around us that Python knows nothing of.
    left_alone = (signal.SIG_IGN, None)
    previous = {number: handler for number, handler in handlers.items() if handler not in left_alone}
    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def beside_the_run(what: str) -> Iterator[None]:
    """Do something that must not end a run: whatever it raises becomes one line."""
    try:
        yield
    except Exception as error:
        if is_stop_of_an_agent(error):
            raise
        with suppress(OSError):
            print(f"Without {what}: {type(error).__name__}: {error}", file=sys.stderr)


def end_traceback_outside(error: Exception, *paths: str) -> None:
    """Let the traceback of an error end at its last line outside these files and folders: the user's own, if any."""
    trace, last = error.__traceback__, None
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(paths):
            last = trace
        trace = trace.tb_next
    if last is not None:
        last.tb_next = None
