"""What a machine gets: a precision, and how many fits side by side, with how many threads each."""

from typing import Any

import pytest
import torch

from experiment import machine
from experiment.machine import plan_workers, resolve_precision


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Core i7", "avx2": True}, "float32"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "neon": True}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_is_faster_in_it(
    features: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert resolve_precision("auto", "cpu") == precision


@pytest.mark.parametrize("cores", [1, 2, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("workers", ["auto", 1, 2, 100])
def test_workers_times_threads_never_exceed_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int | str
) -> None:
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: cores)
    threads, planned = plan_workers(workers, 6, "cpu")
    assert threads == max(1, cores // min(cores, 6))
    assert 1 <= planned <= 6 and planned * threads <= cores
    assert workers != "auto" or planned == min(cores, 6)


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("folds", [2, 10])
def test_threads_do_not_depend_on_workers(monkeypatch: pytest.MonkeyPatch, cores: int, folds: int) -> None:
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: cores)
    assert len({plan_workers(workers, folds + 1, "cpu")[0] for workers in ("auto", 1, 2, 3, 100)}) == 1


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_no_more_workers_than_fits(monkeypatch: pytest.MonkeyPatch, folds: int) -> None:
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: 16)
    assert plan_workers(100, folds + 1, "cpu")[1] <= folds + 1


def test_the_environment_can_take_cores_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert plan_workers("auto", 6, "cpu") == (1, 1)


def test_a_gpu_gets_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: 16)
    assert plan_workers("auto", 6, "cuda")[1] == 1
