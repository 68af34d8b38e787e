"""Sweeps, with W&B's own command line, agent and search engine."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sweeps
import torch
import yaml
from conftest import KEY, REPOSITORY, Configure, Start, make_fit, saved_epochs
from torch import Tensor, nn
from wandb_server import WandbServer

import main_cnn
import main_tutorial
from experiment.settings import TrainingConfig
from models import NeuralNetwork
from train_utils import epoch_seed

METRIC = "cross_validation/accuracy_mean"
PARAMETERS: dict[str, Any] = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 0.0003, "max": 0.003},
    "lr_schedule": {"values": ["constant", "cosine", "one_cycle"]},
}
StartAgent = Callable[..., subprocess.Popen[str]]
MakeTrial = Callable[..., ModuleType]


@pytest.fixture
def server(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> WandbServer:
    """Return the server, with the key and W&B's command line in the environment."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return server


@pytest.fixture
def start_agent(server: WandbServer, tmp_path: Path) -> StartAgent:
    """Return a function that registers a sweep of small runs and starts ``wandb agent`` for it."""

    def start_agent(parameters: dict[str, Any], count: int, method: str = "bayes") -> subprocess.Popen[str]:
        fixed = {"dataset": "Digits", "folds": 2, "epochs": 2, "runs_dir": str(tmp_path / "runs")}
        config = {
            "program": str(REPOSITORY / "main_tutorial.py"),
            "project": "project-of-the-sweep",
            "method": method,
            "metric": {"name": METRIC, "goal": "maximize"},
            "parameters": {name: {"value": value} for name, value in fixed.items()} | parameters,
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
        sweep = register(tmp_path / "sweep.yaml")
        return subprocess.Popen(
            ["wandb", "agent", "--count", str(count), sweep],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start_agent


@pytest.fixture
def make_trial(configure: Configure, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTrial:
    """Return a function that turns this process into a trial, as an agent does; it returns the script."""

    def make_trial(**parameters: Any) -> ModuleType:
        entries = {"wandb_version": 1} | {name: {"value": value} for name, value in parameters.items()}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(entries))
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep-id")
        monkeypatch.setenv("WANDB_RUN_ID", "run-id")
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "config.yaml"))
        return configure(main_tutorial, WANDB_MODE="auto")

    return make_trial


def register(sweep_file: Path) -> str:
    """Run ``wandb sweep``; return the sweep's name for ``wandb agent``."""
    sweep = subprocess.run(["wandb", "sweep", sweep_file.name], cwd=sweep_file.parent, capture_output=True, text=True)
    assert sweep.returncode == 0, sweep.stderr
    assert "Malformed" not in sweep.stderr
    command = re.search(r"wandb agent (\S+)", sweep.stderr)
    assert command is not None
    return command[1]


def finish(agent: subprocess.Popen[str]) -> str:
    output = agent.communicate(timeout=240)[0]
    assert agent.returncode == 0, output
    return output


def wait_for_checkpoint(process: subprocess.Popen[str], tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/fold-2.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def mean_accuracies(results: dict[str, Any]) -> list[float]:
    """Return the mean over the folds after each epoch."""
    epochs = zip(*(fold["history"] for fold in results["folds"]), strict=True)
    return [statistics.fmean(row["validation/accuracy"] for row in epoch) for epoch in epochs]


def assert_is_trial(server: WandbServer, run_id: str, parameters: dict[str, Any], runs_dir: Path) -> None:
    """Compare what the server received of a trial with the agent's parameters and the results on disk."""
    final = server.runs[run_id]
    results = json.loads((runs_dir / final["group"] / "results.json").read_text())
    runs = {run["name"]: run for run in server.runs.values() if run["group"] == final["group"]}
    assert set(runs) == {"final", "fold-1", "fold-2"} and runs["final"] is final
    for name, run in runs.items():
        assert (run["job_type"], run["project"]) == (name.split("-")[0], "project-of-the-sweep")
        assert {name: run["config"][name] for name in parameters} == parameters
        assert run["exit_code"] == 0
        assert (run["sweep"] is not None) == (name == "final")
    means = mean_accuracies(results)
    assert [(row["_step"], row[METRIC]) for row in final["history"]] == list(enumerate(means, start=1))
    assert final["summary"][METRIC] == results["cross_validation"]["accuracy_mean"] == means[-1]


@pytest.mark.slow
def test_sweep_searches_by_the_mean_over_the_folds(
    start_agent: StartAgent, server: WandbServer, tmp_path: Path
) -> None:
    finish(start_agent(PARAMETERS, count=2))
    ((sweep_id, sweep),) = server.sweeps.items()
    first, second = sweep["trials"]
    results = json.loads((tmp_path / "runs" / server.runs[first]["group"] / "results.json").read_text())
    search = sweep["trials"][second].search_info
    best = max(mean_accuracies(results))
    assert (search["predicted_value"], search["warnings"]) == (-best, "")  # the engine predicts the first trial's mean
    assert [run_id for run_id, run in server.runs.items() if run["sweep"] == sweep_id] == list(sweep["trials"])
    assert len(server.runs) == 2 * 3
    for run_id, trial in sweep["trials"].items():
        parameters = {name: entry["value"] for name, entry in trial.config.items()}
        assert_is_trial(server, run_id, parameters, tmp_path / "runs")


def test_all_suggestions_of_the_repositorys_sweep_are_valid_settings(server: WandbServer) -> None:
    register(REPOSITORY / "sweep.yaml")
    ((_, sweep),) = server.sweeps.items()
    assert sweep["warnings"] == [] and sweep["project"] == main_cnn.WANDB_PROJECT_NAME
    config = sweep["config"]
    assert (REPOSITORY / config["program"]).is_file()
    assert config["metric"] == {"name": METRIC, "goal": "maximize"}
    for _ in range(20):
        suggestion = sweeps.next_run(config, [], validate=True).config
        constants = {name.upper(): entry["value"] for name, entry in suggestion.items()}
        assert constants.keys() <= vars(main_cnn).keys()
        TrainingConfig.from_constants(vars(main_cnn) | constants)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"epochs": 0, "learning_rate": "1e-4"}, ["EPOCHS must be", "LEARNING_RATE must be", "got '1e-4'"]),
        ({"epoch": 3}, ["EPOCH is not a setting"]),
        ({"wandb_mode": "offline"}, ['a sweep needs W&B\'s server, but WANDB_MODE is "offline". Set it to "auto".']),
    ],
)
def test_trial_with_bad_parameters_is_a_configuration_error(
    parameters: dict[str, Any],
    expected: list[str],
    make_trial: MakeTrial,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        make_trial(**parameters).main()
    errors = capfd.readouterr().err
    assert stop.value.code == 2
    assert all(part in errors for part in expected) and len(errors.splitlines()) == 1 + len(parameters)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("problem", "status", "expected"),
    [
        ("no key", 2, "a sweep needs W&B's server, but no API key is in"),
        ("wrong key", 2, "refuses the API key"),
        ("server fails", 1, "does not respond as expected (HTTP status 500)."),
    ],
)
def test_trial_without_a_server_ends_before_training(
    problem: str,
    status: int,
    expected: str,
    make_trial: MakeTrial,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if problem == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif problem == "wrong key":
        server.key = "another"
    else:
        server.fail()
    script = make_trial()
    monkeypatch.setattr(script, "WANDB_API_KEY_PATH", tmp_path / "none")
    with pytest.raises(SystemExit) as stop:
        script.main()
    errors = capfd.readouterr().err
    assert stop.value.code == status
    assert expected in errors and len(errors.splitlines()) == (1 if status == 1 else 2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_agents_parameters_replace_constants_in_one_experiment_only(
    make_trial: MakeTrial, configure: Configure, server: WandbServer
) -> None:
    first = configure(make_trial(epochs=1, lr_schedule="cosine"), EPOCHS=3, WANDB_MODE="auto").main()
    second = configure(main_tutorial, EPOCHS=1, WANDB_MODE="auto").main()
    assert (first.config["epochs"], first.config["lr_schedule"]) == (1, "cosine")
    assert second.config["lr_schedule"] == "constant"
    assert [(run_id, run["name"]) for run_id, run in server.runs.items() if run["sweep"]] == [("run-id", "final")]


def network_with_fault(fault: Callable[[Tensor], Tensor], seed: int) -> type[nn.Module]:
    """Return the tutorial's network, whose logits are changed in the epoch that has this seed."""

    class NeuralNetworkWithFault(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return fault(logits) if torch.initial_seed() == seed else logits

    return NeuralNetworkWithFault


@pytest.mark.slow
def test_final_run_ends_as_failed_if_a_fold_diverged(
    make_trial: MakeTrial, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = epoch_seed(make_fit(name="fold-3", FOLDS=3), 2)
    monkeypatch.setattr(main_tutorial, "NeuralNetwork", network_with_fault(lambda logits: logits * math.nan, seed))
    with pytest.raises(SystemExit) as stop:
        make_trial(folds=3, epochs=3).main()
    assert stop.value.code == 1
    codes = {run["name"]: run["exit_code"] for run in server.runs.values()}
    assert codes == {"final": 1, "fold-1": 0, "fold-2": 0, "fold-3": 1}
    final = server.runs["run-id"]
    assert [METRIC in row for row in final["history"]] == [True, True, False]
    assert final["summary"][METRIC] == final["history"][1][METRIC]


@pytest.mark.slow
def test_server_that_fails_during_a_trial_costs_one_line_and_no_result(
    make_trial: MakeTrial,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stop_server(logits: Tensor) -> Tensor:
        server.fail()
        return logits

    network = network_with_fault(stop_server, epoch_seed(make_fit(name="fold-1"), 1))
    monkeypatch.setattr(main_tutorial, "NeuralNetwork", network)
    make_trial().main()
    errors = capfd.readouterr().err
    assert errors.count("so the sweep does not get this trial") == 1 and "Traceback" not in errors
    assert list((tmp_path / "runs").glob("*/results.json"))


@pytest.mark.slow
def test_agent_continues_after_a_trial_with_bad_parameters(
    start_agent: StartAgent, server: WandbServer, tmp_path: Path
) -> None:
    output = finish(start_agent({"epochs": {"values": [0, 1]}}, count=2, method="grid"))
    assert output.count("EPOCHS must be an integer of at least 1, got 0") == 1 and "Traceback" not in output
    ((_, sweep),) = server.sweeps.items()
    assert_is_trial(server, list(sweep["trials"])[1], {"epochs": 1}, tmp_path / "runs")


@pytest.mark.slow
def test_trial_that_is_stopped_on_wandbs_page_keeps_its_epochs(
    start_agent: StartAgent, server: WandbServer, tmp_path: Path
) -> None:
    agent = start_agent({"epochs": {"value": 100000}, "rng_seed": {"values": [1, 2]}}, count=1)
    wait_for_checkpoint(agent, tmp_path)
    ((_, sweep),) = server.sweeps.items()
    server.stop_run(next(iter(sweep["trials"])))
    stopped = time.monotonic()
    output = finish(agent)
    assert time.monotonic() - stopped < 30  # after which the agent would send SIGKILL
    assert re.search(r"^Stopped by ", output, re.MULTILINE) and "Traceback" not in output
    assert {run["exit_code"] for run in server.runs.values()} == {1} and len(server.runs) == 3
    assert_rows_of_saved_epochs(server, tmp_path)


@pytest.mark.slow
def test_run_that_is_stopped_on_wandbs_page_ends_like_ctrl_c(
    start_script: Start, server: WandbServer, tmp_path: Path
) -> None:
    process = start_script("main_tutorial", WANDB_MODE="online", EPOCHS=100000)
    wait_for_checkpoint(process, tmp_path)
    server.stop_run(next(run_id for run_id, run in server.runs.items() if run["name"] == "fold-1"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped by SIGINT." in errors and "Traceback" not in errors
    assert_rows_of_saved_epochs(server, tmp_path)


def assert_rows_of_saved_epochs(server: WandbServer, tmp_path: Path) -> None:
    """Check that nearly every saved epoch was sent; the stop can come between saving and sending an epoch."""
    saved = saved_epochs(tmp_path / "runs")
    sent = sum(len(run["history"]) for run in server.runs.values())
    assert saved - 3 <= sent <= saved
