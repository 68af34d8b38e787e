"""Device, precision, threads and workers of a run, resolved from the settings on this machine."""

import os
from dataclasses import dataclass, replace
from typing import Any

import joblib
import torch

import experiment
from experiment.errors import ConfigurationError
from experiment.settings import TrainingConfig
from experiment.terminal import warn


@dataclass(frozen=True)
class Resources:
    """What the fits of a run are trained with.

    Attributes
    ----------
    device, precision : str
        As PyTorch names them; no longer "auto".
    threads : int
        Threads per fit.
    workers : int
        Fits that are trained at the same time on this machine.
    """

    device: str
    precision: str
    threads: int
    workers: int


def resolve_resources(config: TrainingConfig) -> Resources:
    """Return what the fits of a configuration are trained with, if they are trained in this process or below it.

    The number of threads can change the last bits of a result, so it does not depend on WORKERS. Workers × threads
    never exceeds the number of cores; on a GPU one fit is trained at a time.

    Raises
    ------
    ConfigurationError
        If this machine does not have the device.
    """
    device = config.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if device_available(name))
    if not device_available(device):
        raise ConfigurationError(f"DEVICE must be a device of the machine that trains, got {device!r}")
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if _bfloat16_is_faster(device) else "float32"

    _undo_pinning()
    cores = joblib.cpu_count()  # cores that this process may use: fewer than the machine has, in a container
    threads = max(1, cores // min(cores, config.folds + 1))
    return Resources(device, precision, threads, _count_workers(config, device, threads))


def _count_workers(config: TrainingConfig, device: str, threads: int) -> int:
    if device != "cpu":
        return 1
    workers = min(config.folds + 1, max(1, joblib.cpu_count() // threads))
    return workers if config.workers == "auto" else min(workers, int(config.workers))


def with_kept(resources: Resources, config: TrainingConfig, identity: dict[str, Any]) -> Resources:
    """Return resources with the threads and the precision of a run's identity."""
    threads = identity["threads"]
    workers = _count_workers(config, resources.device, threads)
    return replace(resources, precision=identity["precision"], threads=threads, workers=workers)


def device_available(device: str) -> bool:
    """Return whether this machine has "cpu", "mps", "cuda" or "cuda:N"."""
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    return device != "mps" or torch.backends.mps.is_available()


def _undo_pinning() -> None:
    """Give this process back the cores that it had before torch was imported.

    If OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY is set, importing torch pins the process to one core.
    """
    variables = [name for name in experiment.PINNING_VARIABLES if os.environ.get(name)]
    if not variables or not hasattr(os, "sched_setaffinity"):
        return
    if experiment.INITIAL_CORES is not None:
        os.sched_setaffinity(0, experiment.INITIAL_CORES)
    elif len(os.sched_getaffinity(0)) == 1:
        warn(f"{variables[0]} pins this process to one core. Unset it, or import experiment before torch.")


def _bfloat16_is_faster(device: str) -> bool:
    """Return whether a device trains faster in bfloat16 than in float32 (measured in docs/speed.md)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # no fast code in PyTorch, as on macOS
        return False
    features = torch.cpu.get_capabilities()
    is_intel = str(features.get("cpu_name")).startswith("Intel")  # slower in bfloat16 without AMX
    names_on_x86 = ["amx_bf16"] if is_intel else ["avx512_bf16"]
    names_on_arm = ["bf16", "sve_bf16"]
    return any(features.get(name) for name in names_on_x86 + names_on_arm)
