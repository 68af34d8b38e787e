"""Device, precision, threads and workers of a run, resolved from the settings on this machine."""

from dataclasses import dataclass

import joblib
import torch

from experiment.settings import TrainingConfig, device_available


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
    """Return what the fits of a configuration are trained with on this machine.

    The number of threads can change the last bits of a result, so it does not depend on WORKERS. Workers × threads
    never exceeds the number of cores; on a GPU one fit is trained at a time.
    """
    device = config.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if device_available(name))
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if _bfloat16_is_faster(device) else "float32"

    fits = config.folds + 1
    cores = joblib.cpu_count()  # cores that this process may use: fewer than the machine has, in a container
    threads = max(1, cores // min(cores, fits))
    workers = 1
    if device == "cpu":
        workers = min(fits, cores // threads)
        if config.workers != "auto":
            workers = min(workers, int(config.workers))
    return Resources(device, precision, threads, workers)


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
