"""The API key: where it is found, in which forms, what is rejected; and whether the run is logged online."""

import base64
import http.server
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from conftest import KEY, REPOSITORY, Configure, finish, start_python
from wandb_server import WandbServer

import main_tutorial
from experiment import wandb_key
from experiment.errors import ConfigurationError
from experiment.settings import TrainingConfig
from experiment.wandb_key import WandbAccess, find_api_key, resolve_wandb_access, server_url

LONG_KEY = "wandb_v1_" + "aB3" * 25 + "_9"  # 86 characters, the form of new keys
ADVICE = 'Put yours there (https://wandb.ai/authorize), or set WANDB_MODE = "offline".'


def resolve(mode: str, key_path: Path = Path("/proc/none")) -> WandbAccess:
    """Return the access for a mode and a key file, without the rest of a configuration."""
    config: Any = SimpleNamespace(wandb_mode=mode, wandb_api_key_path=key_path)
    return resolve_wandb_access(config)


@contextmanager
def start_server(respond: Callable[[http.server.BaseHTTPRequestHandler], bytes]) -> Iterator[str]:
    """Start a server that responds with status 200; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = respond(self)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("has_no_viewer", [False, True])
def test_refused_key_is_a_configuration_error_that_names_its_source(
    has_no_viewer: bool,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.has_no_viewer = has_no_viewer
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, WANDB_MODE="online").main()
    output = "".join(capfd.readouterr())
    assert stop.value.code == 2
    assert "refuses the API key from the environment variable WANDB_API_KEY" in output and "f" * 40 not in output
    assert "train loss" not in output and not (tmp_path / "runs").exists()


def test_key_is_sent_in_the_authorization_header_only(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    def respond(request: http.server.BaseHTTPRequestHandler) -> bytes:
        authorization = request.headers["Authorization"]
        del request.headers["Authorization"]
        content = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        requests.append((request.path, authorization, str(request.headers), content))
        return b'{"data": {"viewer": {"id": "me"}}}'

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with start_server(respond) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert resolve("auto") == WandbAccess("online", KEY)
    ((path, authorization, other_headers, content),) = requests
    assert path == "/graphql" and KEY not in other_headers
    assert authorization == "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()  # as W&B's own client
    assert content == {"query": "query Viewer { viewer { id } }"}


def test_key_is_not_shown_when_the_access_is_printed() -> None:
    assert KEY not in repr(WandbAccess("online", KEY))


def test_server_of_another_kind_means_offline(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with start_server(lambda request: b"<html>Log in to the hotel's network</html>") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert resolve("auto").mode == "offline"
    assert "as expected (it is not a W&B server), so" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("break_server", "reason"),
    [(WandbServer.fail, "HTTP status 500"), (WandbServer.hang, "ReadTimeout"), (WandbServer.stop, "ConnectionError")],
)
def test_broken_server_means_offline_and_one_line(
    break_server: Callable[[WandbServer], None],
    reason: str,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    break_server(server)
    monkeypatch.setattr(wandb_key, "SERVER_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    started = time.monotonic()
    assert resolve("auto") == WandbAccess("offline")
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == (
        f"W&B: {server.url} does not respond as expected ({reason}), so this run is logged offline.\n"
    )


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [
        ("WANDB_MODE", "offline", "offline"),
        ("WANDB_MODE", "dryrun", "offline"),
        ("WANDB_MODE", "disabled", "disabled"),
        *(("WANDB_DISABLED", value, "disabled") for value in ("true", "True", "1", "yes", "on", "ON")),
    ],
)
def test_wandbs_environment_variables_override_the_mode(
    variable: str, value: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve("online") == WandbAccess(mode)


def test_unknown_mode_in_the_environment_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "shared")
    message = "the environment variable WANDB_MODE must be online, offline or disabled, got 'shared'"
    with pytest.raises(ConfigurationError, match=f"^{message}$"):
        resolve("auto")


def test_online_without_a_key_is_a_configuration_error_that_lists_the_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve("online", tmp_path / "none")
    places = f"the environment variable WANDB_API_KEY, in {tmp_path / 'none'} or in .netrc"
    assert str(error.value) == f'WANDB_MODE is "online", but no API key is in {places}. {ADVICE}'


def test_netrc_of_wandb_login_is_read(server: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert resolve("auto") == WandbAccess("online", KEY)


def test_environment_comes_before_the_file_and_the_file_before_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine example.org login user password third\n")
    netrc.chmod(0o600)
    key_file = tmp_path / "key"
    assert find_api_key(key_file, "https://example.org") == ("third", str(netrc))
    key_file.write_text("#first\n  \nsecond\n")
    assert find_api_key(key_file, "https://example.org") == ("second", str(key_file))
    monkeypatch.setenv("WANDB_API_KEY", '"first"')
    source = "the environment variable WANDB_API_KEY"
    assert find_api_key(key_file, "https://example.org") == ("first", source)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00key", b"machine example.org password", "machine ü".encode("latin-1")]
)
def test_damaged_netrc_is_ignored(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_bytes(content)
    assert resolve("auto") == WandbAccess("offline")


@pytest.mark.parametrize("folder", ["home/.config/wandb", "wandb"])
def test_server_in_wandbs_settings_file_is_used_as_by_wandb_itself(
    folder: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "settings").write_text(f"[default]\nbase_url = {server.url}/\n")
    assert server_url() == server.url
    assert resolve("auto").mode == "online"
    code = "import wandb; print(wandb.setup().settings.base_url)"
    wandb_itself = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert wandb_itself.stdout.strip().rstrip("/") == server.url


@pytest.mark.parametrize("content", [b"\xff\xfe", b"base_url = http://example.org", b"[default]\nmode = offline\n"])
def test_settings_file_without_a_server_is_ignored(
    content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_bytes(content)
    assert server_url() == "https://api.wandb.ai"
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = http://example.org\n")
    assert server_url() == "http://example.org"


@pytest.mark.parametrize(
    "url",
    [
        "wandb.example.com",
        '"https://wandb.example.com"',
        "https://wandb.ai",
        "https://app.wandb.ai",
        "http://api.wandb.ai",
        "ftp://x",
        "https://wandb.example.com ",
        "http://localhost:99999",
        "http://localhost:port",
    ],
)
@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_address_that_is_no_server_is_one_line_also_offline(
    url: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    with pytest.raises(ConfigurationError) as error:
        resolve(mode)
    assert "the environment variable WANDB_BASE_URL must be the address of a W&B server, such as" in str(error.value)
    assert str(error.value).endswith(f"got {url!r}") and "\n" not in str(error.value)


@pytest.mark.parametrize("variable", ["WANDB_MODE", "WANDB_BASE_URL"])
def test_key_in_another_variable_is_not_printed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, KEY)
    with pytest.raises(ConfigurationError) as error:
        resolve_wandb_access(TrainingConfig.from_constants(vars(main_tutorial)))
    assert variable in str(error.value) and KEY not in str(error.value)


def test_address_of_a_server_is_accepted_as_wandb_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "https://wandb.example.com",
        "http://localhost:8080/",
        "HTTPS://wandb.example.com/path",
        "http://[::1]:8080",
        "https://api.wandb.ai",
        "https://me.api.wandb.ai",
    ):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert resolve("offline") == WandbAccess("offline")
        wandb.Settings(base_url=url)


def test_access_is_resolved_without_importing_wandb(tmp_path: Path) -> None:
    code = """
import sys
import main_tutorial
from experiment.settings import TrainingConfig
from experiment.wandb_key import resolve_wandb_access
import experiment.wandb_logging
access = resolve_wandb_access(TrainingConfig.from_constants(vars(main_tutorial) | {"WANDB_API_KEY_PATH": "none"}))
print(access, "wandb" in sys.modules)
"""
    output, _ = finish(start_python(tmp_path, "-c", code))
    assert output == "WandbAccess(mode='offline', sweep=None) False\n"


def test_committed_key_file_contains_only_comments() -> None:
    show = ["git", "show", "HEAD:wandb_api_key.txt"]
    content = subprocess.run(show, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "skip-worktree" in content
    assert all(line.startswith("#") for line in content.splitlines() if line.strip())
    assert not re.search(r"[0-9a-zA-Z_]{32,}", content)


FORMS = {
    "bare": KEY,
    "spaces": f"  {KEY} \r\n",
    "quotes": f'"{KEY}"',
    "single quotes": f"'{KEY}'\n",
    "assignment": f"WANDB_API_KEY={KEY}\n",
    "spaced assignment": f"WANDB_API_KEY = '{KEY}'",
    "export": f'export WANDB_API_KEY="{KEY}"\n',
    "set": f"set WANDB_API_KEY={KEY}\r\n",
    "PowerShell's assignment": f'$env:WANDB_API_KEY="{KEY}"',
    "comments": f"# mine\n\n{KEY}\n",
    "two lines": f"{KEY}\n{'f' * 40}\n",
}
ENCODED = {f"{form}, {encoding}": FORMS[form].encode(encoding) for form in FORMS for encoding in ("utf-8", "utf-16")}
ENCODED |= {
    "UTF-8 with byte order mark": KEY.encode("utf-8-sig"),
    "big-endian UTF-16": b"\xfe\xff" + KEY.encode("utf-16-be"),
    "comment in another encoding": "# für mich\n".encode("latin-1") + KEY.encode(),
}


@pytest.mark.parametrize("content", ENCODED.values(), ids=ENCODED.keys())
def test_key_is_read_in_every_form(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    assert find_api_key(tmp_path / "key", "https://example.org") == (KEY, str(tmp_path / "key"))


@pytest.mark.parametrize("key", [KEY, LONG_KEY, f"local-{KEY}"])
def test_old_long_and_local_keys_are_online(key: str, server: WandbServer, tmp_path: Path) -> None:
    server.key = key
    (tmp_path / "key").write_text(f"{key}\n")
    assert resolve("auto", tmp_path / "key") == WandbAccess("online", key)


JUNK = {
    "two words": f"{KEY} secret",
    "HTML": f"<html><body>{KEY}</body></html>",
    "a sentence": "Please put your secret W&B key into this very file, on a line of its own.",
    "letters that are not ASCII": "\u0455ecret" * 8,
    "binary": "\x00\x01secret" * 8,
    "a short word": "secret",
}


@pytest.mark.parametrize("mode", ["auto", "online"])
@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_content_that_is_no_key_is_neither_sent_nor_shown(
    junk: str, mode: str, configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "key.txt"
    key_file.write_text(junk, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, WANDB_MODE=mode, WANDB_API_KEY_PATH=key_file).main()
    assert stop.value.code == 2
    expected = "a word of 40 or more letters and digits, on a line of its own"
    message = f"{key_file} does not contain an API key: {expected}. {ADVICE}"
    assert "".join(capfd.readouterr()) == f"Bad configuration:\n  {message}\n"
    assert server.posts == 0 and not (tmp_path / "runs").exists()


def test_unreadable_key_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to("/proc/self/mem")  # not even root can read its first bytes
    with pytest.raises(ConfigurationError, match="WANDB_API_KEY_PATH.*cannot be read"):
        resolve("auto", tmp_path / "key")
    with pytest.raises(ConfigurationError, match="WANDB_API_KEY_PATH.*cannot be read .Is a directory"):
        resolve("auto", tmp_path)
