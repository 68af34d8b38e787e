"""How durations, class names and sentences look in messages, tables and plots."""

import re
import textwrap

WIDTH = 80  # columns of the terminal
LOOKS_LIKE_KEY = r"[A-Za-z0-9_-]{40,}"  # a W&B API key, which no message may contain
KEY = r"(?<![A-Za-z0-9])[A-Za-z0-9]{40,}(?![A-Za-z0-9])|wandb_v1_\w+"  # hardly anything else looks like this


def format_duration(seconds: float) -> str:
    """Return a duration as ``42 s``, ``3:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def format_metric(value: float) -> str:
    """Return a metric with four decimals; a number of many digits, such as a loss that explodes, as ``2.545e+15``."""
    return f"{value:.4f}" if abs(value) < 10000 else f"{value:.4g}"


def display_name(class_name: str) -> str:
    """Return the name of a class; a digit becomes ``class 3``, so that nobody reads it as a metric."""
    return f"class {class_name}" if class_name.isdigit() else class_name


def wrap(sentence: str) -> str:
    """Return a sentence in lines of at most 80 columns."""
    return textwrap.fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)


def looks_like_key(value: object) -> bool:
    """Return whether a value, as a string, is or contains what looks like a W&B API key; parts of a path do not count.

    A key has 40 letters and digits, or begins with ``wandb_v1_``.
    """
    string = str(value).strip()
    if re.fullmatch(LOOKS_LIKE_KEY, string):
        return True
    return "/" not in string and re.search(KEY, string) is not None


def hide_keys(message: str) -> str:
    """Return a message with an ellipsis for whatever in it looks like a W&B API key."""
    return re.sub(LOOKS_LIKE_KEY, "…", message)
