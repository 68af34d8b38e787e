"""No failure of W&B costs a result: exceptions of any type, a full disk, a deleted folder."""

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import FIGURES, KEY, Configure, Start, nearly_full_disk, run_dirs, slow, wait_for
from test_wandb_logging import assert_received, lines_about_wandb, sync
from wandb_server import WandbServer

import main_tutorial
from experiment.errors import ConfigurationError
from experiment.results import ExperimentResult
from experiment.wandb_logging import WandbRuns, _check_environment

ERRORS = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "bare OSError": OSError("Unable to write staging files"),
    "W&B's own": wandb.errors.CommError("no connection"),
    "anything": ZeroDivisionError(),
}
CALLS = {
    "open": (wandb, "init"),
    "log": (wandb.Run, "log"),
    "log the model": (wandb.Run, "log_artifact"),
    "close": (wandb.Run, "finish"),
}


def break_wandb(monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, mode: str) -> None:
    """Let a function of W&B raise the error for runs in one of the modes."""
    owner, name = CALLS[call]
    function = getattr(owner, name)

    def raise_or_call(*arguments: Any, **keywords: Any) -> Any:
        is_online = keywords["mode"] == "online" if call == "open" else not arguments[0].offline
        if is_online == (mode == "online"):
            raise error
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, raise_or_call)


def fill_disk(path: Path) -> None:
    """Write to a file until the disk is full."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("open", "bare OSError"),
        *slow(
            ("close", "disk full"),
            ("open", "anything"),
            ("log", "W&B's own"),
            ("log the model", "bare OSError"),
            ("close", "anything"),
        ),
    ],
)
def test_exception_of_wandb_offline_costs_one_line(
    call: str, error: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_wandb(monkeypatch, call, ERRORS[error], "offline")
    environment = {name for name in os.environ if "WANDB" in name}
    result = configure(main_tutorial, EPOCHS=1, WANDB_MODE="offline").main()
    output, errors = capfd.readouterr()
    (line,) = lines_about_wandb(errors)
    assert "this run is not logged any more" in line and "sync" not in output
    assert all((result.run_dir / name).exists() for name in ("results.json", *FIGURES))
    assert not (result.run_dir / "wandb").exists()
    assert {name for name in os.environ if "WANDB" in name} == environment


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_SILENT", "maybe"), ("WANDB_INIT_TIMEOUT", "soon"), ("WANDB_PROJECT", "a/b")]
)
def test_variable_that_wandb_refuses_is_one_line_before_training(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    _check_environment()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as error:
        _check_environment()
    message = str(error.value)
    assert message.startswith(f"W&B refuses the environment variable {variable}, got {value!r}: ")
    assert "\n" not in message and "not a key" not in message


def test_key_in_a_variable_that_wandb_refuses_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", KEY)
    with pytest.raises(ConfigurationError) as error:
        _check_environment()
    assert "WANDB_SILENT" in str(error.value) and KEY not in str(error.value)


def test_mode_that_only_this_program_knows_logs_offline(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "auto")
    result = configure(main_tutorial, EPOCHS=1, WANDB_MODE="online").main()
    assert not lines_about_wandb(capfd.readouterr().err)
    assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 3
    assert os.environ["WANDB_MODE"] == "auto"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"),
    [("open", "W&B's own"), ("log", "disk full"), ("log the model", "W&B's own"), ("close", "disk full")],
)
def test_exception_of_wandb_online_means_that_everything_is_logged_offline(
    call: str,
    error: str,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The offline runs are uploaded to another server, which has nothing of the online runs."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    break_wandb(monkeypatch, call, ERRORS[error], "online")
    result = configure(main_tutorial, WANDB_MODE="online").main()
    output, errors = capfd.readouterr()
    (line,) = lines_about_wandb(errors)
    assert "so this run is logged offline" in line
    assert {path.name[:11] for path in (result.run_dir / "wandb").glob("*run-*")} == {"offline-run"}
    with WandbServer(KEY) as another:
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        sync(output)
        assert_received(another, result)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_disk_that_is_full_when_the_results_are_logged_costs_the_log_only(
    mode: str,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The files of W&B are deleted, which frees enough space for results.json."""
    log_results = WandbRuns.log_results

    def fill_disk_and_log_results(runs: WandbRuns, result: ExperimentResult) -> None:
        fill_disk(tmp_path / "runs" / "filler")
        log_results(runs, result)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(WandbRuns, "log_results", fill_disk_and_log_results)
    with nearly_full_disk(tmp_path / "runs") as filler:
        filler.unlink()
        result = configure(main_tutorial, WANDB_MODE=mode).main()
        assert (result.run_dir / "results.json").exists() and not (result.run_dir / "wandb").exists()
    output, errors = capfd.readouterr()
    assert "fails (No space left on device), so this run is not logged any more" in errors and "sync" not in output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_deletion_of_wandbs_folder_costs_no_result(
    mode: str, configure: Configure, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_epoch = WandbRuns.log_epoch

    def log_epoch_and_delete(runs: WandbRuns, fit_name: str, metrics: dict[str, Any]) -> None:
        log_epoch(runs, fit_name, metrics)
        for run_dir in run_dirs(tmp_path):
            shutil.rmtree(run_dir / "wandb", ignore_errors=True)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(WandbRuns, "log_epoch", log_epoch_and_delete)
    result = configure(main_tutorial, WANDB_MODE=mode).main()
    assert (result.run_dir / "results.json").exists()


@pytest.mark.slow
def test_run_of_the_users_own_in_the_same_process_continues(
    configure: Configure, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    own = wandb.init(project="own", id="own", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    own.log({"value": 1})
    result = configure(main_tutorial, WANDB_MODE="online").main()
    own.log({"value": 2})
    own.finish()
    wandb.teardown()
    assert [row["value"] for row in server.runs.pop("own")["history"]] == [1, 2]
    assert_received(server, result)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["results.json", "*-1.pt"], ids=["uploading", "training"])
def test_a_run_ends_within_30_seconds_of_sigterm_although_the_server_hangs(
    what: str, start_script: Start, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    process = start_script("main_tutorial", WANDB_MODE="online")
    wait_for(lambda: list(tmp_path.glob(f"runs/*/{what}")), process)
    server.hang()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    if what == "results.json":
        assert "All results are saved in" in errors
        server.repair()
        sync(output, tmp_path)
        final = next(run for name, run in server.runs.items() if name.endswith("final"))
        assert final["history"][-1]["epoch"] == 2
    else:
        assert "resumes the run" in errors and "sync" not in output
