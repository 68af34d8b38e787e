"""Device, precision, threads and workers of a run on this machine."""

from typing import Any

import pytest
import torch

import main_tutorial
from experiment import resources
from experiment.errors import ConfigurationError
from experiment.resources import Resources, device_available, resolve_resources
from experiment.settings import TrainingConfig


def resolve(**constants: Any) -> Resources:
    return resolve_resources(TrainingConfig.from_constants(vars(main_tutorial) | constants))


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Core i7", "avx2": True}, "float32"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "sve_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "neon": True}, "float32"),
    ],
)
def test_auto_precision_is_bfloat16_if_the_processor_is_faster_in_it(
    features: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert resolve(PRECISION="auto").precision == precision


def test_auto_precision_is_float32_if_pytorch_has_no_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC", "avx512_bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve(PRECISION="auto").precision == "float32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_precision_is_bfloat16_on_a_gpu_from_ampere_on(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"cuda:0": (1, 0), "cuda:1": capability}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert resolve(DEVICE="cuda:1", PRECISION="auto").precision == precision


@pytest.mark.parametrize("cores", [1, 2, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("workers", ["auto", 1, 2, 100])
def test_workers_times_threads_never_exceed_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int | str
) -> None:
    monkeypatch.setattr(resources.joblib, "cpu_count", lambda: cores)
    resolved = resolve(FOLDS=5, WORKERS=workers)
    assert resolved.threads == max(1, cores // min(cores, 6))
    assert 1 <= resolved.workers <= 6 and resolved.workers * resolved.threads <= cores
    assert workers != "auto" or resolved.workers == min(cores, 6)


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("folds", [2, 10])
def test_threads_do_not_depend_on_workers(monkeypatch: pytest.MonkeyPatch, cores: int, folds: int) -> None:
    monkeypatch.setattr(resources.joblib, "cpu_count", lambda: cores)
    assert len({resolve(FOLDS=folds, WORKERS=workers).threads for workers in ("auto", 1, 2, 3, 100)}) == 1


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_there_are_no_more_workers_than_fits(monkeypatch: pytest.MonkeyPatch, folds: int) -> None:
    monkeypatch.setattr(resources.joblib, "cpu_count", lambda: 16)
    assert resolve(FOLDS=folds, WORKERS=100).workers <= folds + 1


def test_the_environment_can_limit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert (resolve().threads, resolve().workers) == (1, 1)


def test_a_gpu_trains_one_fit_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.joblib, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve(DEVICE="cuda", PRECISION="float32").workers == 1


def test_auto_device_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve(DEVICE="auto").device == "cpu"


def test_auto_device_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve(DEVICE="auto", PRECISION="float32").device == "cuda"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", "cuda:2", "mps"])
def test_a_device_is_available_if_the_machine_has_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_available(device) == (device != "cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert not device_available(device)


def test_an_unavailable_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match="DEVICE must be a device of the machine that trains, got 'cuda'"):
        resolve(DEVICE="cuda")
