"""Weights & Biases: where the API key comes from, and whether to log online or offline."""

import codecs
import configparser
import os
import re
from pathlib import Path

import requests

from experiment.console import warn
from experiment.errors import ConfigurationError, RunError

SERVER_TIMEOUT_SECONDS = 5
WANDBS_OWN_SERVER = "https://api.wandb.ai"


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
    """Return the server's address: W&B's own, unless WANDB_BASE_URL or one of W&B's settings files names another.

    The files are read here, since W&B itself would take a second, start a process and need a home for that.
    """
    url = os.environ.get("WANDB_BASE_URL") or _url_in_settings_files() or WANDBS_OWN_SERVER
    return url.rstrip("/")


def _url_in_settings_files() -> str | None:
    """Return the `base_url` that ``wandb login --host`` or ``wandb init`` left, where they leave it."""
    config_dir = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    paths = [
        os.path.join("wandb", "settings"),  # in the working directory, which wins
        os.path.join(
            os.path.expanduser(config_dir), "settings"
        ),  # without a home the ~ stays, and there is no such file
    ]
    for path in paths:
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):  # W&B, too, passes over what it cannot read
            continue
        url = settings.get("default", "base_url", fallback=None)
        if url:
            return url
    return None


def find_api_key(key_path: Path, base_url: str) -> tuple[str | None, str]:
    """Return the API key and where it was found: environment, key file, or what ``wandb login`` left.

    Blank lines and lines that start with ``#`` in the key file do not count. Quotes around the key, ``WANDB_API_KEY=``
    before it and the UTF-16 that PowerShell writes are no part of it.

    Raises
    ------
    ConfigurationError
        If there is a key file that cannot be read.
    """
    key: str | None = _bare(os.environ.get("WANDB_API_KEY", ""))
    if key:
        return key, "the environment variable WANDB_API_KEY"
    key = _key_in_file(key_path)
    if key:
        return key, str(key_path)
    key = _key_in_netrc(base_url)
    if key:
        return key, os.environ.get("NETRC") or "~/.netrc"
    return None, ""


def _key_in_file(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"WANDB_API_KEY_PATH: {path} cannot be read ({error.strerror})") from None
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors="replace")
    for line in text.splitlines():
        key = _bare(line)
        if key and not line.strip().startswith("#"):
            return key
    return None


def _key_in_netrc(base_url: str) -> str | None:
    """Return the password for the server in the file that ``wandb login`` writes; where it is damaged, None."""
    try:
        entry = requests.utils.get_netrc_auth(base_url)
    except (KeyError, RuntimeError, ValueError):  # no home; not UTF-8, or an address that is none
        return None
    return entry[1] if entry else None


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
    if answer.status_code != 200:
        return f"HTTP status {answer.status_code}"
    try:
        viewer = answer.json()["data"]["viewer"]
    except (ValueError, KeyError, TypeError):  # a proxy's login page, for one
        return "it does not speak as W&B does"
    return "refused" if viewer is None else None  # as W&B itself takes it
