"""Weights & Biases, with real clients: a server receives what the run returned, and the key stays secret."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FIGURES,
    KEY,
    Configure,
    Start,
    all_fits,
    finish,
    nearly_full_disk,
    saved_epochs,
    slow,
    start_python,
)
from wandb_server import WandbServer

import main_tutorial
from experiment import wandb_logging
from experiment.results import ExperimentResult, FitResult
from experiment.wandb_logging import WandbRuns


def assert_received(server: WandbServer, result: ExperimentResult) -> None:
    """Compare everything that the server received with everything that the run returned."""
    runs = {run["name"]: run for run in server.runs.values()}
    assert len(server.runs) == 3 and set(runs) == {"fold-1", "fold-2", "final"}
    for fit in all_fits(result):
        assert_fit_received(runs[fit.name], fit, result)
    final = runs["final"]
    for name, value in result.cross_validation.items():
        assert final["summary"][f"cross_validation/{name}"] == value
    for name in FIGURES:
        (sent,) = [path for path in final["files"] if re.match(rf"media/images/figures/{Path(name).stem}_\d+_", path)]
        assert final["files"][sent] == (result.run_dir / name).read_bytes()
    images = [content for content in server.artifact_files if content.startswith(b"\x89PNG")]
    assert len(images) == len(result.mistakes) + len(result.doubtful_labels)
    (model,) = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    assert json.loads(model["metadata"])["test/accuracy"] == all_fits(result)[-1].accuracy
    assert (result.run_dir / "model.pt").read_bytes() in server.artifact_files


def assert_fit_received(run: dict[str, Any], fit: FitResult, result: ExperimentResult) -> None:
    assert run["group"] == result.run_dir.name
    assert run["job_type"] == ("final" if fit.name == "final" else "fold")
    assert run["config"]["epochs"] == result.config["epochs"] and "linear_relu_stack" in run["config"]["model"]
    assert run["exit_code"] == 0
    metrics = result.folds[0].history[-1]
    history = [{name: value for name, value in row.items() if name in metrics} for row in run["history"]]
    assert history == fit.history
    assert [row["_step"] for row in run["history"]] == [row["epoch"] for row in fit.history]
    assert (run["summary"]["loss"], run["summary"]["accuracy"]) == (fit.loss, fit.accuracy)
    for row_name in [*map(str, range(10)), "macro avg", "weighted avg"]:
        for metric in ("precision", "recall", "f1-score"):
            assert run["summary"][f"{row_name}/{metric}"] == fit.report[row_name][metric]
    tables = [re.sub(r"_\d+_.*", "", Path(path).name) for path in run["files"] if path.startswith("media/table")]
    of_final = ["labels_to_check", "mistakes"] if fit.name == "final" else []
    assert sorted(tables) == sorted(["confusion_matrix", "per_class", *of_final])


def sync(printed: str, folder: Path | None = None) -> None:
    """Run the ``wandb sync`` command that a run printed in a shell, in the run's working directory."""
    (command,) = re.findall(r"^  (\S*wandb sync .*)$", printed, re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | {"WANDB_API_KEY": KEY}, check=True, timeout=60)


def store_key(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store the key in a place where it is looked for; return the path of the key file, which may not exist."""
    netrc, key_file = tmp_path / "home" / ".netrc", tmp_path / "key.txt"
    if place == "file":
        key_file.write_text(f"# comment\n\n{KEY}\n")
    elif place == "netrc":
        netrc.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
        netrc.chmod(0o600)
    else:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    return key_file


def files_with_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def files_in_home(tmp_path: Path) -> list[Path]:
    home = tmp_path / "home"
    return [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in path.parts]


def lines_about_wandb(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "W&B" in line]


@pytest.mark.slow
def test_printed_command_uploads_everything_of_an_offline_run(
    configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = configure(main_tutorial, WANDB_MODE="auto", WANDB_API_KEY_PATH=tmp_path / "none").main()
    output = capfd.readouterr().out
    assert len(re.findall(r"^W&B: offline", output, re.MULTILINE)) == 1
    assert not server.runs
    sync(output)
    assert_received(server, result)


def test_online_run_uploads_everything_at_once(
    configure: Configure, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key_file = store_key("file", tmp_path, monkeypatch)
    result = configure(main_tutorial, WANDB_MODE="auto", WANDB_API_KEY_PATH=key_file).main()
    assert_received(server, result)


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "fails_after"), [(WandbServer.fail, 1), (WandbServer.hang, 4)])
def test_server_that_fails_while_the_runs_are_opened_is_replaced_by_offline_within_30_seconds(
    failure: Callable[[WandbServer], None],
    fails_after: int,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.failure, server.fails_after = failure, fails_after
    warnings = []
    monkeypatch.setattr(wandb_logging, "warn", lambda message: warnings.append((message, time.monotonic())))
    started = time.monotonic()
    result = configure(main_tutorial, WANDB_MODE="online").main()
    ((message, warned),) = warnings
    assert "so this run is logged offline" in message and warned - started < 30
    server.repair()
    sync(capfd.readouterr().out)
    assert_received(server, result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "place"), [(WandbServer.stop, "file"), (WandbServer.hang, "environment"), (WandbServer.fail, "netrc")]
)
def test_server_that_fails_during_training_costs_one_line_and_an_upload(
    failure: Callable[[WandbServer], None],
    place: str,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key_file = store_key(place, tmp_path, monkeypatch)
    before = files_with_key(tmp_path)
    waits, log_epoch = [], WandbRuns.log_epoch  # seconds that training waits for the logging of each epoch

    def log_epoch_timed(*arguments: Any) -> None:
        started = time.monotonic()
        log_epoch(*arguments)
        waits.append(time.monotonic() - started)

    def fail_after_the_first_checkpoint(server: WandbServer) -> None:
        while not list((tmp_path / "runs").glob("*/*.pt")):
            time.sleep(0.01)
        failure(server)

    monkeypatch.setattr(WandbRuns, "log_epoch", log_epoch_timed)
    with WandbServer(KEY) as first:
        monkeypatch.setenv("WANDB_BASE_URL", first.url)
        threading.Thread(target=fail_after_the_first_checkpoint, args=(first,)).start()
        started = time.monotonic()
        result = configure(main_tutorial, EPOCHS=4, WANDB_MODE="online", WANDB_API_KEY_PATH=key_file).main()
        assert time.monotonic() - started < 60
        assert len(waits) == 12 and max(waits) < 1
        first.hanging = False
    output, errors = capfd.readouterr()
    (line,) = lines_about_wandb(errors)
    assert "so this run is logged offline" in line
    assert KEY not in output + errors
    with WandbServer(KEY) as second:
        monkeypatch.setenv("WANDB_BASE_URL", second.url)
        sync(output)
        assert_received(second, result)
    assert files_with_key(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_resumed_run_has_one_complete_history_per_fit(
    mode: str,
    number: int,
    configure: Configure,
    start_script: Start,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    settings = {"WANDB_MODE": mode, "EPOCHS": 40}
    process = start_script("main_tutorial", **settings)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("    10 "):
        assert process.poll() is None
    os.killpg(process.pid, number)
    assert KEY not in "".join(process.communicate(timeout=30))
    saved = saved_epochs(tmp_path / "runs")
    sent = sum(len(run["history"]) for run in server.runs.values())
    assert saved >= 20  # ten per fold
    all_were_sent = sent >= saved - 1  # the signal may come between saving and logging an epoch
    assert all_were_sent == (mode == "online" and number == signal.SIGINT), f"{sent} of {saved} epochs"
    result = configure(main_tutorial, **settings).main()
    assert result.environment["resumed"] is True
    if mode == "offline":
        assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 3
        sync(capfd.readouterr().out)
    assert_received(server, result)
    assert not files_with_key(tmp_path)


TWO_EXPERIMENTS = """
import os, sys, threading
import main_tutorial as script
def process_state():
    variables = {{name: value for name, value in os.environ.items() if name[:5] in ("WANDB", "XDG_D", "XDG_C")}}
    return variables, sys.exit, sys.excepthook
script.DATASET, script.FOLDS, script.EPOCHS, script.WANDB_MODE, script.WORKERS = "Digits", 2, 1, {mode!r}, 1
before = process_state()
for script.RUNS_DIR in ({first!r}, {second!r}):
    script.main()
    assert process_state() == before
    print("THREADS", len(threading.enumerate()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_two_experiments_in_one_process_write_into_their_own_folders_and_restore_the_process(
    mode: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "ignored"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    for name in ("working", "temporary"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / "first", tmp_path / "second"]
    code = TWO_EXPERIMENTS.format(mode=mode, first=str(folders[0]), second=str(folders[1]))
    output, _ = finish(start_python(tmp_path / "working", "-c", code))
    first, second = re.findall(r"^THREADS (\d+)", output, re.MULTILINE)
    assert int(second) <= int(first)
    for folder in folders:
        (run_dir,) = (path for path in folder.iterdir() if path.is_dir())
        wandb_id = json.loads((run_dir / "config.json").read_text())["wandb_id"]
        names = {re.sub(r"-\d+_\d+-", "-", path.name) for path in (run_dir / "wandb").iterdir()}
        kind = "offline-run" if mode == "offline" else "run"
        expected = {f"{kind}-{wandb_id}-{fit}" for fit in ("final", "fold-1", "fold-2")}
        assert names == expected | ({"artifacts"} if mode == "offline" else set())
    elsewhere = [path for path in tmp_path.rglob("*") if path.relative_to(tmp_path).parts[0] not in ("first", "second")]
    of_others = {"matplotlib", "torchinductor_root"}
    assert [path for path in elsewhere if path.is_file() and not of_others & set(path.parts)] == []
    assert "wandb" not in {path.name for path in elsewhere} and not any((tmp_path / "working").iterdir())
    assert {path.name for path in (tmp_path / "temporary").iterdir()} <= of_others


@pytest.mark.slow
def test_upload_command_quotes_the_folder_for_the_shell(
    configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = configure(main_tutorial, WANDB_MODE="offline", RUNS_DIR=tmp_path / "it's $HOME (1) [x]*").main()
    output = capfd.readouterr().out
    assert output.count("offline-run-*") == 1
    sync(output)
    assert_received(server, result)


@pytest.mark.parametrize("epochs", [0, 3])
def test_interrupted_offline_run_prints_the_upload_command_if_an_epoch_was_logged(
    epochs: int,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    log_epoch = WandbRuns.log_epoch
    logged: list[dict[str, Any]] = []

    def log_some_epochs(runs: WandbRuns, fit_name: str, metrics: dict[str, Any]) -> None:
        if len(logged) == epochs:
            raise KeyboardInterrupt
        log_epoch(runs, fit_name, metrics)
        logged.append(metrics)

    monkeypatch.setattr(WandbRuns, "log_epoch", log_some_epochs)
    with pytest.raises(SystemExit):
        configure(main_tutorial, WANDB_MODE="offline").main()
    output = capfd.readouterr().out
    assert ("wandb sync" in output) == (epochs > 0)
    if epochs:
        sync(output)
    assert sum(len(run["history"]) for run in server.runs.values()) == epochs == len(server.runs)


@pytest.mark.parametrize("place", ["file", *slow("environment", "netrc")])
@pytest.mark.parametrize(
    "ending", ["success", "refused", "diverged", *slow("disk full", "killed", "server down", "server fails")]
)
def test_key_is_stored_and_printed_nowhere_else(
    place: str,
    ending: str,
    configure: Configure,
    start_script: Start,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key_file = store_key(place, tmp_path, monkeypatch)
    constants: dict[str, Any] = {"WANDB_MODE": "online", "WANDB_API_KEY_PATH": str(key_file)}
    before = files_with_key(tmp_path)
    printed = ""
    if ending == "refused":
        server.key = "another"
    elif ending == "diverged":
        constants["LEARNING_RATE"] = 1e30
    elif ending == "server down":
        server.stop()
    elif ending == "server fails":
        server.fail()
    with nearly_full_disk(tmp_path / "runs") if ending == "disk full" else contextlib.nullcontext():
        if ending == "killed":
            process = start_script("main_tutorial", EPOCHS=1000, **constants)
            while not list((tmp_path / "runs").glob("*/*.pt")):
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            printed = "".join(process.communicate(timeout=30))
        elif status := {"refused": 2, "diverged": 1, "disk full": 1}.get(ending):
            with pytest.raises(SystemExit) as stop:
                configure(main_tutorial, **constants).main()
            assert stop.value.code == status
        else:
            configure(main_tutorial, **constants).main()
        assert files_with_key(tmp_path) == before
    printed += "".join(capfd.readouterr())
    assert KEY not in printed
    assert ("No space left" in printed) == (ending == "disk full")
    assert files_in_home(tmp_path) == [path for path in before if path.name == ".netrc"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working directory a git checkout whose tracked key file holds an uncommitted key; return that file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    key_file = folder / "wandb_api_key.txt"
    key_file.write_text("# your key\n")
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *arguments], check=True)
    key_file.write_text(f"# your key\n{KEY}\n")
    return key_file


def test_uncommitted_key_is_in_no_file_of_the_run_and_in_no_request(
    checkout: Path, configure: Configure, server: WandbServer
) -> None:
    result = configure(main_tutorial, EPOCHS=1, WANDB_MODE="online", WANDB_API_KEY_PATH=checkout).main()
    assert server.received and not any(KEY.encode() in body for body in server.received)
    assert not files_with_key(result.run_dir)


def test_key_that_git_would_commit_is_reported_in_one_line_with_the_command(
    checkout: Path, configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    script = configure(main_tutorial, EPOCHS=1, WANDB_API_KEY_PATH=checkout)
    script.main()
    warning, command = capfd.readouterr().err.splitlines()
    assert warning == "W&B: git would commit the API key in wandb_api_key.txt. Prevent that with"
    subprocess.run(command.split(), check=True)
    script.main()
    assert capfd.readouterr().err == ""


def test_without_git_nothing_is_reported_about_the_key(
    checkout: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    configure(main_tutorial, EPOCHS=1, WANDB_API_KEY_PATH=checkout).main()
    assert capfd.readouterr().err == ""
