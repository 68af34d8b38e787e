"""HTML pages: from a template to one file that needs no other file and makes no request."""

from __future__ import annotations

import base64
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from experiment.errors import RunError
from experiment.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # HTML has only tab and newline; names may have all
RUNNING = b'data-state="running"'


def render(template: str, **content: Any) -> bytes:
    """Return a page as UTF-8, given the name of its template and what the template shows.

    Every string is shown as text, never as markup, except those that the template marks as safe: SVG drawings, which
    contain numbers and fixed words only.
    """
    page = _environment().get_template(template).render(content)
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", page).encode(errors="replace")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters["png"] = png_uri
    return environment


def png_uri(png: bytes) -> str:
    """Return a PNG file as a URI that contains it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def relative_url(*names: str) -> str:
    """Return the URL of a file, given the names of its folders and its own; they may be any file names."""
    return "/".join(quote(os.fsencode(name), safe="") for name in names)


def folder_name(path: Path) -> str:
    """Return a folder's name as text; bytes that are not text become question marks."""
    return path.name.encode(errors="replace").decode()


def read_progress(report: Path) -> tuple[str, str]:
    """Return the state of an unfinished run and the epochs done, as its report shows them; "" for what it lacks."""
    try:
        with open(report, "rb") as file:
            head = file.read(1000).decode(errors="replace")
    except OSError:
        return "", ""
    state, progress = (re.search(f'data-{name}="([^"]*)"', head) for name in ("state", "progress"))
    return state[1] if state else "", progress[1] if progress else ""


def mark_as_stopped(report: Path) -> None:
    """Mark the report of a killed run as stopped; leave any other report unchanged."""
    try:
        page = report.read_bytes()
    except OSError:  # it could not be written, or was deleted
        return
    if RUNNING not in page:
        return
    page = page.replace(RUNNING, b'data-state="stopped"', 1)
    with suppress(RunError):  # a folder of another user
        write_atomically(report, re.sub(b"<noscript>.*?</noscript>", b"", page, count=1))
