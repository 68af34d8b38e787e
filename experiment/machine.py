"""What this machine has: device, precision, cores, and how many fits train side by side on them."""

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import joblib
import torch


def device_is_here(device: str) -> bool:
    """Return whether the machine has "cpu", "mps", "cuda" or "cuda:N"."""
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    return device != "mps" or torch.backends.mps.is_available()


def resolve_device(device: str) -> str:
    """Return the device itself: with "auto", the fastest that is here."""
    if device != "auto":
        return device
    return next(name for name in ("cuda", "mps", "cpu") if device_is_here(name))


def resolve_precision(precision: str, device: str) -> str:
    """Return "float32" or "bfloat16": with "auto", bfloat16 where the device is faster in it."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    elif device == "cpu":
        features = torch.cpu.get_capabilities()
        is_intel = str(features.get("cpu_name")).startswith("Intel")  # which without AMX is slower in it: docs/speed.md
        names = ("amx_bf16" if is_intel else "avx512_bf16", "bf16", "sve_bf16")  # the first is x86's, the others Arm's
        fast = any(features.get(name) for name in names)
        fast = fast and torch.backends.mkldnn.is_available()  # else PyTorch has no fast code for it, as on macOS
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def plan_workers(workers: int | str, fits: int, device: str) -> tuple[int, int]:
    """Return how many threads each fit gets, and how many of the fits run side by side: `workers`, if that many can.

    The threads can change the last bits of a result, so they do not depend on `workers`. Workers × threads never
    exceeds the cores; on a GPU one fit runs at a time.
    """
    cores = joblib.cpu_count()  # those that this process may use: a container may have fewer than the machine
    threads = max(1, cores // min(cores, fits))
    if device != "cpu":
        return threads, 1
    most = min(fits, cores // threads)
    return threads, most if workers == "auto" else min(int(workers), most)


def describe_machine() -> dict[str, Any]:
    """Return what two runs of one configuration may differ in: time, machine and versions."""
    packages = ("torch", "torchvision", "scikit-learn", "wandb", "numpy")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }
