"""Faults of whole runs: kill -9, signals, a full disk."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import (
    REPOSITORY,
    SETTINGS,
    Configure,
    Start,
    checkpoints,
    computed,
    finish,
    interrupt,
    nearly_full_disk,
    run_dirs,
    wait_for,
    wait_until_idle,
    workers_of,
)

import main_cnn
import main_tutorial


@pytest.mark.slow
def test_an_interrupted_run_prints_how_to_resume_and_resumes_with_the_same_bits(
    start_script: Start, tmp_path: Path, configure: Configure, undisturbed: dict[str, Any]
) -> None:
    _, errors = interrupt(start_script, tmp_path, signal.SIGINT)
    assert "RESUME = True, resumes the run" in errors and "Traceback" not in errors
    assert computed(configure(main_tutorial, **SETTINGS).main().run_dir) == undisturbed


@pytest.mark.slow
def test_a_run_killed_at_12_random_moments_has_the_same_bits(
    start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    moments, kills, finished, written = random.Random(314), 0, 0, 0
    while kills < 12 or not finished:
        process = start_script("main_tutorial", **SETTINGS)
        if kills % 3 == 2:  # while a checkpoint is written
            while process.poll() is None and not list((tmp_path / "runs").glob("*/.*.unfinished")):
                pass
        elif kills < 12:
            with contextlib.suppress(subprocess.TimeoutExpired):  # anywhere from the first import to the last figure
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
def test_no_worker_outlives_a_killed_parent_and_the_next_run_has_the_same_bits(
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
def test_killing_a_worker_that_trains_costs_only_its_epoch(
    start_script: Start, tmp_path: Path, configure: Configure
) -> None:
    settings = SETTINGS | {"EPOCHS": 3}
    process = start_script("main_cnn", **settings)  # its epochs take much longer than sending their results
    wait_for(lambda: checkpoints(tmp_path), process)
    workers = workers_of(process)
    wait_for(lambda: [worker for worker in workers if worker.status() == psutil.STATUS_RUNNING], process)[0].kill()
    _, errors = finish(process)
    assert "A worker process was killed" in errors
    (run_dir,) = run_dirs(tmp_path)
    undisturbed = configure(main_cnn, **settings, RUNS_DIR=tmp_path / "undisturbed").main()
    assert computed(run_dir) == computed(undisturbed.run_dir)


def kill_while_a_result_is_sent(process: subprocess.Popen[str], tmp_path: Path, everyone: bool) -> None:
    """Kill one worker or all while they send results: the parent is stopped, so that they block in their pipes."""
    wait_for(lambda: checkpoints(tmp_path), process)
    process.send_signal(signal.SIGSTOP)
    workers = workers_of(process)
    wait_until_idle(workers)  # each has finished its epoch, and a state is larger than a pipe
    for worker in workers if everyone else workers[:1]:
        worker.kill()
    process.send_signal(signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["one", "all"])
def test_killing_a_worker_that_sends_a_result_costs_only_its_epoch(
    everyone: bool, start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = start_script("main_tutorial", **SETTINGS)
    kill_while_a_result_is_sent(process, tmp_path, everyone)
    _, errors = finish(process)
    assert "A worker process was killed" in errors
    (run_dir,) = run_dirs(tmp_path)
    assert computed(run_dir) == undisturbed


@pytest.mark.slow
def test_ctrl_c_ends_a_run_after_a_worker_was_killed_while_it_sent_a_result(
    start_script: Start, tmp_path: Path
) -> None:
    process = start_script("main_tutorial", **SETTINGS)
    kill_while_a_result_is_sent(process, tmp_path, everyone=False)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and "resumes the run" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_end_the_run_with_one_line(start_script: Start, tmp_path: Path) -> None:
    process = start_script("main_tutorial", **SETTINGS | {"EPOCHS": 1000})
    wait_for(lambda: checkpoints(tmp_path), process)
    while process.poll() is None:
        for worker in workers_of(process):
            worker.kill()
        time.sleep(0.2)
    _, errors = finish(process, status=1)
    assert "Reduce WORKERS" in errors and "resumes the run" in errors
    assert all(torch.load(path, weights_only=True)["history"] for path in checkpoints(tmp_path))


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_the_run_resumes_when_there_is_space(
    start_script: Start, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with nearly_full_disk(tmp_path / "runs") as filler:
        _, errors = finish(start_script("main_tutorial", **SETTINGS), status=1)
        assert "No space left on device" in errors and "resumes the run" in errors and "Warning" not in errors
        assert checkpoints(tmp_path)
        assert all(torch.load(path, weights_only=True)["history"] for path in checkpoints(tmp_path))
        filler.unlink()
        output, _ = finish(start_script("main_tutorial", **SETTINGS))
        assert "Resuming the unfinished run" in output
        (run_dir,) = run_dirs(tmp_path)
        assert computed(run_dir) == undisturbed


SOAK = """
import gc, psutil, main_tutorial as script
script.DATASET, script.FOLDS, script.EPOCHS, script.RUNS_DIR, script.WANDB_MODE = "Digits", 2, 1, {runs!r}, "offline"
for _ in range({count}):
    script.main()
gc.collect()
me = psutil.Process()
print("LEFT", me.num_fds(), len(me.children(recursive=True)), me.num_threads())
"""


def resources_left(count: int, folder: Path) -> tuple[list[int], list[str]]:
    """Return open files, children and threads after a number of experiments, and temporary files after the process."""
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
def test_6_experiments_in_one_process_leak_no_more_than_one(tmp_path: Path) -> None:
    (one, files_of_one), (six, files_of_six) = (resources_left(n, tmp_path / str(n)) for n in (1, 6))
    assert all(many <= few for few, many in zip(one, six, strict=True)), (one, six)
    assert files_of_six == files_of_one
