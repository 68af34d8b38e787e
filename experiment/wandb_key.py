"""Weights & Biases: where the API key comes from, and whether to log online or offline."""

import codecs
import contextlib
import netrc
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import requests
import wandb

from experiment.console import warn
from experiment.errors import ConfigurationError, RunError

SERVER_TIMEOUT_SECONDS = 5


def choose_mode(mode: str, key_path: Path, in_sweep: bool = False) -> tuple[str, str | None]:
    """Return the W&B mode ("online", "offline" or "disabled") and, where it is online, the API key.

    W&B's own environment variables WANDB_DISABLED and WANDB_MODE win over `mode`, in this order; "auto" is online with
    a key and offline without. A trial of a sweep is online or not at all.

    Raises
    ------
    ConfigurationError
        If the mode is online and there is no key, what is there is none, or the server refuses it; the message says
        where it was found, never what it is. In a sweep, also if the mode is not online.
    RunError
        In a sweep, if the server does not answer as it should.
    """
    mode = (os.environ.get("WANDB_MODE") or mode).replace("dryrun", "offline")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        mode = "disabled"
    if in_sweep and mode in ("offline", "disabled"):
        raise ConfigurationError(f'a sweep needs W&B\'s server, but WANDB_MODE is "{mode}". Set it to "auto".')
    if mode in ("offline", "disabled"):
        return mode, None
    if mode not in ("auto", "online"):
        raise ConfigurationError(
            f"the environment variable WANDB_MODE must be online, offline or disabled, got {mode!r}"
        )
    base_url = server_url()
    key, source = find_api_key(key_path, base_url)
    way_out = 'Put yours there (https://wandb.ai/authorize), or set WANDB_MODE = "offline".'
    if key is None and mode == "auto" and not in_sweep:
        return "offline", None
    if key is None:
        places = f"the environment variable WANDB_API_KEY, in {key_path} or in .netrc"
        wish = "a sweep needs W&B's server" if in_sweep else 'WANDB_MODE is "online"'
        raise ConfigurationError(f"{wish}, but no API key is in {places}. {way_out}")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{40,}", key):
        wanted = "a word of 40 or more letters and digits, on a line of its own"
        raise ConfigurationError(f"{source} does not hold an API key: {wanted}. {way_out}")
    problem = ask_server(base_url, key)
    if problem == "refused":
        raise ConfigurationError(f"W&B at {base_url} refuses the API key from {source}. {way_out}")
    if problem and in_sweep:
        raise RunError(f"a sweep needs W&B's server, but {base_url} does not answer as it should ({problem}).")
    if problem:
        warn(f"W&B: {base_url} does not answer as it should ({problem}), so this run is logged offline.")
        return "offline", None
    return "online", key


def server_url() -> str:
    """Return the server's address: W&B's own, unless WANDB_BASE_URL or W&B's settings file name another."""
    return (os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")


def find_api_key(key_path: Path, base_url: str) -> tuple[str | None, str]:
    """Return the API key and where it was found: environment, key file, or what ``wandb login`` left.

    Blank lines and lines that start with ``#`` in the key file do not count. Quotes around the key, ``WANDB_API_KEY=``
    before it and the UTF-16 that PowerShell writes are no part of it.

    Raises
    ------
    ConfigurationError
        If there is a key file that cannot be read.
    """
    if key := _bare(os.environ.get("WANDB_API_KEY", "")):
        return key, "the environment variable WANDB_API_KEY"
    if key_path.exists():
        try:
            content = key_path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"WANDB_API_KEY_PATH: {key_path} cannot be read ({error.strerror})") from None
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = content.decode("utf-16" if wide else "utf-8-sig", errors="replace").splitlines()
        if keys := [_bare(line) for line in lines if _bare(line) and not line.strip().startswith("#")]:
            return keys[0], str(key_path)
    for name in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        path = Path(name).expanduser()
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            entry = netrc.netrc(path).authenticators(urlsplit(base_url).hostname or "")
            if entry and entry[2]:
                return entry[2], str(path)
    return None, ""


def _bare(line: str) -> str:
    """Return the key of a line that may be an assignment of it."""
    return re.sub(r"^(export |set |\$env:)?\s*WANDB_API_KEY\s*=", "", line.strip()).strip(" \t\"';")


def ask_server(base_url: str, key: str) -> str | None:
    """Return None if the server knows the key, "refused" if it refuses it, else what is wrong with the server."""
    try:
        answer = requests.post(
            f"{base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key),
            timeout=SERVER_TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        return type(error).__name__
    if answer.status_code in (401, 403):
        return "refused"
    return None if answer.status_code == 200 else f"HTTP status {answer.status_code}"
