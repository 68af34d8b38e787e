"""Weights & Biases: where the API key comes from, and whether to log online or offline."""

from __future__ import annotations

import codecs
import configparser
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import requests

from data_files import resolve_path
from experiment.errors import ConfigurationError, RunError
from experiment.files import relative_to_cwd
from experiment.formatting import hide_keys
from experiment.terminal import warn
from experiment.wandb_sweep import Sweep, pop_sweep_env

if TYPE_CHECKING:
    from experiment.settings import TrainingConfig

SERVER_TIMEOUT_SECONDS = 5
GIT_TIMEOUT_SECONDS = 5
DEFAULT_SERVER = "https://api.wandb.ai"
KEY_PATTERN = r"[A-Za-z0-9_.-]{40,}"
ADVICE = 'Put yours there (https://wandb.ai/authorize), or set WANDB_MODE = "offline".'


@dataclass(frozen=True)
class WandbAccess:
    """How an experiment is logged: `mode` is "online", "offline" or "disabled"; only "online" has a key."""

    mode: str
    key: str | None = field(default=None, repr=False)
    sweep: Sweep | None = None


def resolve_wandb_access(config: TrainingConfig) -> WandbAccess:
    """Return the mode, the API key and the sweep of an experiment; remove the sweep from the environment.

    W&B's environment variables WANDB_DISABLED and WANDB_MODE override the setting, in this order. "auto" is online with
    a key and offline without. A server that does not respond as expected is reported in one line, and the run is logged
    offline. A trial of a sweep needs the server.

    Raises
    ------
    ConfigurationError
        If the mode is online and there is no key, the key has the wrong form, or the server refuses it. The message
        names where the key was found, never the key. Also if W&B does not accept the server's address and, in a sweep,
        if the mode is not online.
    RunError
        In a sweep, if the server does not respond as expected.
    """
    sweep = pop_sweep_env()
    key_path = resolve_path(config.wandb_api_key_path)
    _warn_if_git_would_commit(key_path)
    mode = _mode_in_environment() or config.wandb_mode
    if mode != "disabled":
        _check_server_address(server_url())
    if mode in ("offline", "disabled"):
        if sweep:
            raise ConfigurationError(f'a sweep needs W&B\'s server, but WANDB_MODE is "{mode}". Set it to "auto".')
        return WandbAccess(mode)

    base_url = server_url()
    key, source = find_api_key(key_path, base_url)
    if key is None:
        if mode == "auto" and not sweep:
            return WandbAccess("offline")
        reason = "a sweep needs W&B's server" if sweep else 'WANDB_MODE is "online"'
        places = f"the environment variable WANDB_API_KEY, in {key_path} or in .netrc"
        raise ConfigurationError(f"{reason}, but no API key is in {places}. {ADVICE}")
    if not re.fullmatch(KEY_PATTERN, key):
        expected = "a word of 40 or more letters and digits, on a line of its own"
        raise ConfigurationError(f"{source} does not contain an API key: {expected}. {ADVICE}")

    problem = check_server(base_url, key)
    if problem is None:
        return WandbAccess("online", key, sweep)
    if problem == "refused":
        raise ConfigurationError(f"W&B at {base_url} refuses the API key from {source}. {ADVICE}")
    if sweep:
        raise RunError(f"a sweep needs W&B's server, but {base_url} does not respond as expected ({problem}).")
    warn(f"W&B: {base_url} does not respond as expected ({problem}), so this run is logged offline.")
    return WandbAccess("offline")


def _warn_if_git_would_commit(key_path: Path) -> None:
    """Print how to keep git from committing the key, if the key file is tracked and contains one."""
    try:
        if _key_in_file(key_path) is None:
            return
        listing = subprocess.run(
            ["git", "ls-files", "-v", "--", key_path.name],
            cwd=key_path.parent,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
        ).stdout
    except (OSError, ConfigurationError, subprocess.SubprocessError):  # no git, or no readable file
        return
    if listing.startswith("H "):  # tracked; "S" is skip-worktree, "h" assume-unchanged
        command = f"git update-index --skip-worktree {relative_to_cwd(key_path)}"
        warn(f"W&B: git would commit the API key in {relative_to_cwd(key_path)}. Prevent that with\n  {command}")


def _mode_in_environment() -> str | None:
    """Return the mode that W&B's own environment variables set, if any."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        return None
    if mode == "dryrun":  # W&B's former name
        return "offline"
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ConfigurationError(
            f"the environment variable WANDB_MODE must be online, offline or disabled, got {hide_keys(mode)!r}"
        )
    return mode


def server_url() -> str:
    """Return the server's address: W&B's own, unless WANDB_BASE_URL or one of W&B's settings files names another.

    The files are read here because W&B itself would take a second, start a process and need a home directory.
    """
    url = os.environ.get("WANDB_BASE_URL") or _url_in_settings_files() or DEFAULT_SERVER
    return url.rstrip("/")


def _check_server_address(url: str) -> None:
    """Raise a ConfigurationError for an address that W&B itself would refuse, also when it logs offline."""
    host, is_url = _read_host(url), re.fullmatch(r"(?i:https?)://[^\s/?#'\"]+(/\S*)?", url) is not None
    is_part_of_cloud = host == "wandb.ai" or host.endswith(".wandb.ai")
    is_api_of_cloud = is_part_of_cloud and "api." in host and url.startswith("https")
    if host and is_url and (is_api_of_cloud or not is_part_of_cloud):
        return
    source = (
        "the environment variable WANDB_BASE_URL" if os.environ.get("WANDB_BASE_URL") else "base_url in W&B's settings"
    )
    raise ConfigurationError(
        f"{source} must be the address of a W&B server, such as {DEFAULT_SERVER} or https://wandb.example.com, without "
        f"quotation marks, got {hide_keys(url)!r}"
    )


def _read_host(url: str) -> str:
    """Return the name of the server in an address; an empty string if there is none, or if its port is no port."""
    try:
        parts = urlsplit(url)
        return "" if parts.port == 0 else parts.hostname or ""
    except ValueError:
        return ""


def _url_in_settings_files() -> str | None:
    """Return the `base_url` in the files that ``wandb init`` (working directory) and ``wandb login --host`` write."""
    config_dir = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    paths = [os.path.join("wandb", "settings"), os.path.join(os.path.expanduser(config_dir), "settings")]
    for path in paths:
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):  # W&B ignores unreadable files, too
            continue
        url = settings.get("default", "base_url", fallback=None)
        if url:
            return url
    return None


def find_api_key(key_path: Path, base_url: str) -> tuple[str | None, str]:
    """Return the API key and where it was found: environment, key file, or the .netrc that ``wandb login`` writes.

    In the key file, blank lines and lines that start with ``#`` are ignored. Quotes around the key, ``WANDB_API_KEY=``
    before it and PowerShell's UTF-16 are accepted.

    Raises
    ------
    ConfigurationError
        If the key file cannot be read.
    """
    key: str | None = _strip_assignment(os.environ.get("WANDB_API_KEY", ""))
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
    lines = content.decode("utf-16" if is_utf_16 else "utf-8-sig", errors="replace").splitlines()
    for line in lines:
        key = _strip_assignment(line)
        if key and not line.strip().startswith("#"):
            return key
    return None


def _key_in_netrc(base_url: str) -> str | None:
    """Return the server's password in the file that ``wandb login`` writes; None if the file is damaged."""
    try:
        entry = requests.utils.get_netrc_auth(base_url)
    except (KeyError, RuntimeError, ValueError):  # no home directory; not UTF-8; not an address
        return None
    return entry[1] if entry else None


def _strip_assignment(line: str) -> str:
    """Return the key in a line that may also be an assignment, such as ``export WANDB_API_KEY="…"``."""
    return re.sub(r"^(export |set |\$env:)?\s*WANDB_API_KEY\s*=", "", line.strip()).strip(" \t\"';")


def check_server(base_url: str, key: str) -> str | None:
    """Return None if the server accepts the key, "refused" if it refuses it, else what is wrong with the server."""
    try:
        response = requests.post(
            f"{base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key),
            timeout=SERVER_TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        return type(error).__name__
    if response.status_code in (401, 403):
        return "refused"
    if response.status_code != 200:
        return f"HTTP status {response.status_code}"
    try:
        viewer = response.json()["data"]["viewer"]
    except (ValueError, KeyError, TypeError):  # for example the login page of a proxy
        return "it is not a W&B server"
    return "refused" if viewer is None else None
