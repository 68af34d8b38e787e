"""Sweeps, with W&B's own CLIs, agents and search engine: what they ask of a run, get of it, and how they stop it."""

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
from conftest import KEY, REPOSITORY, Configure, make_fit, saved_epochs
from torch import Tensor, nn
from wandb_server import WandbServer

import main_cnn
import main_tutorial
from experiment.settings import TrainingConfig
from models import NeuralNetwork
from train_utils import seed_of

METRIC = "cross_validation/accuracy_mean"
PARAMETERS: dict[str, Any] = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 0.0003, "max": 0.003},
    "lr_schedule": {"values": ["constant", "cosine", "one_cycle"]},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with WandbServer(KEY) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # an activated environment
        yield server


@pytest.fixture
def start_agent(server: WandbServer, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that registers a sweep of small runs with ``wandb sweep`` and starts an agent for it."""

    def start_agent(agent: str = "command", **changes: Any) -> subprocess.Popen[str]:
        fixed = {"dataset": "Digits", "folds": 2, "epochs": 2, "runs_dir": str(tmp_path / "runs")}
        parameters = {name: {"value": value} for name, value in fixed.items()} | changes.pop("parameters", PARAMETERS)
        config = {
            "program": str(REPOSITORY / "main_tutorial.py"),
            "project": "the-sweeps-own",
            "method": "bayes",
            "metric": {"name": METRIC, "goal": "maximize"},
            "parameters": parameters,
        }
        count = changes.pop("count", 2)
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config | changes))
        sweep = register(tmp_path / "sweep.yaml")
        command = ["wandb", "agent", "--count", str(count), sweep]
        if agent == "function":
            how = f"function=main_tutorial.main, count={count}, max_consecutive_failed_runs=1"
            command = [sys.executable, "-c", f"import wandb, main_tutorial; wandb.agent({sweep!r}, {how})"]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start_agent


@pytest.fixture
def trial(
    configure: Configure, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ModuleType]:
    """Return a function that makes this process a trial as an agent does; it returns the script."""

    def trial(**parameters: Any) -> ModuleType:
        entries = {"wandb_version": 1} | {name: {"value": value} for name, value in parameters.items()}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(entries))
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep-id")
        monkeypatch.setenv("WANDB_RUN_ID", "run-id")
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "config.yaml"))
        return configure(main_tutorial, WANDB_MODE="auto")

    return trial


def register(sweep_file: Path) -> str:
    """Run ``wandb sweep``; return what it says is to be given to ``wandb agent``."""
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


def means(results: dict[str, Any]) -> list[float]:
    """Return the mean over the folds after each epoch."""
    epochs = zip(*(fold["history"] for fold in results["folds"]), strict=True)
    return [statistics.fmean(row["validation/accuracy"] for row in epoch) for epoch in epochs]


def assert_is_a_trial(server: WandbServer, run_id: str, parameters: dict[str, Any], runs_dir: Path) -> None:
    """Compare what the server holds of a trial with the agent's orders and with what lies on disk."""
    final = server.runs[run_id]
    results = json.loads((runs_dir / final["group"] / "results.json").read_text())
    runs = {run["name"]: run for run in server.runs.values() if run["group"] == final["group"]}
    assert set(runs) == {"final", "fold-1", "fold-2"} and runs["final"] is final
    for name, run in runs.items():
        assert (run["job_type"], run["project"]) == (name.split("-")[0], "the-sweeps-own")
        assert {name: run["config"][name] for name in parameters} == parameters
        assert run["exit_code"] == 0
    assert [run.get("sweep") is None for run in runs.values()] == [run is not final for run in runs.values()]
    assert final["summary"][METRIC] == results["cross_validation"]["accuracy_mean"]
    assert [(row["_step"], row[METRIC]) for row in final["history"]] == list(enumerate(means(results), start=1))
    assert final["summary"][METRIC] == means(results)[-1]


@pytest.mark.slow
def test_a_sweep_searches_by_the_mean_over_the_folds(
    start_agent: Callable[..., subprocess.Popen[str]], server: WandbServer, tmp_path: Path
) -> None:
    finish(start_agent())
    ((sweep_id, sweep),) = server.sweeps.items()
    first, second = sweep["trials"]
    best = max(means(json.loads((tmp_path / "runs" / server.runs[first]["group"] / "results.json").read_text())))
    engine = sweep["trials"][second].search_info
    assert (engine["predicted_value"], engine["warnings"]) == (-best, "")  # after one trial, it expects the same again
    assert [run_id for run_id, run in server.runs.items() if run["sweep"] == sweep_id] == list(sweep["trials"])
    assert len(server.runs) == 2 * 3
    for run_id, trial in sweep["trials"].items():
        parameters = {name: entry["value"] for name, entry in trial.config.items()}
        assert_is_a_trial(server, run_id, parameters, tmp_path / "runs")


def test_wandb_accepts_the_repositorys_sweep_and_the_program_all_that_it_can_suggest(server: WandbServer) -> None:
    register(REPOSITORY / "sweep.yaml")
    ((_, sweep),) = server.sweeps.items()
    assert sweep["warnings"] == [] and sweep["project"] == main_cnn.WANDB_PROJECT_NAME
    config = sweep["config"]
    assert (REPOSITORY / config["program"]).is_file()
    assert config["metric"] == {"name": METRIC, "goal": "maximize"}
    for _ in range(20):
        suggested = sweeps.next_run(config, [], validate=True).config
        constants = {name.upper(): entry["value"] for name, entry in suggested.items()}
        assert constants.keys() <= vars(main_cnn).keys()
        TrainingConfig.from_constants(vars(main_cnn) | constants)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"epochs": 0, "learning_rate": "1e-4"}, ["EPOCHS must be", "LEARNING_RATE must be", "got '1e-4'"]),
        ({"epoch": 3}, ["EPOCH is no setting"]),
        ({"wandb_mode": "offline"}, ['a sweep needs W&B\'s server, but WANDB_MODE is "offline"']),
    ],
)
def test_a_trial_that_cannot_be_is_a_configuration_error(
    parameters: dict[str, Any],
    says: list[str],
    trial: Callable[..., ModuleType],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        trial(**parameters).main()
    errors = capfd.readouterr().err
    assert stop.value.code == 2
    assert all(text in errors for text in says) and len(errors.splitlines()) == 1 + len(parameters)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("status", "says"), [(2, "no API key is in"), (2, "refuses the API key"), (1, "does not answer as it should")]
)
def test_a_trial_without_a_server_ends_before_it_starts(
    status: int,
    says: str,
    trial: Callable[..., ModuleType],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if says.startswith("no"):
        monkeypatch.delenv("WANDB_API_KEY")
    elif says.startswith("refuses"):
        server.key = "another"
    else:
        server.fail()
    with pytest.raises(SystemExit) as stop:
        trial().main()
    errors = capfd.readouterr().err
    assert stop.value.code == status
    assert says in errors and len(errors.splitlines()) == (1 if status == 1 else 2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_agents_parameters_win_over_constants_and_reach_one_experiment(
    trial: Callable[..., ModuleType], configure: Configure, server: WandbServer
) -> None:
    first = configure(trial(epochs=1, lr_schedule="cosine"), EPOCHS=3, WANDB_MODE="auto").main()
    second = configure(main_tutorial, EPOCHS=1, WANDB_MODE="auto").main()
    assert (first.config["epochs"], first.config["lr_schedule"]) == (1, "cosine")
    assert second.config["lr_schedule"] == "constant"
    assert [(run_id, run["name"]) for run_id, run in server.runs.items() if run["sweep"]] == [("run-id", "final")]


def network_that(does: Callable[[Tensor], Tensor], seed: int) -> type[nn.Module]:
    """Return the tutorial's network, which does something to its answers in the one epoch that has that seed."""

    class NeuralNetworkWithAFault(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return does(logits) if torch.initial_seed() == seed else logits

    return NeuralNetworkWithAFault


def test_where_a_fold_diverged_the_final_run_ends_as_failed(
    trial: Callable[..., ModuleType], server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = seed_of(make_fit(name="fold-3", FOLDS=3), 2)
    network = network_that(lambda logits: logits * math.nan, doomed)
    monkeypatch.setattr(main_tutorial, "NeuralNetwork", network)
    with pytest.raises(SystemExit) as stop:
        trial(folds=3, epochs=3).main()
    assert stop.value.code == 1
    codes = {run["name"]: run["exit_code"] for run in server.runs.values()}
    assert codes == {"final": 1, "fold-1": 0, "fold-2": 0, "fold-3": 1}
    final = server.runs["run-id"]
    assert [METRIC in row for row in final["history"]] == [True, True, False]
    assert final["summary"][METRIC] == final["history"][1][METRIC]


@pytest.mark.slow
def test_a_server_that_goes_away_costs_the_sweep_a_trial_and_nobody_a_result(
    trial: Callable[..., ModuleType],
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def with_the_server_gone(logits: Tensor) -> Tensor:
        server.fail()
        return logits

    network = network_that(with_the_server_gone, seed_of(make_fit(name="fold-1"), 1))
    monkeypatch.setattr(main_tutorial, "NeuralNetwork", network)
    with pytest.raises(SystemExit) as stop:
        trial().main()
    errors = capfd.readouterr().err
    assert stop.value.code == 1
    assert len(re.findall("so the sweep does not get this trial", errors)) == 1 and "Traceback" not in errors
    assert list((tmp_path / "runs").glob("*/results.json"))


@pytest.mark.slow
def test_an_agent_goes_on_after_a_bad_trial(
    start_agent: Callable[..., subprocess.Popen[str]], server: WandbServer, tmp_path: Path
) -> None:
    output = finish(start_agent(method="grid", parameters={"epochs": {"values": [0, 1]}}))
    assert output.count("EPOCHS must be an integer of at least 1, got 0") == 1 and "Traceback" not in output
    assert_is_a_trial(server, list(server.sweeps.popitem()[1]["trials"])[1], {"epochs": 1}, tmp_path / "runs")


@pytest.mark.slow
def test_a_function_agent_runs_main_and_takes_a_failure_for_one(
    start_agent: Callable[..., subprocess.Popen[str]], server: WandbServer, tmp_path: Path
) -> None:
    agent = start_agent("function", method="grid", parameters={"epochs": {"values": [1, 2, 0, 3]}}, count=4)
    output = finish(agent)
    good, also_good, bad = next(iter(server.sweeps.values()))["trials"]  # the agent gives up after one failure
    assert_is_a_trial(server, good, {"epochs": 1}, tmp_path / "runs")
    assert_is_a_trial(server, also_good, {"epochs": 2}, tmp_path / "runs")
    assert bad not in server.runs and "EPOCHS must be an integer of at least 1, got 0" in output


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["command", "function"])
def test_a_trial_that_is_stopped_on_wandbs_page_ends_in_time_and_keeps_its_epochs(
    agent: str, start_agent: Callable[..., subprocess.Popen[str]], server: WandbServer, tmp_path: Path
) -> None:
    process = start_agent(agent, count=1, parameters={"epochs": {"value": 100000}, "rng_seed": {"values": [1, 2]}})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/fold-2.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    (run_id,) = next(iter(server.sweeps.values()))["trials"]
    server.stop_run(run_id)
    stopped = time.monotonic()
    output = finish(process)
    assert time.monotonic() - stopped < 30  # the agent's patience
    assert re.search(r"^Stopped by ", output, re.MULTILINE) and "Traceback" not in output
    assert {run["exit_code"] for run in server.runs.values()} == {1} and len(server.runs) == 3
    assert list((tmp_path / "runs").glob("*/fold-2.pt"))
    saved = saved_epochs(tmp_path / "runs")
    assert saved - 3 <= sum(len(run["history"]) for run in server.runs.values()) <= saved


@pytest.mark.slow
def test_any_run_that_is_stopped_on_wandbs_page_ends_as_ctrl_c_does(
    start_script: Callable[..., subprocess.Popen[str]], server: WandbServer, tmp_path: Path
) -> None:
    process = start_script("main_tutorial", WANDB_MODE="online", EPOCHS=100000)
    while not list((tmp_path / "runs").glob("*/fold-2.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    server.stop_run(next(run_id for run_id, run in server.runs.items() if run["name"] == "fold-1"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped by SIGINT." in errors and "Traceback" not in errors
    rows = sum(len(run["history"]) for run in server.runs.values())
    assert saved_epochs(tmp_path / "runs") - 3 <= rows <= saved_epochs(tmp_path / "runs")
