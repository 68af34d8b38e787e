"""The API key: where it is found, in which forms, what is no key, and whether W&B is online."""

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
from typing import Any

import pytest
from conftest import KEY, REPOSITORY, Configure, finish, start_python
from wandb_server import WandbServer

import main_tutorial
from experiment import wandb_key
from experiment.errors import ConfigurationError, RunError
from experiment.wandb_key import choose_mode, find_api_key, server_url

LONG_KEY = "wandb_v1_" + "aB3" * 25 + "_9"  # of 86 characters, as they are today


def test_a_refused_key_is_a_configuration_error_that_names_its_source(
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, WANDB_MODE="online").main()
    output = "".join(capfd.readouterr())
    assert stop.value.code == 2
    assert "environment variable WANDB_API_KEY" in output and "f" * 40 not in output
    assert "train loss" not in output and not (tmp_path / "runs").exists()


def test_a_server_that_answers_200_and_knows_no_viewer_refuses_the_key(
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.knows_no_viewer = True
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, WANDB_MODE="online").main()
    assert stop.value.code == 2 and "refuses the API key" in "".join(capfd.readouterr())
    assert not (tmp_path / "runs").exists()


@contextmanager
def server_that(answer: Callable[[http.server.BaseHTTPRequestHandler], bytes]) -> Iterator[str]:
    """Start a server that answers with status 200; yield its address."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = answer(self)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_none_of_wandbs_is_replaced_by_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server_that(lambda request: b"<html>Log in to the hotel's network</html>") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert "as it should (it does not speak as W&B does), so" in capfd.readouterr().err


def test_the_key_is_sent_where_wandb_sends_it_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def remember(request: http.server.BaseHTTPRequestHandler) -> bytes:
        seen.append((request.path, request.headers["Authorization"]))
        del request.headers["Authorization"]
        seen.append(str(request.headers))
        seen.append(json.loads(request.rfile.read(int(request.headers["Content-Length"]))))
        return b'{"data": {"viewer": {"id": "me"}}}'

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server_that(remember) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert choose_mode("auto", tmp_path / "none") == ("online", KEY)
    basic = base64.b64encode(f"api:{KEY}".encode()).decode()  # the user of W&B's own client
    where, other_headers, content = seen
    assert where == ("/graphql", f"Basic {basic}") and KEY not in other_headers
    assert content == {"query": "query Viewer { viewer { id } }"}


def test_a_server_that_answers_500_is_replaced_by_offline(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.fail()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert "HTTP status 500" in capfd.readouterr().err


def test_a_server_that_hangs_is_given_up_and_replaced_by_offline(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.hang()
    monkeypatch.setattr(wandb_key, "SERVER_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    started = time.monotonic()
    assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert time.monotonic() - started < 30 and "(ReadTimeout)" in capfd.readouterr().err


def test_a_server_that_is_not_there_is_replaced_by_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert capfd.readouterr().err == (
        "W&B: http://127.0.0.1:9 does not answer as it should (ConnectionError), so this run is logged offline.\n"
    )


def test_the_environment_variable_wandb_mode_wins_over_the_constant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("disabled", tmp_path / "none")[0] == "offline"


def test_wandbs_old_word_for_offline_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert choose_mode("online", tmp_path / "none") == ("offline", None)


def test_a_mode_that_does_not_exist_is_named_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "shared")
    said = "the environment variable WANDB_MODE must be online, offline or disabled, got 'shared'"
    with pytest.raises(ConfigurationError, match=f"^{said}$"):
        choose_mode("auto", tmp_path / "none")


WAY_OUT = 'Put yours there (https://wandb.ai/authorize), or set WANDB_MODE = "offline".'


@pytest.mark.parametrize(
    ("mode", "in_sweep", "wish"),
    [
        ("online", False, 'WANDB_MODE is "online"'),
        ("online", True, "a sweep needs W&B's server"),
        ("auto", True, "a sweep needs W&B's server"),
    ],
)
def test_online_without_a_key_is_a_configuration_error_that_says_where_one_may_be(
    mode: str, in_sweep: bool, wish: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as error:
        choose_mode(mode, tmp_path / "none", in_sweep)
    places = f"the environment variable WANDB_API_KEY, in {tmp_path / 'none'} or in .netrc"
    assert str(error.value) == f"{wish}, but no API key is in {places}. {WAY_OUT}"


def test_what_is_no_key_is_told_with_what_a_key_looks_like(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a b")
    with pytest.raises(ConfigurationError) as error:
        choose_mode("auto", tmp_path / "key")
    wanted = "a word of 40 or more letters and digits, on a line of its own"
    assert str(error.value) == f"{tmp_path / 'key'} does not hold an API key: {wanted}. {WAY_OUT}"


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_sweep_is_refused_without_its_server(mode: str, tmp_path: Path) -> None:
    said = f'a sweep needs W&B\'s server, but WANDB_MODE is "{mode}". Set it to "auto".'
    with pytest.raises(ConfigurationError, match=f"^{re.escape(said)}$"):
        choose_mode(mode, tmp_path / "none", in_sweep=True)


def test_a_sweep_whose_server_is_down_is_a_failed_run(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.fail()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said = f"a sweep needs W&B's server, but {server.url} does not answer as it should (HTTP status 500)."
    with pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        choose_mode("auto", tmp_path / "none", in_sweep=True)


def test_a_key_that_wandb_login_left_is_used_for_the_server_it_is_for(server: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert choose_mode("auto", tmp_path / "none") == ("online", KEY)


def test_the_environment_comes_before_the_file_and_the_file_before_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home" / ".netrc").write_text("machine example.org login user password third\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    netrc = str(tmp_path / "home" / ".netrc")
    assert find_api_key(tmp_path / "key", "https://example.org") == ("third", netrc)
    (tmp_path / "key").write_text("#first\n  \nsecond\n")
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == "second"
    monkeypatch.setenv("WANDB_API_KEY", "first")
    source = "the environment variable WANDB_API_KEY"
    assert find_api_key(tmp_path / "key", "https://example.org") == ("first", source)


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_a_netrc_in_the_home_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NETRC")
    (tmp_path / "home" / name).write_text(f"machine example.org login user password {KEY}\n")
    assert find_api_key(tmp_path / "none", "https://example.org") == (KEY, "~/.netrc")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00key", b"machine example.org password", "machine ü".encode("latin-1")]
)
def test_a_netrc_that_cannot_be_read_is_as_if_it_were_not_there(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_bytes(content)
    assert find_api_key(tmp_path / "none", "https://example.org") == (None, "")
    assert choose_mode("auto", tmp_path / "none") == ("offline", None)


@pytest.mark.parametrize("place", ["home/.config/wandb", "wandb"])
def test_the_server_that_wandbs_settings_file_names_is_asked(
    place: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "settings").write_text(f"[default]\nbase_url = {server.url}/\n")
    assert server_url() == server.url
    assert choose_mode("auto", tmp_path / "none") == ("online", KEY)
    wandbs_own = subprocess.run(
        [sys.executable, "-c", "import wandb; print(wandb.setup().settings.base_url)"], capture_output=True, text=True
    )
    assert wandbs_own.stdout.strip().rstrip("/") == server.url


def test_wandbs_settings_are_found_where_its_environment_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / "settings").write_text("[default]\nbase_url = http://example.org\n")
    assert server_url() == "http://example.org"


def test_behind_a_damaged_settings_file_the_next_one_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    for place, content in (("wandb", b"no settings"), ("home/.config/wandb", b"[default]\nbase_url = http://a.org\n")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "settings").write_bytes(content)
    assert server_url() == "http://a.org"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"base_url = http://example.org", b"[default]\nmode = offline\n"])
def test_a_settings_file_that_names_no_server_is_passed_over(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_bytes(content)
    assert server_url() == "https://api.wandb.ai"


def test_the_key_and_the_mode_are_found_without_importing_wandb(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from experiment.wandb_key import choose_mode
from experiment.wandb_sweep import sweep_parameters, take_sweep
import experiment.wandb_runs
print(choose_mode("auto", Path("none")), sweep_parameters(), take_sweep(), "wandb" in sys.modules)
"""
    output, _ = finish(start_python(tmp_path, "-c", code))
    assert output == "('offline', None) {} None False\n"


def test_the_committed_key_file_holds_only_comments() -> None:
    show = ["git", "show", "HEAD:wandb_api_key.txt"]
    text = subprocess.run(show, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "skip-worktree" in text
    assert all(line.startswith("#") for line in text.splitlines() if line.strip())
    assert not re.search(r"[0-9a-zA-Z_]{32,}", text)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_read_in_every_form_that_it_is_kept_in(form: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(FORMS[form].encode(encoding))
    assert find_api_key(tmp_path / "key", "https://example.org") == (KEY, str(tmp_path / "key"))


def test_big_endian_utf_16_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xfe\xff" + KEY.encode("utf-16-be"))
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == KEY


def test_a_comment_in_another_encoding_does_not_hide_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes("# für mich\n".encode("latin-1") + KEY.encode())
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == KEY


def test_quotes_in_the_environment_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f'"{KEY}"')
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == KEY


@pytest.mark.parametrize("key", [KEY, LONG_KEY, f"local-{KEY}"])
def test_old_long_and_local_keys_are_online(key: str, server: WandbServer, tmp_path: Path) -> None:
    server.key = key
    (tmp_path / "key").write_text(f"{key}\n")
    assert choose_mode("auto", tmp_path / "key") == ("online", key)


JUNK = {
    "two words": f"{KEY} secret",
    "HTML": f"<html><body>{KEY}</body></html>",
    "a sentence": "Please put your secret W&B key into this very file, on a line of its own.",
    "letters that are not ASCII": "\u0455ecret" * 8,
    "binary": "\x00\x01secret" * 8,
    "a short word": "secret",
}


@pytest.mark.parametrize("mode", ["auto", "online"])
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_key_is_neither_sent_nor_shown(
    junk: str, mode: str, configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.txt").write_text(JUNK[junk], encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, WANDB_MODE=mode, WANDB_API_KEY_PATH=tmp_path / "key.txt").main()
    printed = "".join(capfd.readouterr())
    assert stop.value.code == 2 and "key.txt does not hold an API key" in printed
    assert "ecret" not in printed and KEY not in printed
    assert server.posts == 0 and not (tmp_path / "runs").exists()


def test_a_key_path_that_is_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="WANDB_API_KEY_PATH.*cannot be read .Is a directory"):
        choose_mode("auto", tmp_path)


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to("/proc/self/mem")  # which not even root can read from its start
    with pytest.raises(ConfigurationError, match="WANDB_API_KEY_PATH.*cannot be read"):
        choose_mode("auto", tmp_path / "key")


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on", "ON"])
def test_wandb_disabled_disables(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("online", tmp_path / "none") == ("disabled", None)
