"""What W&B does, and what is done to it, costs no result: errors of any type, a full disk, a deleted folder."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import FIGURES, KEY, Configure, nearly_full_disk, run_dirs, slow
from test_wandb_runs import assert_arrived, sync
from wandb_server import WandbServer

import main_tutorial
from experiment.results import ExperimentResult
from experiment.wandb_runs import WandbRuns

ERRORS = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
    "bare OSError": OSError("Unable to write staging files"),
    "W&B's own": wandb.errors.CommError("the server said no"),
    "anything": ZeroDivisionError(),
}
MOMENTS = {
    "opening": (wandb, "init"),
    "logging": (wandb.Run, "log"),
    "logging the model": (wandb.Run, "log_artifact"),
    "closing": (wandb.Run, "finish"),
}


def break_wandb(monkeypatch: pytest.MonkeyPatch, moment: str, error: Exception, modes: list[str]) -> None:
    """Let a function of W&B's raise the error for runs that are logged in one of these modes."""
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)

    def raise_or_call(*arguments: Any, **keywords: Any) -> Any:
        is_online = keywords["mode"] == "online" if moment == "opening" else not arguments[0].offline
        if ("online" if is_online else "offline") in modes:
            raise error
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, raise_or_call)


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        ("opening", "bare OSError"),
        ("closing", "disk full"),
        *slow(("opening", "anything"), ("logging", "no permission"), ("logging", "W&B's own")),
        *slow(("logging the model", "bare OSError"), ("closing", "anything")),
    ],
)
def test_what_w_and_b_raises_offline_costs_a_line(
    moment: str, kind: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_wandb(monkeypatch, moment, ERRORS[kind], ["offline"])
    environment = dict(os.environ)
    result = configure(main_tutorial, EPOCHS=1, WANDB_MODE="offline").main()
    output, errors = capfd.readouterr()
    (line,) = [line for line in errors.splitlines() if "W&B" in line]
    assert "this run is not logged any more" in line and "sync" not in output
    assert (result.run_dir / "results.json").exists()
    assert all((result.run_dir / name).exists() for name in FIGURES)
    assert not (result.run_dir / "wandb").exists()
    assert {name for name in os.environ if "WANDB" in name} == {name for name in environment if "WANDB" in name}


@pytest.mark.parametrize(
    ("moment", "kind"),
    slow(*((moment, kind) for moment in MOMENTS for kind in ("disk full", "W&B's own"))),
)
def test_what_w_and_b_raises_online_is_logged_offline(
    moment: str,
    kind: str,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The offline runs are whole in themselves: uploaded to another server, which has nothing of the online ones."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    break_wandb(monkeypatch, moment, ERRORS[kind], ["online"])
    result = configure(main_tutorial, WANDB_MODE="online").main()
    output, errors = capfd.readouterr()
    (line,) = [line for line in errors.splitlines() if "W&B" in line]
    assert "so this run is logged offline" in line
    assert {path.name[:11] for path in (result.run_dir / "wandb").glob("*run-*")} == {"offline-run"}
    with WandbServer(KEY) as another:
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        sync(output)
        assert_arrived(another, result)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_disk_that_is_full_when_the_results_are_logged_costs_the_log_and_no_result(
    mode: str,
    configure: Configure,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What W&B has written by then goes, and leaves room enough for results.json."""
    log_results = WandbRuns.log_results

    def fill_the_disk_and_log_results(runs: WandbRuns, result: ExperimentResult) -> None:
        with open(tmp_path / "runs" / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        log_results(runs, result)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(WandbRuns, "log_results", fill_the_disk_and_log_results)
    with nearly_full_disk(tmp_path / "runs") as filler:
        filler.unlink()
        result = configure(main_tutorial, WANDB_MODE=mode).main()
        assert (result.run_dir / "results.json").exists() and not (result.run_dir / "wandb").exists()
    output, errors = capfd.readouterr()
    assert "fails (No space left on device), so this run is not logged any more" in errors and "sync" not in output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_folder_that_is_deleted_while_w_and_b_logs_costs_no_result(
    mode: str, configure: Configure, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_epoch: Callable[..., None] = WandbRuns.log_epoch

    def log_epoch_and_delete(*arguments: Any) -> None:
        log_epoch(*arguments)
        for run_dir in run_dirs(tmp_path):
            shutil.rmtree(run_dir / "wandb", ignore_errors=True)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(WandbRuns, "log_epoch", log_epoch_and_delete)
    result = configure(main_tutorial, WANDB_MODE=mode).main()
    assert (result.run_dir / "results.json").exists()


@pytest.mark.slow
def test_a_run_of_the_users_own_in_the_same_process_goes_on(
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
    assert_arrived(server, result)
