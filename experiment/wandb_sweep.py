"""Weights & Biases' sweeps: the parameters that ``wandb agent`` passes to this program as one trial of a sweep.

W&B would give all K + 1 runs the id of the agent's run. So the sweep's variables are removed from the environment, and
the sweep is passed to the final run only.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sweep:
    """The sweep that an experiment is a trial of, and the id that the agent chose for the trial's run."""

    sweep_id: str
    run_id: str


def sweep_parameters() -> dict[str, Any]:
    """Return the settings of a trial, from the file that the agent wrote; an empty dict outside a sweep."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path:
        return {}
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return {name: entry["value"] for name, entry in entries.items() if name != "wandb_version"}


def pop_sweep_env() -> Sweep | None:
    """Return the sweep that an agent put into the environment, and remove it from there; None outside a sweep.

    It is not restored: a trial is one experiment, and a second one in the same process does not belong to the sweep.
    """
    if "WANDB_SWEEP_ID" not in os.environ or "WANDB_RUN_ID" not in os.environ:
        return None
    os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)
    return Sweep(os.environ.pop("WANDB_SWEEP_ID"), os.environ.pop("WANDB_RUN_ID"))
