"""Weights & Biases, with real clients: what arrives at a server equals what the run returned; keys stay secret."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import REPOSITORY
from wandb.errors import AuthenticationError
from wandb_server import WandbServer

import main_tutorial
from report_utils import ExperimentResult
from wandb_utils import choose_mode, find_api_key

KEY = "5ecre7" * 6 + "0123"
Configure = Callable[..., ModuleType]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with WandbServer(KEY) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def assert_arrived(server: WandbServer, result: ExperimentResult) -> None:
    """Compare all that the server holds with all that the run returned."""
    assert {run["name"] for run in server.runs.values()} == {"fold-1", "fold-2", "final"}
    assert len(server.runs) == 3
    for fit in [*result.folds, result.final]:
        run = next(run for run in server.runs.values() if run["name"] == fit.name)
        assert run["group"] == result.run_dir.name
        assert run["job_type"] == ("final" if fit.name == "final" else "fold")
        history = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run["history"]]
        history[-1] = {name: value for name, value in history[-1].items() if name in fit.history[-1]}
        assert history == fit.history
        assert [row["_step"] for row in run["history"]] == [1, 2]
        for row_name in [*map(str, range(10)), "macro avg", "weighted avg"]:
            for figure in ("precision", "recall", "f1-score"):
                assert run["summary"][f"{row_name}/{figure}"] == fit.report[row_name][figure]
        assert (run["summary"]["loss"], run["summary"]["accuracy"]) == (fit.loss, fit.accuracy)
        tables = sorted(path.rsplit("/", 1)[1].partition("_2_")[0] for path in run["files"] if "media/table" in path)
        assert tables == ["confusion_matrix", "per_class"]
        assert run["config"]["epochs"] == 2 and "linear_relu_stack" in run["config"]["model"]
        assert run["exit_code"] == 0
    final = next(run for run in server.runs.values() if run["name"] == "final")
    for name, value in result.cross_validation.items():
        assert final["summary"][f"cross_validation/{name}"] == value


def files_with_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_without_a_key_the_printed_command_uploads_everything(
    configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = configure(main_tutorial, WANDB_MODE="auto", WANDB_API_KEY_PATH=tmp_path / "none").main()
    output = capfd.readouterr().out
    assert len(re.findall(r"^W&B: offline", output, re.MULTILINE)) == 1
    command = re.search(r"^  (\S*wandb sync .*)$", output, re.MULTILINE)
    assert command is not None and not server.runs
    program, *arguments = shlex.split(command[1])
    wandb = str(Path(sys.executable).with_name("wandb"))
    subprocess.run([wandb, *arguments], env=os.environ | {"WANDB_API_KEY": KEY}, check=True, timeout=60)
    assert_arrived(server, result)


def test_with_a_key_in_the_file_everything_is_uploaded_at_once(
    configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "key.txt"
    key_file.write_text(f"# comment\n\n{KEY}\n")
    result = configure(main_tutorial, WANDB_MODE="auto", WANDB_API_KEY_PATH=key_file).main()
    assert_arrived(server, result)
    assert files_with_key(tmp_path) == [key_file]
    assert KEY not in "".join(capfd.readouterr())
    assert not any((tmp_path / "home").iterdir())


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
    assert "epoch" not in output and not (tmp_path / "runs").exists()


def test_a_server_that_answers_500_is_replaced_by_offline(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.status = 500
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert "HTTP status 500" in capfd.readouterr().err


def test_a_server_that_is_not_there_is_replaced_by_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto", tmp_path / "none")[0] == "offline"
    assert "does not answer" in capfd.readouterr().err


def test_the_environment_variable_wandb_mode_wins_over_the_constant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("disabled", tmp_path / "none")[0] == "offline"


def test_online_without_a_key_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match="no API key"):
        choose_mode("online", tmp_path / "none")


def test_the_environment_comes_before_the_file_and_the_file_before_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home" / ".netrc").write_text("machine example.org login user password third\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == "third"
    (tmp_path / "key").write_text("#first\n  \nsecond\n")
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == "second"
    monkeypatch.setenv("WANDB_API_KEY", "first")
    assert find_api_key(tmp_path / "key", "https://example.org")[0] == "first"


def test_the_committed_key_file_holds_only_comments() -> None:
    show = ["git", "show", "HEAD:wandb_api_key.txt"]
    text = subprocess.run(show, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "skip-worktree" in text
    assert all(line.startswith("#") for line in text.splitlines() if line.strip())
    assert not re.search(r"[0-9a-zA-Z_]{32,}", text)
