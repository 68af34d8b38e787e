"""Weights & Biases, with real clients: what arrives at a server equals what the run returned; keys stay secret."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FIGURES,
    KEY,
    REPOSITORY,
    Configure,
    all_fits,
    finish,
    nearly_full_disk,
    saved_epochs,
    slow,
    start_python,
)
from wandb_server import WandbServer

import main_tutorial
from experiment.results import ExperimentResult
from experiment.wandb_runs import WandbRuns


def assert_arrived(server: WandbServer, result: ExperimentResult) -> None:
    """Compare all that the server holds with all that the run returned."""
    assert {run["name"] for run in server.runs.values()} == {"fold-1", "fold-2", "final"}
    assert len(server.runs) == 3
    for fit in all_fits(result):
        run = next(run for run in server.runs.values() if run["name"] == fit.name)
        assert run["group"] == result.run_dir.name
        assert run["job_type"] == ("final" if fit.name == "final" else "fold")
        history = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run["history"]]
        history[-1] = {name: value for name, value in history[-1].items() if name in result.folds[0].history[-1]}
        assert history == fit.history
        assert [row["_step"] for row in run["history"]] == [row["epoch"] for row in fit.history]
        for row_name in [*map(str, range(10)), "macro avg", "weighted avg"]:
            for figure in ("precision", "recall", "f1-score"):
                assert run["summary"][f"{row_name}/{figure}"] == fit.report[row_name][figure]
        assert (run["summary"]["loss"], run["summary"]["accuracy"]) == (fit.loss, fit.accuracy)
        tables = sorted(
            re.split(r"_\d+_", path.rsplit("/", 1)[1])[0] for path in run["files"] if path.startswith("media/table")
        )
        assert tables == ["confusion_matrix", *(["mistakes"] if fit.name == "final" else []), "per_class"]
        assert run["config"]["epochs"] == result.config["epochs"] and "linear_relu_stack" in run["config"]["model"]
        assert run["exit_code"] == 0
    final = next(run for run in server.runs.values() if run["name"] == "final")
    for name, value in result.cross_validation.items():
        assert final["summary"][f"cross_validation/{name}"] == value
    for name in FIGURES:
        (sent,) = [path for path in final["files"] if re.match(rf"media/images/figures/{Path(name).stem}_\d+_", path)]
        assert final["files"][sent] == (result.run_dir / name).read_bytes()
    pictures = {content for content in server.artifact_files if content.startswith(b"\x89PNG")}
    assert len(pictures) == len(result.mistakes) > 0
    (model,) = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    assert json.loads(model["metadata"])["test/accuracy"] == all_fits(result)[-1].accuracy
    assert (result.run_dir / "model.pt").read_bytes() in server.artifact_files


def sync(printed: str, folder: Path | None = None) -> None:
    """Give a shell the ``wandb sync`` command that a run printed, in the folder that the run was started in."""
    (command,) = re.findall(r"^  (\S*wandb sync .*)$", printed, re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | {"WANDB_API_KEY": KEY}, check=True, timeout=60)


def put_key(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the key into a place where it is looked for; return the path of the key file, which may not be there."""
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


def test_without_a_key_the_printed_command_uploads_everything(
    configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = configure(main_tutorial, WANDB_MODE="auto", WANDB_API_KEY_PATH=tmp_path / "none").main()
    output = capfd.readouterr().out
    assert len(re.findall(r"^W&B: offline", output, re.MULTILINE)) == 1
    assert not server.runs
    sync(output)
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


class TimedStream(io.StringIO):
    """A stream that knows when each text was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[float, str]] = []

    def write(self, text: str) -> int:
        self.written.append((time.monotonic(), text))
        return super().write(text)


@pytest.mark.slow
@pytest.mark.parametrize(("breaks", "requests"), [(WandbServer.fail, 1), (WandbServer.hang, 4)])
def test_a_server_that_breaks_while_the_runs_are_opened_is_replaced_by_offline_within_30_seconds(
    breaks: Callable[[WandbServer], None],
    requests: int,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.breaks, server.breaks_after = breaks, requests
    started = time.monotonic()
    with contextlib.redirect_stderr(TimedStream()) as errors:
        result = configure(main_tutorial, WANDB_MODE="online").main()
    told = [moment for moment, text in errors.written if "so this run is logged offline" in text]
    assert len(told) == 1 and told[0] - started < 30
    output, _ = capfd.readouterr()
    server.mend()
    sync(output)
    assert_arrived(server, result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disappear", "place"),
    [(WandbServer.stop, "file"), (WandbServer.hang, "environment"), (WandbServer.fail, "netrc")],
)
def test_a_server_that_goes_away_half_way_costs_nothing_but_a_sync(
    disappear: Callable[[WandbServer], None],
    place: str,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key_file = put_key(place, tmp_path, monkeypatch)
    before = files_with_key(tmp_path)
    waits, log_epoch = [], WandbRuns.log_epoch  # seconds for which training waits for the logging of an epoch

    def log_epoch_timed(*arguments: Any) -> None:
        began = time.monotonic()
        log_epoch(*arguments)
        waits.append(time.monotonic() - began)

    monkeypatch.setattr(WandbRuns, "log_epoch", log_epoch_timed)
    with WandbServer(KEY) as first:
        monkeypatch.setenv("WANDB_BASE_URL", first.url)

        def go_away() -> None:
            while not list((tmp_path / "runs").glob("*/*.pt")):
                time.sleep(0.01)
            disappear(first)

        threading.Thread(target=go_away).start()
        started = time.monotonic()
        result = configure(main_tutorial, EPOCHS=4, WANDB_MODE="online", WANDB_API_KEY_PATH=key_file).main()
        assert time.monotonic() - started < 60
        assert len(waits) == 12 and max(waits) < 1
        first.hanging = False
    output, errors = capfd.readouterr()
    assert len([line for line in errors.splitlines() if "so this run is logged offline" in line]) == 1
    assert KEY not in output + errors
    with WandbServer(KEY) as second:
        monkeypatch.setenv("WANDB_BASE_URL", second.url)
        sync(output)
        assert_arrived(second, result)
    assert files_with_key(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_after_a_resume_every_run_has_one_whole_history(
    mode: str,
    number: int,
    configure: Configure,
    start_script: Callable[..., subprocess.Popen[str]],
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
    assert saved >= 20  # ten of each fold; the final fit may still be in its first, where a worker was slow to start
    everything = sent >= saved - 1  # the signal may come after an epoch was saved and before it is logged
    assert everything == (mode == "online" and number == signal.SIGINT), f"{sent} of {saved} epochs"
    result = configure(main_tutorial, **settings).main()
    assert result.environment["resumed"] is True
    if mode == "offline":
        assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 3
        sync(capfd.readouterr().out)
    assert_arrived(server, result)
    assert not files_with_key(tmp_path)


TWO_EXPERIMENTS = """
import os, sys, threading
import main_tutorial as script
def process():
    variables = {{name: value for name, value in os.environ.items() if name[:5] in ("WANDB", "XDG_D", "XDG_C")}}
    return variables, sys.exit, sys.excepthook
script.DATASET, script.FOLDS, script.EPOCHS, script.WANDB_MODE, script.WORKERS = "Digits", 2, 1, {mode!r}, 1
before = process()
for script.RUNS_DIR in ({first!r}, {second!r}):
    script.main()
    assert process() == before
    print("THREADS", len(threading.enumerate()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_two_experiments_in_one_process_write_into_their_own_folders_and_leave_the_process_as_it_was(
    mode: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "not-asked"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    for name in ("working", "temporary"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / "first", tmp_path / "second"]
    code = TWO_EXPERIMENTS.format(mode=mode, first=str(folders[0]), second=str(folders[1]))
    output, _ = finish(start_python(tmp_path / "working", "-c", code))
    first, second = re.findall(r"^THREADS (\d+)", output, re.MULTILINE)
    assert int(second) <= int(first)
    for folder in folders:
        (run_dir,) = folder.iterdir()
        wandb_id = json.loads((run_dir / "config.json").read_text())["wandb_id"]
        names = {re.sub(r"-\d+_\d+-", "-", path.name) for path in (run_dir / "wandb").iterdir()}
        kind = "offline-run" if mode == "offline" else "run"
        expected = {f"{kind}-{wandb_id}-{fit}" for fit in ("final", "fold-1", "fold-2")}
        assert names == expected | ({"artifacts"} if mode == "offline" else set())
    elsewhere = [path for path in tmp_path.rglob("*") if path.relative_to(tmp_path).parts[0] not in ("first", "second")]
    of_others = ("matplotlib", "torchinductor_root")
    found = [path for path in elsewhere if path.is_file() and not set(of_others) & set(path.parts)]
    assert found == []
    assert "wandb" not in {path.name for path in elsewhere} and not any((tmp_path / "working").iterdir())
    assert {path.name for path in (tmp_path / "temporary").iterdir()} <= {"torchinductor_root"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with blanks", "it's $HOME (1) [x]*"])
def test_the_upload_command_is_understood_by_a_shell_wherever_the_run_lies(
    name: str, configure: Configure, server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = configure(main_tutorial, WANDB_MODE="offline", RUNS_DIR=tmp_path / name).main()
    output = capfd.readouterr().out
    assert output.count("offline-run-*") == 1
    sync(output)
    assert_arrived(server, result)


def test_a_run_that_is_cut_off_offline_says_how_to_upload_what_it_logged(
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    log_epoch, logged = WandbRuns.log_epoch, []

    def interrupt_after_three(runs: WandbRuns, fit_name: str, metrics: dict[str, Any]) -> None:
        log_epoch(runs, fit_name, metrics)
        logged.append(metrics)
        if len(logged) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(WandbRuns, "log_epoch", interrupt_after_three)
    with pytest.raises(SystemExit):
        configure(main_tutorial, WANDB_MODE="offline").main()
    sync(capfd.readouterr().out)
    assert sum(len(run["history"]) for run in server.runs.values()) == 3 == len(server.runs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_without_a_home_is_logged_like_any_other(
    mode: str, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody = ["unshare", "-U", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME", "-u", "NETRC"]
    if shutil.which("unshare") is None or subprocess.run([*nobody, "true"]).returncode != 0:
        pytest.skip("only unshare makes a user without an entry in /etc/passwd, so nothing was tested")
    if mode == "online":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    options = ["--dataset=Digits", "--folds=2", "--epochs=1", "--wandb-mode=auto", f"--runs-dir={tmp_path / 'runs'}"]
    run = subprocess.run(
        [*nobody, sys.executable, str(REPOSITORY / "main_tutorial.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stderr == ""
    if mode == "offline":
        assert not server.runs
        sync(run.stdout, tmp_path)
    assert {run["name"]: run["exit_code"] for run in server.runs.values()} == {"final": 0, "fold-1": 0, "fold-2": 0}
    assert len(server.artifacts) == 8  # two tables a run, the mistakes and the model


@pytest.mark.slow
def test_a_full_folder_for_temporary_files_costs_no_log(
    start_script: Callable[..., subprocess.Popen[str]],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with nearly_full_disk(tmp_path / "temporary") as filler:
        with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        output, errors = finish(start_script("main_tutorial", WANDB_MODE="offline"))
    assert errors == ""
    monkeypatch.delenv("TMPDIR")
    sync(output, tmp_path)
    assert len(server.runs) == 3 and len(server.artifacts) == 8


@pytest.mark.parametrize("place", ["file", *slow("environment", "netrc")])
@pytest.mark.parametrize(
    "ending",
    [
        *("well", "refused", "diverged"),
        *(
            pytest.param(ending, marks=pytest.mark.slow)
            for ending in ("disk full", "killed", "server down", "server fails")
        ),
    ],
)
def test_the_key_is_nowhere_that_it_was_not_before(
    place: str,
    ending: str,
    configure: Configure,
    start_script: Callable[..., subprocess.Popen[str]],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    constants: dict[str, Any] = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY_PATH": str(put_key(place, tmp_path, monkeypatch)),
    }
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
    in_home = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and "matplotlib" not in path.parts]
    assert in_home == [path for path in before if path.name == ".netrc"]
