"""One epoch: the loops, `run_epoch`, seeds and random generators, and how errors reach another process."""

import copy
import ctypes
import io
import math
import pickle
import platform
import random
import re
import resource
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, Configure, make_fit
from torch import Tensor, nn

import main_tutorial
import train_utils
from data_files import cached_dataset, load_dataset
from data_utils import Batches, pixel_statistics, split
from experiment.prepare import make_fits
from experiment.resources import resolve_resources
from experiment.settings import TrainingConfig
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import (
    CloudpickledFactory,
    RemoteError,
    State,
    call_safely,
    epoch_seed,
    evaluation_batch_size,
    isolated_rng,
    run_epoch,
    seed_generators,
    test_loop,
    train_fit,
    train_loop,
)

CPU = torch.device("cpu")


def make_batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of random images and labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in sizes
    ]


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def assert_same_state(one: State, other: State) -> None:
    """Compare parameters, moments and schedule to the bit."""
    assert_same_tensors(one["model"], other["model"])
    for number, moments in one["optimizer"]["state"].items():
        assert_same_tensors(moments, other["optimizer"]["state"][number])
    assert one["scheduler"] == other["scheduler"]


# --- The loops ---


def test_train_loop_returns_the_means_per_sample_of_uneven_batches() -> None:
    batches, model, loss_fn = make_batches([64, 64, 7]), NeuralNetwork(), nn.CrossEntropyLoss()
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    loss, accuracy = train_loop(batches, model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_test_loop_returns_loss_labels_and_probabilities() -> None:
    batches, model, loss_fn = make_batches([64, 5]), ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    loss, labels, probabilities = test_loop(batches, model, loss_fn)
    with torch.no_grad():
        logits = model.eval()(torch.cat([images for images, _ in batches]))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))
    torch.testing.assert_close(probabilities, logits.softmax(1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_with_mirror_the_probabilities_of_image_and_mirror_image_are_averaged(precision: torch.dtype) -> None:
    batches, model, loss_fn = make_batches([64, 5]), ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    mirrored_batches = [(images.flip(-1), labels) for images, labels in batches]
    loss, labels, probabilities = test_loop(batches, model, loss_fn, precision, mirror=True)
    plain = test_loop(batches, model, loss_fn, precision)[2]
    mirrored = test_loop(mirrored_batches, model, loss_fn, precision)[2]
    torch.testing.assert_close(probabilities, (plain + mirrored) / 2)
    assert not torch.allclose(probabilities, plain)
    assert loss == pytest.approx(nn.NLLLoss()(probabilities.log(), labels).item(), rel=1e-5)


# --- One epoch ---


@pytest.mark.parametrize("change", [{}, {"MIRROR": True}, {"PRECISION": "bfloat16"}, {"LEARNING_RATE": 0.01}])
def test_run_epoch_computes_what_its_steps_compute_one_by_one(change: dict[str, Any]) -> None:
    fit = make_fit(EPOCHS=1, **change)
    state, metrics = run_epoch(fit, 1, None)
    part = split(cached_dataset(fit.dataset, DATA_DIR, fit.data_digest), fit.held_out_mask)[0]
    mean, std = pixel_statistics(part.images, part.rows)
    losses, correct = [], 0
    with isolated_rng(fit.threads, epoch_seed(fit, 1), CPU):
        batches = Batches(*part, fit.batch_size, mean, std, CPU, training=True, mirror=fit.mirror)
        model = NeuralNetwork()
        seed_generators(epoch_seed(fit, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=fit.learning_rate, fused=True)
        for batch, targets in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=fit.precision == "bfloat16"):
                logits = model(batch)
            loss = nn.CrossEntropyLoss()(logits.float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item()] * len(targets)
            correct += int((logits.argmax(1) == targets).sum())
    assert_same_tensors(dict(model.state_dict()), state["model"])
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["train/accuracy"] == correct / len(losses)


@pytest.mark.parametrize("name", ["fold-1", "final"])
def test_with_mirror_a_fit_is_evaluated_on_mirror_images_too(name: str) -> None:
    fit = make_fit(name=name, MIRROR=True, EPOCHS=1)
    state, metrics = run_epoch(fit, 1, None)
    training_part, evaluation_part = split(cached_dataset(fit.dataset, DATA_DIR, fit.data_digest), fit.held_out_mask)
    model = NeuralNetwork()
    model.load_state_dict(state["model"])
    batches = Batches(*evaluation_part, 256, *pixel_statistics(training_part.images, training_part.rows), CPU)
    loss, labels, probabilities = test_loop(batches, model, nn.CrossEntropyLoss(), mirror=True)
    assert metrics["evaluation"][0] == loss
    assert torch.equal(metrics["evaluation"][1], labels)
    assert torch.equal(metrics["evaluation"][2], probabilities)
    if name != "final":
        assert metrics["validation/loss"] == loss


@pytest.mark.parametrize(
    ("name", "validation"), [("fold-1", ["validation/accuracy", "validation/loss"]), ("final", [])]
)
def test_metrics_have_their_logged_names(name: str, validation: list[str]) -> None:
    fit = make_fit(name=name, EPOCHS=2)
    state, first = run_epoch(fit, 1, None)
    _, last = run_epoch(fit, 2, state)
    assert sorted(first) == ["epoch", "learning_rate", "train/accuracy", "train/loss", *validation]
    assert sorted(last) == sorted([*first, "evaluation"])
    assert (first["epoch"], last["epoch"]) == (1, 2)


def test_validation_accuracy_is_the_share_of_correct_predictions() -> None:
    _, metrics = run_epoch(make_fit(EPOCHS=1), 1, None)
    _, labels, probabilities = metrics["evaluation"]
    correct = sum(int(label == row.argmax()) for label, row in zip(labels, probabilities, strict=True))
    assert metrics["validation/accuracy"] == correct / len(labels) > 0.5


def test_run_epoch_does_not_change_its_state_argument() -> None:
    fit = make_fit(EPOCHS=2)
    state, _ = run_epoch(fit, 1, None)
    before = copy.deepcopy(state)
    first, first_metrics = run_epoch(fit, 2, state)
    assert_same_state(before, state)
    second, second_metrics = run_epoch(fit, 2, state)
    assert_same_state(first, second)
    assert first_metrics["train/loss"] == second_metrics["train/loss"]


@pytest.mark.parametrize("change", [{"LR_SCHEDULE": "cosine"}, {"LR_SCHEDULE": "one_cycle"}, {"MIRROR": True}])
def test_fit_resumes_from_a_saved_state_with_the_same_bits(change: dict[str, Any]) -> None:
    fit = make_fit(EPOCHS=3, **change)
    expected, history = train_fit(fit)
    saved = io.BytesIO()
    torch.save(run_epoch(fit, 1, None)[0], saved)
    saved.seek(0)
    resumed = torch.load(saved, weights_only=True)
    for epoch in (2, 3):
        resumed, metrics = run_epoch(fit, epoch, resumed)
    assert_same_state(resumed, expected)
    assert metrics["train/loss"] == history[-1]["train/loss"]


class SignSGD(torch.optim.Optimizer):
    """A hand-written optimizer: its state has numbers, a list and None, too."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, history=[], largest=None, mean=torch.zeros_like(parameter))
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 / state["step"])
                parameter -= group["lr"] * state["mean"].sign()


@pytest.mark.parametrize("optimizer", [SignSGD, torch.optim.SGD, torch.optim.Adafactor])
def test_fit_with_another_optimizer_resumes_with_the_same_bits(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train_utils, "make_optimizer", lambda model, learning_rate: optimizer(model.parameters(), learning_rate)
    )
    fit = make_fit(EPOCHS=2)
    expected, _ = train_fit(fit)
    saved = io.BytesIO()
    torch.save(run_epoch(fit, 1, None)[0], saved)
    saved.seek(0)
    resumed, _ = run_epoch(fit, 2, torch.load(saved, weights_only=True))
    assert_same_tensors(resumed["model"], expected["model"])


def reversed_strides(tensor: Tensor) -> Tensor:
    """Return the same values at every second place in memory, with the axes in reverse order."""
    reversed_axes = tensor.permute(*range(tensor.dim() - 1, -1, -1))
    memory = torch.full([*reversed_axes.shape[:-1], 2 * reversed_axes.shape[-1]], float("nan"), dtype=tensor.dtype)
    strided = memory[..., ::2]
    strided.copy_(reversed_axes)
    return strided.permute(*range(tensor.dim() - 1, -1, -1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(memory_format=torch.contiguous_format),
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "strided": reversed_strides,
}


@pytest.fixture(scope="module")
def first_states() -> dict[type, State]:
    """Return the states of both networks after their first epoch."""
    classes = (NeuralNetwork, ConvolutionalNeuralNetwork)
    return {each: run_epoch(make_fit(each, BATCH_SIZE=256), 1, None)[0] for each in classes}


@pytest.mark.parametrize(
    ("model_class", "layout"),
    [(NeuralNetwork, "strided"), *((ConvolutionalNeuralNetwork, layout) for layout in LAYOUTS)],
)
def test_memory_layout_of_the_state_changes_no_bit(
    model_class: type[nn.Module], layout: str, first_states: dict[type, State]
) -> None:
    fit, state = make_fit(model_class, BATCH_SIZE=256), first_states[model_class]
    other = copy.deepcopy(state)
    for tensors in (other["model"], *other["optimizer"]["state"].values()):
        for name, tensor in tensors.items():
            if tensor.dim() == 4 or (tensor.dim() > 0 and layout == "strided"):
                tensors[name] = LAYOUTS[layout](tensor)
    (expected, expected_metrics), (actual, metrics) = run_epoch(fit, 2, state), run_epoch(fit, 2, other)
    assert_same_state(expected, actual)
    for name in ("validation/loss", "validation/accuracy", "train/loss", "train/accuracy"):
        assert metrics[name] == expected_metrics[name]


def learning_rates(schedule: str, epochs: int) -> list[float]:
    """Return the learning rate at the start of each epoch, with a peak of 2e-3, and that after the last."""
    state, history = train_fit(make_fit(LR_SCHEDULE=schedule, LEARNING_RATE=2e-3, EPOCHS=epochs, BATCH_SIZE=256))
    return [*(metrics["learning_rate"] for metrics in history), state["optimizer"]["param_groups"][0]["lr"]]


def test_constant_schedule_does_not_change_the_learning_rate() -> None:
    assert learning_rates("constant", 2) == [2e-3] * 3


def test_cosine_schedule_falls_to_zero_over_all_epochs() -> None:
    expected = [1e-3 * (1 + math.cos(math.pi * part)) for part in (0, 1 / 4, 1 / 2, 3 / 4, 1)]
    assert learning_rates("cosine", 4) == pytest.approx(expected, abs=1e-9)


def test_one_cycle_schedule_rises_to_the_learning_rate_and_falls_to_almost_zero() -> None:
    rates = learning_rates("one_cycle", 10)[:-1]  # no step uses the last one
    assert rates[0] == pytest.approx(2e-3 / 25) and rates[-1] < 2e-3 / 25
    assert max(rates) == rates[3] == pytest.approx(2e-3, rel=0.02)  # after three tenths of the steps
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)


def count_new_pages(libc: ctypes.CDLL) -> int:
    """Write to 300 MB of memory and free it; return how many of its pages the system had to provide."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(30 * 2**20)) for _ in range(10)]  # the size of a large activation
    for block in blocks:
        libc.memset(block, 1, 30 * 2**20)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_freed_memory_is_kept_for_the_next_batches() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    for number in (-1, -3):  # glibc's defaults, which an earlier test may have changed
        libc.mallopt(number, 128 * 1024)
    run_epoch(make_fit(name="final"), 1, None)
    count_new_pages(libc)
    assert count_new_pages(libc) < 1000  # of 76,800


# --- All epochs ---


def test_train_fit_gives_the_bits_of_run_epoch_in_a_loop() -> None:
    fit = make_fit(EPOCHS=2)
    first, first_metrics = run_epoch(fit, 1, None)
    second, second_metrics = run_epoch(fit, 2, first)
    state, history = train_fit(fit)
    assert_same_state(state, second)
    assert history[0] == first_metrics
    assert history[1]["validation/loss"] == second_metrics["validation/loss"]
    assert torch.equal(history[1]["evaluation"][2], second_metrics["evaluation"][2])


def test_train_fit_gives_the_bits_of_a_whole_run(configure: Configure) -> None:
    script = configure(main_tutorial, PRECISION="float32")
    result = script.main()
    config = TrainingConfig.from_constants(vars(script))
    dataset = load_dataset("Digits", DATA_DIR)
    final, fold, _ = make_fits(config, resolve_resources(config), NeuralNetwork, dataset)
    assert_same_tensors(train_fit(final)[0]["model"], torch.load(result.run_dir / "model.pt"))
    history = train_fit(fold)[1]
    assert history[-1].pop("evaluation")[0] == result.folds[0].loss
    assert history == result.folds[0].history


# --- Seeds and random generators ---


def test_each_fit_and_epoch_has_its_own_seed() -> None:
    fits = [make_fit(name=name, FOLDS=5) for name in ("final", *(f"fold-{number}" for number in range(1, 6)))]
    seeds = set()
    for fit in fits:
        for rng_seed in (0, 1):
            seeds |= {epoch_seed(replace(fit, rng_seed=rng_seed), epoch) for epoch in (1, 2)}
    assert len(seeds) == 6 * 2 * 2
    assert 2**62 < max(seeds) < 2**64  # 64 bits: two of a thousand seeds are not equal by chance


def test_seed_depends_only_on_rng_seed_fit_number_and_epoch() -> None:
    fold = make_fit(name="fold-1", RNG_SEED=7)
    other = make_fit(ConvolutionalNeuralNetwork, name="fold-1", RNG_SEED=7, LEARNING_RATE=0.1, EPOCHS=9, MIRROR=True)
    assert epoch_seed(fold, 2) == epoch_seed(other, 2)


def test_folds_start_from_different_parameters_and_a_fold_always_from_the_same() -> None:
    first, again, second = (
        run_epoch(make_fit(name=name, LEARNING_RATE=1e-12, EPOCHS=1), 1, None)[0]["model"]["linear_relu_stack.0.weight"]
        for name in ("fold-1", "fold-1", "fold-2")
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, atol=1e-3)


class Noisy(NeuralNetwork):
    """Uses random numbers of torch, numpy and Python."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, with noise."""
        noise = np.random.rand() + random.random() + torch.rand(1).item()
        return super().forward(images) * (1 + noise if self.training else 1)


def test_random_numbers_drawn_before_do_not_change_an_epoch() -> None:
    fit = make_fit(Noisy)
    _, first = run_epoch(fit, 1, None)
    np.random.rand()
    random.random()
    torch.rand(1)
    _, second = run_epoch(fit, 1, None)
    assert first["train/loss"] == second["train/loss"]


@pytest.mark.parametrize("threads", [1, 2])
def test_run_epoch_restores_threads_and_random_generators(threads: int) -> None:
    def process_state() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()
        return torch.get_num_threads(), torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()

    torch.set_num_threads(threads)
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    before = process_state()
    run_epoch(make_fit(Noisy), 1, None)
    assert process_state() == before
    assert before[0] == threads


# --- How a call and its outcome reach another process ---


def test_call_safely_returns_an_exception_as_a_value() -> None:
    outcome = call_safely(int, "x")
    assert isinstance(outcome, RemoteError) and isinstance(outcome.error, ValueError)
    assert call_safely(int, "3") == 3


def test_remote_error_names_the_lines_where_it_was_raised() -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "as planned", "missing")

    error = pickle.loads(pickle.dumps(call_safely(fail))).error
    assert isinstance(error, FileNotFoundError) and error.filename == "missing"
    heading, *lines = error.__notes__[0].splitlines()
    assert heading == "In a worker process, most recent call last:" and lines[0].startswith('  File "')
    assert re.fullmatch(f'  File "{re.escape(__file__)}", line \\d+, in fail', lines[-2])
    assert lines[-1] == '    raise FileNotFoundError(2, "as planned", "missing")'


@pytest.mark.parametrize("note", [None, "with a note"])
def test_exception_that_cannot_be_pickled_is_sent_as_its_message(note: str | None) -> None:
    class LocalError(Exception):
        pass

    def fail() -> None:
        error = LocalError("as planned")
        if note:
            error.add_note(note)
        raise error

    error = pickle.loads(pickle.dumps(call_safely(fail))).error
    assert type(error) is RuntimeError
    assert str(error).endswith(f".LocalError: as planned\n{note}" if note else ".LocalError: as planned")


def test_sys_exit_in_a_network_is_an_error_with_its_line() -> None:
    outcome = call_safely(sys.exit, 3)
    assert isinstance(outcome, RemoteError) and str(outcome.error) == "the network called sys.exit(3)"
    assert traceback.extract_tb(outcome.error.__traceback__)


def test_cloudpickled_factory_unpickles_and_calls() -> None:
    assert CloudpickledFactory(pickle.dumps(NeuralNetwork))().state_dict().keys() == NeuralNetwork().state_dict().keys()


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 28, 28), 256), ((3, 32, 32), 256), ((3, 96, 96), 37), ((3, 224, 224), 32)]
)
def test_fewer_large_images_are_evaluated_at_a_time(shape: tuple[int, int, int], size: int) -> None:
    assert evaluation_batch_size(shape) == size
