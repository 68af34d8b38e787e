"""What may end a run, what the user is told then, and the exit status.

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
from contextlib import contextmanager, suppress
from typing import Any


class ConfigurationError(ValueError):
    """A setting cannot be used; the message names it, what was found and what to do."""


class RunError(RuntimeError):
    """The run cannot go on; the message says what to do."""


def _quiet_ctrl_c(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Stopped by SIGINT.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _open_what_is_closed() -> None:
    """Open the null device in the place of a standard stream that is closed, as by ``2>&-``.

    Python has None there, and whatever is opened next takes the stream's number: a checkpoint, to be printed into.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)  # for the workers
            setattr(sys, name, os.fdopen(number, mode))


# These are for the seconds in which PyTorch and the others are loading, before user_errors can answer to anything.
_open_what_is_closed()
sys.excepthook = _quiet_ctrl_c
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home directory that cannot be written
import numpy  # noqa: E402, F401  # before PyTorch imports it: there a Ctrl-C would be lost, or leave half of numpy


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a mistake of the user's, or an interruption, into one message and the right exit status.

    Status 2 is a bad configuration, 1 a failed run, 128 + the signal's number an interruption. Errors of the program
    itself, and those in the user's own network, keep their traceback.
    """
    previous = _handle_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a file on Windows may have no character for a table's lines
    try:
        yield
    except ConfigurationError as error:
        _fail(2, "Bad configuration:\n" + "\n".join(f"  {line}" for line in str(error).splitlines()))
    except (OSError, RunError) as error:
        _fail(1, f"The run failed: {error}")
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        _fail(128 + int(number), f"Stopped by {signal.Signals(number).name}.")
    except Exception as error:
        if type(error) is not Exception or error.args or "wandb.agents.pyagent" not in sys.modules:
            raise
        print("Stopped by W&B's agent.", file=sys.stderr)  # which puts a bare Exception into the thread that it started
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handle_signals() -> dict[int, Any]:
    """Let SIGTERM and the end of the terminal end the run as Ctrl-C does; return the handlers that were there."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # no other may set any

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, interrupt) for number in numbers}


class Failure(SystemExit, Exception):
    """The end of a failed run, with its exit status; an Exception, too, for ``wandb.agent(function=main)``.

    A mere SystemExit is a success to it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.code = status


def _fail(status: int, message: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr)
    raise Failure(status, message) from None


@contextmanager
def beside_the_run(what: str) -> Iterator[None]:
    """Do something that must not end a run: whatever it raises becomes one line."""
    try:
        yield
    except Exception as error:
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
