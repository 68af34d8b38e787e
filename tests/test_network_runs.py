"""Whole runs with networks that are uncommon or wrong: what is said, with which status, and what is left."""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Configure, slow
from test_network import Growing
from torch import Tensor, nn

import main_cnn
import main_tutorial
from models import ConvolutionalNeuralNetwork, NeuralNetwork


def needing(what: Any) -> type[nn.Module]:
    """Return a network that needs something of this process."""

    class Needing(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            assert what is not None
            return super().forward(images)

    return Needing


@pytest.mark.parametrize("kind", ["a lock", *slow("an open file")])
def test_what_cannot_be_sent_ends_with_one_line_and_status_2_before_anything_starts(
    kind: str, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(os.devnull, "w") as file, pytest.raises(SystemExit) as stop:
        network = needing(threading.Lock() if kind == "a lock" else file)
        configure(main_tutorial, NeuralNetwork=network, WORKERS=2, WANDB_MODE="offline").main()
    output, errors = capsys.readouterr()
    assert stop.value.code == 2 and output == ""
    assert errors.startswith("Bad configuration:\n  the network cannot be sent to other processes: ")
    assert len(errors.splitlines()) == 2 and not (tmp_path / "runs").exists()


def test_with_one_worker_nothing_is_sent_so_a_lock_does_no_harm(configure: Configure) -> None:
    assert configure(main_tutorial, NeuralNetwork=needing(threading.Lock()), EPOCHS=1).main().final is not None


def test_a_network_that_is_another_one_in_a_worker_ends_with_one_line_and_status_2_before_anything_starts(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = os.getpid()

    class Elsewhere(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1 if os.getpid() == here else 2)

    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, NeuralNetwork=Elsewhere, WORKERS=2, WANDB_MODE="offline").main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 2
    assert "Elsewhere is another network in the process that would train it" in errors
    assert not (tmp_path / "runs").exists()


def test_a_network_that_cannot_be_built_in_a_worker_ends_with_one_line_and_status_2(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = os.getpid()

    class Missing(NeuralNetwork):
        def __init__(self) -> None:
            super().__init__()
            if os.getpid() != here:
                raise FileNotFoundError("weights.txt")

    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, NeuralNetwork=Missing, WORKERS=2).main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 2
    assert "Missing works here, but not in the process that would train it: FileNotFoundError: weights.txt" in errors


class Misbehaving(NeuralNetwork):
    """Works in the trial, with its few images, and not in training."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or raise."""
        if len(images) > 8:
            raise OSError("as planned")
        return super().forward(images)


class SlowlyMisbehaving(Misbehaving):
    """Takes its time before it fails, so that nobody can have computed much meanwhile."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or raise."""
        if len(images) > 8:
            time.sleep(1)
        return super().forward(images)


class Leaving(NeuralNetwork):
    """Ends its process in training."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, or exit."""
        if len(images) > 8:
            sys.exit("as planned")
        return super().forward(images)


def make_executor(kind: str) -> Executor:
    if kind == "threads":
        return ThreadPoolExecutor(2)
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize(
    ("network", "kind", "workers"),
    [
        (Misbehaving, OSError, 1),
        (Leaving, RuntimeError, 2),
        *slow((Misbehaving, OSError, 2), (Leaving, RuntimeError, 1)),
    ],
)
def test_what_a_network_raises_in_training_is_shown_with_its_line(
    network: type[nn.Module],
    kind: type[Exception],
    workers: int,
    configure: Configure,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(kind, match="as planned") as error:
        configure(main_tutorial, NeuralNetwork=network, WORKERS=workers).main()
    shown = "".join(traceback.format_exception(error.value))
    assert 'raise OSError("as planned")' in shown or 'sys.exit("as planned")' in shown
    assert "killed" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["threads", *slow("processes")])
def test_what_a_network_raises_in_an_executor_that_was_handed_over_is_shown_with_its_line(
    kind: str, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_executor(kind) as executor, pytest.raises(OSError, match="as planned") as error:
        configure(main_tutorial, NeuralNetwork=Misbehaving).main(executor=executor)
    assert 'raise OSError("as planned")' in "".join(traceback.format_exception(error.value))
    assert "lost an epoch" not in capsys.readouterr().err


def test_after_an_error_the_epochs_that_wait_in_an_executor_are_cancelled(configure: Configure) -> None:
    futures = []

    class Recording(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **keywords: Any) -> Any:
            futures.append(super().submit(*arguments, **keywords))
            return futures[-1]

    with Recording(1) as executor, pytest.raises(OSError, match="as planned"):
        configure(main_tutorial, NeuralNetwork=SlowlyMisbehaving, FOLDS=5).main(executor=executor)
    assert len(futures) == 1 + 6  # the trial, and a first epoch of each fit
    assert sum(future.cancelled() for future in futures) >= 4


@pytest.mark.parametrize("workers", [1, *slow(2)])
def test_a_run_leaves_threads_and_generators_as_they_were(workers: int, configure: Configure) -> None:
    torch.manual_seed(5)
    np.random.seed(6)
    torch.set_num_threads(2)
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads())  # type: ignore[index]
    configure(main_tutorial, EPOCHS=1, WORKERS=workers).main()
    after = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_num_threads())  # type: ignore[index]
    assert after == before


def test_what_could_not_go_on_in_the_second_epoch_is_one_line_and_status_2_at_once(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        configure(main_tutorial, NeuralNetwork=Growing).main()
    output, errors = capsys.readouterr()
    assert stop.value.code == 2 and output == "" and not (tmp_path / "runs").exists()
    assert len(errors.splitlines()) == 2 and "\x1b" not in errors


class LazyInTraining(NeuralNetwork):
    """Has a lazy layer that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits = super().forward(images)
        return logits + self.helper(images.flatten(1)) if self.training else logits


class Hooked(ConvolutionalNeuralNetwork):
    """Looks at what comes out of the ReLU in front of a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stack[2].register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("network", [LazyInTraining, *slow(Hooked)])
def test_an_uncommon_network_trains(network: type[nn.Module], configure: Configure) -> None:
    script = configure(main_cnn, ConvolutionalNeuralNetwork=network, FOLDS=2, EPOCHS=2, BATCH_SIZE=256)
    assert script.main().final.accuracy > 0.15
