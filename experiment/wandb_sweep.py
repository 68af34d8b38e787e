"""Weights & Biases' sweeps: what an agent that starts this program wants of it.

W&B would give all K + 1 runs the id of the agent's one run. So the sweep is taken out of W&B's sight, and given to the
final run alone.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sweep:
    """The sweep that an experiment is a trial of, and the id of the one run that belongs to it."""

    sweep_id: str
    run_id: str


def sweep_parameters() -> dict[str, Any]:
    """Return the settings that an agent wants, from the file that it wrote; outside a sweep none."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path:
        return {}
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return {name: entry["value"] for name, entry in entries.items() if name != "wandb_version"}


def take_sweep() -> Sweep | None:
    """Take the sweep out of the environment, where an agent put it; None if there is none.

    It is not put back: a trial is one experiment, and a second one in its process is no part of the sweep. An agent
    that lives in this process (``wandb.agent(function=main)``) sets the variables anew for each trial.
    """
    if "WANDB_SWEEP_ID" not in os.environ or "WANDB_RUN_ID" not in os.environ:
        return None
    sweep = Sweep(os.environ.pop("WANDB_SWEEP_ID"), os.environ.pop("WANDB_RUN_ID"))
    os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)
    if "wandb" in sys.modules:  # as in wandb.agent(function=main), where W&B may have read them already
        _take_from_settings()
    return sweep


def _take_from_settings() -> None:
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings_if_loaded
    if settings is not None:
        settings.sweep_id = settings.run_id = settings.sweep_param_path = None
