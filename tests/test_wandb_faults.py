"""W&B's folder full, read-only or deleted, for real: it costs no result, and what can be logged offline is."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FIGURES, KEY, Configure
from test_wandb_runs import assert_arrived, sync
from wandb_server import WandbServer

import main_tutorial
from experiment.results import ExperimentResult
from experiment.wandb_runs import WandbRuns


def mount(*arguments: str | Path) -> None:
    if shutil.which("mount") is None or subprocess.run(["mount", *arguments]).returncode != 0:
        pytest.skip("only who may mount can make such a folder, so nothing was tested")


def make_full(folder: Path) -> None:
    """Fill the folder's disk to the last byte."""
    filler = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(filler, bytes(4096)):
            pass
    except OSError:
        os.close(filler)


def make_read_only(folder: Path) -> None:
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)


def delete(folder: Path) -> None:
    """Delete what is in the folder, W&B's own included."""
    for path in folder.iterdir():
        shutil.rmtree(path)


FAULTS = {"full": make_full, "read-only": make_read_only, "deleted": delete}


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a small disk for W&B to write in, and for all that it else would write elsewhere."""
    folder = tmp_path / "wandb-disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", folder)
    monkeypatch.setenv("WANDB_DIR", str(folder))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder / "wandb" / ".wandb"))
    yield folder
    while folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)  # lazily: W&B may not have ended yet


def strike(moment: str, fault: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fault happen before the run, after its third epoch of six, or when all of them are done."""
    log_epoch, log_results, logged = WandbRuns.log_epoch, WandbRuns.log_results, []

    def log_epoch_and_strike(runs: WandbRuns, fit_name: str, metrics: dict[str, float]) -> None:
        log_epoch(runs, fit_name, metrics)
        logged.append(fit_name)
        if len(logged) == 3:
            fault(folder)

    def strike_and_log_results(runs: WandbRuns, result: ExperimentResult) -> None:
        fault(folder)
        log_results(runs, result)

    if moment == "before":
        fault(folder)
    elif moment == "middle":
        monkeypatch.setattr(WandbRuns, "log_epoch", log_epoch_and_strike)
    else:
        monkeypatch.setattr(WandbRuns, "log_results", strike_and_log_results)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "middle", "end"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_folder_that_fails_costs_no_result_and_the_log_is_written_whole(
    mode: str,
    fault: str,
    moment: str,
    configure: Configure,
    wandb_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with WandbServer(KEY) as first, WandbServer(KEY) as second:
        monkeypatch.setenv("WANDB_BASE_URL", first.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        strike(moment, FAULTS[fault], wandb_folder, monkeypatch)
        result = configure(main_tutorial, WANDB_MODE=mode).main()
        output, errors = capfd.readouterr()
        assert (result.run_dir / "results.json").exists()
        assert all((result.run_dir / name).exists() for name in FIGURES)
        if mode == "offline":
            (said,) = [line for line in output.splitlines() if line.startswith("W&B: offline, in")]
            assert ("/runs/" in said) == (moment == "before" and fault != "deleted")
        lines = [line for line in errors.splitlines() if line.startswith("W&B")]
        moved = moment != "before" and "sync" in output  # online, a deleted folder may cost nothing
        assert len(lines) == moved, errors
        assert all("cannot be written" in line and "logged offline, in" in line for line in lines)
        if "sync" in output:
            monkeypatch.setenv("WANDB_BASE_URL", second.url)
            sync(output)
            assert_arrived(second, result)
        else:
            assert_arrived(first, result)


@pytest.mark.slow
def test_where_w_and_b_can_write_nowhere_one_line_says_that_the_run_is_not_logged(
    configure: Configure, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError("Unable to write staging files")

    monkeypatch.setattr(WandbRuns, "_open", fail)
    result = configure(main_tutorial, EPOCHS=1, WANDB_MODE="offline").main()
    output, errors = capfd.readouterr()
    assert "is not logged any more" in errors and "sync" not in output
    assert (result.run_dir / "results.json").exists()
