"""One epoch: the loops, `run_epoch`, and that what makes it fast changes no bit."""

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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, make_fit, slow
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils import Batches, cached_dataset, pixel_statistics, split
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import (
    Failure,
    Pickled,
    State,
    attempt,
    build_network,
    run_epoch,
    seed_of,
    test_loop,
    threads_and_seed,
    train_loop,
)

CPU = torch.device("cpu")


def make_batches(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 28, 28, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in sizes
    ]


def test_run_epoch_leaves_the_state_it_is_given_as_it_is() -> None:
    fit = make_fit(EPOCHS=3)
    state, _ = run_epoch(fit, 1, None)
    before = torch.nn.utils.parameters_to_vector(state["model"].values()).clone()
    moments = state["optimizer"]["state"][0]["exp_avg"].clone()
    first, first_metrics = run_epoch(fit, 2, state)
    second, second_metrics = run_epoch(fit, 2, state)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(state["model"].values()))
    assert torch.equal(moments, state["optimizer"]["state"][0]["exp_avg"])
    assert first_metrics == second_metrics
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def new_pages_of_blocks(libc: ctypes.CDLL) -> int:
    """Write on 300 MB of memory, free it; return how many of its pages were new ones of the system's."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(30 * 2**20)) for _ in range(10)]  # a large activation's size
    for block in blocks:
        libc.memset(block, 1, 30 * 2**20)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed memory so eagerly")
def test_memory_that_is_freed_after_an_epoch_began_is_kept_for_the_next_batches() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    for number in (-1, -3):  # as it is where no epoch was trained yet
        libc.mallopt(number, 128 * 1024)
    run_epoch(make_fit(name="final"), 1, None)
    new_pages_of_blocks(libc)
    assert new_pages_of_blocks(libc) < 1000  # it takes 76,800 for these 300 MB if they are new


def learning_rates(schedule: str, epochs: int) -> list[float]:
    """Return the learning rate at the start of each epoch of a fit with a peak of 2e-3, and that after the last."""
    fit, state, rates = make_fit(LR_SCHEDULE=schedule, LEARNING_RATE=2e-3, EPOCHS=epochs, BATCH_SIZE=256), None, []
    for epoch in range(1, epochs + 1):
        state, metrics = run_epoch(fit, epoch, state)
        rates.append(metrics["learning_rate"])
    assert state is not None
    return [*rates, state["optimizer"]["param_groups"][0]["lr"]]


def test_a_constant_learning_rate_stays_as_it_is() -> None:
    assert learning_rates("constant", 2) == [2e-3] * 3


def test_a_cosine_falls_from_the_learning_rate_to_zero_over_all_epochs() -> None:
    assert learning_rates("cosine", 4) == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * part)) for part in (0, 1 / 4, 1 / 2, 3 / 4, 1)], abs=1e-9
    )


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nearly_nothing() -> None:
    *rates, _ = learning_rates("one_cycle", 10)  # what comes after its last step is used by nobody
    assert rates[0] == pytest.approx(2e-3 / 25) and rates[-1] < 2e-3 / 25
    assert max(rates) == rates[3] == pytest.approx(2e-3, rel=0.02)  # after three tenths of the steps
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)


def test_train_loop_returns_the_mean_per_sample_with_uneven_batches() -> None:
    batches, model, loss_fn = make_batches([64, 64, 7]), NeuralNetwork(), nn.CrossEntropyLoss()
    with torch.no_grad():
        logits, labels = torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    loss, accuracy = train_loop(batches, model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_test_loop_returns_loss_labels_and_probabilities() -> None:
    batches, model, loss_fn = make_batches([64, 5]), ConvolutionalNeuralNetwork(), nn.CrossEntropyLoss()
    loss, labels, probabilities = test_loop(batches, model, loss_fn)
    with torch.no_grad():
        logits = model.eval()(torch.cat([x for x, _ in batches]))
    assert loss == pytest.approx(loss_fn(logits, labels).item(), rel=1e-5)
    assert torch.equal(labels, torch.cat([y for _, y in batches]))
    torch.testing.assert_close(probabilities, logits.softmax(1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_with_mirror_images_the_probabilities_of_both_are_averaged(precision: torch.dtype) -> None:
    batches, model = make_batches([64, 5]), ConvolutionalNeuralNetwork()
    loss, labels, probabilities = test_loop(batches, model, nn.CrossEntropyLoss(), precision, mirror=True)
    flipped = [(images.flip(-1), labels) for images, labels in batches]
    alone, other = (test_loop(each, model, nn.CrossEntropyLoss(), precision)[2] for each in (batches, flipped))
    torch.testing.assert_close(probabilities, (alone + other) / 2)
    assert not torch.allclose(probabilities, alone)
    assert loss == pytest.approx(nn.NLLLoss()(probabilities.log(), labels).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["fold-1", "final"])
def test_with_mirror_a_fit_is_evaluated_on_mirror_images_too(name: str) -> None:
    fit = make_fit(name=name, MIRROR=True, EPOCHS=1)
    state, metrics = run_epoch(fit, 1, None)
    train_on, held_out = split(cached_dataset(fit.dataset, DATA_DIR, fit.data_digest), fit.held_out_mask)
    model = NeuralNetwork()
    model.load_state_dict(state["model"])
    batches = Batches(*held_out, 256, *pixel_statistics(train_on[0]), CPU)
    evaluation = test_loop(batches, model, nn.CrossEntropyLoss(), mirror=True)
    assert all(
        torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        for one, other in zip(metrics["evaluation"], evaluation, strict=True)
    )
    if name != "final":
        assert metrics["validation/loss"] == evaluation[0]


@pytest.mark.parametrize("change", [{}, {"MIRROR": True}, {"PRECISION": "bfloat16"}, {"LEARNING_RATE": 0.01}])
def test_an_epoch_is_what_its_steps_give_when_they_are_written_out(change: dict[str, Any]) -> None:
    fit = make_fit(EPOCHS=1, **change)
    state, metrics = run_epoch(fit, 1, None)
    images, labels = split(cached_dataset(fit.dataset, DATA_DIR, fit.data_digest), fit.held_out_mask)[0]
    mean, std = pixel_statistics(images)
    losses, correct = [], 0
    with threads_and_seed(fit.threads, seed_of(fit, 1), CPU):
        batches = Batches(images, labels, fit.batch_size, mean, std, CPU, training=True, mirror=fit.mirror)
        model = NeuralNetwork()
        optimizer = torch.optim.Adam(model.parameters(), lr=fit.learning_rate, fused=True)
        for batch, answers in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=fit.precision == "bfloat16"):
                logits = model(batch)
            loss = nn.CrossEntropyLoss()(logits.float(), answers)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.item()] * len(answers)
            correct += int((logits.argmax(1) == answers).sum())
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    assert metrics["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["train/accuracy"] == correct / len(losses)


def test_the_metrics_of_an_epoch_have_the_names_under_which_they_are_logged() -> None:
    training = ["epoch", "learning_rate", "train/accuracy", "train/loss"]
    for name, of_fit in (("fold-1", ["validation/accuracy", "validation/loss"]), ("final", [])):
        fit = make_fit(name=name, EPOCHS=2)
        state, first = run_epoch(fit, 1, None)
        _, last = run_epoch(fit, 2, state)
        assert sorted(first) == sorted([*training, *of_fit]) and sorted(last) == sorted([*first, "evaluation"])
        assert (first["epoch"], last["epoch"]) == (1, 2)


def test_the_validation_accuracy_is_the_share_of_right_answers() -> None:
    _, metrics = run_epoch(make_fit(EPOCHS=1), 1, None)
    _, labels, probabilities = metrics["evaluation"]
    right = sum(int(label == np.argmax(row)) for label, row in zip(labels, probabilities, strict=True))
    assert metrics["validation/accuracy"] == right / len(labels) > 0.5


@pytest.mark.parametrize("change", [{"LR_SCHEDULE": "cosine"}, {"LR_SCHEDULE": "one_cycle"}, {"MIRROR": True}])
def test_a_fit_goes_on_from_a_saved_state_to_the_bit(change: dict[str, Any]) -> None:
    fit = make_fit(EPOCHS=3, **change)
    state: State | None = None
    saved = io.BytesIO()
    for epoch in (1, 2, 3):
        state, metrics = run_epoch(fit, epoch, state)
        if epoch == 1:
            torch.save(state, saved)
    saved.seek(0)
    resumed = torch.load(saved, weights_only=True)
    for epoch in (2, 3):
        resumed, resumed_metrics = run_epoch(fit, epoch, resumed)
    assert state is not None and metrics["train/loss"] == resumed_metrics["train/loss"]
    assert all(torch.equal(state["model"][name], resumed["model"][name]) for name in state["model"])
    assert state["scheduler"] == resumed["scheduler"]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_pooling_before_relu_gives_the_bits_of_the_listed_order(precision: torch.dtype) -> None:
    outcomes = []
    for listed_order in (False, True):
        torch.manual_seed(0)
        model: nn.Module = ConvolutionalNeuralNetwork().to(memory_format=torch.channels_last)  # as it is trained
        if not listed_order:
            torch.manual_seed(0)
            model = build_network(ConvolutionalNeuralNetwork, CPU)
        images = torch.randn(64, 1, 28, 28)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(images)
        logits.float().square().sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in model.parameters())])
    for ours, listed in zip(*outcomes, strict=True):
        assert torch.equal(ours, listed)


@st.composite
def networks(draw: Any) -> nn.Sequential:
    """Draw a network of layers that a user may well stack, in one Sequential or in Sequentials within it."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layers: list[nn.Module] = []
    channels, size = 1, 28
    for _ in range(draw(st.integers(1, 3))):
        kernel, wider = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([3, 8, 16, 20, 32]))
        padding, stride = draw(st.sampled_from([0, kernel // 2])), draw(st.sampled_from([1, 1, 2]))
        layers.append(nn.Conv2d(channels, wider, kernel, stride, padding, bias=draw(st.booleans())))
        channels = wider
        for kind in draw(
            st.lists(st.sampled_from("norm relu relu inplace max average dropout gelu".split()), max_size=4)
        ):
            size = nn.Sequential(*layers).eval()(torch.zeros(1, 1, 28, 28)).shape[-1]
            if kind in ("max", "average") and size < 4:
                continue
            make: dict[str, Callable[[], nn.Module]] = {
                "norm": partial(nn.BatchNorm2d, channels),
                "relu": nn.ReLU,
                "inplace": lambda: nn.ReLU(inplace=True),
                "max": lambda: nn.MaxPool2d(
                    draw(st.sampled_from([2, 3])),
                    draw(st.sampled_from([None, 1, 2])),
                    draw(st.sampled_from([0, 1])),
                    ceil_mode=draw(st.booleans()),
                ),
                "average": lambda: nn.AvgPool2d(2),
                "dropout": lambda: nn.Dropout(0.3),
                "gelu": nn.GELU,
            }
            layers.append(make[kind]())
        size = nn.Sequential(*layers).eval()(torch.zeros(1, 1, 28, 28)).shape[-1]
        if size < 5:
            break
    features = channels * size * size
    head: list[nn.Module] = [nn.Flatten(), nn.Linear(features, 10)]
    if draw(st.booleans()):
        head[1:] = [nn.Linear(features, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)]
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(layers)))
        return nn.Sequential(nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:]), nn.Sequential(*head))
    return nn.Sequential(*layers, *head)


def logits_and_gradients(network: nn.Module, images: Tensor, precision: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)  # for the dropout
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits = network.train()(images)
    nn.CrossEntropyLoss()(logits.float(), torch.arange(len(images)) % 10).backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [logits, *gradients, *network.buffers()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.sampled_from([2, 7, 64]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_network_of_sequentials_gives_the_bits_of_its_plain_forward(
    network: nn.Sequential, images: int, precision: torch.dtype
) -> None:
    plain = copy.deepcopy(network)
    for parameter in plain.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    built = build_network(lambda: copy.deepcopy(network), CPU)
    batch = torch.randn(images, 1, 28, 28)
    try:
        theirs = logits_and_gradients(plain, batch, precision)
    except RuntimeError:
        reject()  # PyTorch trains no ReLU in place behind another ReLU
    ours = logits_and_gradients(built, batch, precision)
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for each in (built, plain):
        each.eval()
    with torch.no_grad():
        assert torch.equal(built(batch), plain(batch))


@pytest.mark.parametrize("in_place", [nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True)])
@pytest.mark.parametrize("within", [True, False], ids=["in the same Sequential", "behind it"])
def test_what_comes_after_pooling_may_work_in_place(in_place: nn.Module, within: bool) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(676, 10))
    network = nn.Sequential(*stack, in_place, *head) if within else nn.Sequential(stack, in_place, head)
    network = network.to(memory_format=torch.channels_last)
    batch = torch.randn(8, 1, 28, 28)
    theirs = logits_and_gradients(copy.deepcopy(network), batch, torch.float32)
    ours = logits_and_gradients(build_network(lambda: copy.deepcopy(network), CPU), batch, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("model_class", [NeuralNetwork, ConvolutionalNeuralNetwork])
def test_a_built_network_is_printed_and_saved_as_its_class_has_it(model_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = model_class()
    torch.manual_seed(0)
    built = build_network(model_class, CPU)
    assert str(built) == str(plain)
    assert list(built.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in built.state_dict().items())
    model_class().load_state_dict(built.state_dict())
    built.load_state_dict(model_class().state_dict())


def test_a_built_networks_layers_can_be_unpacked_sliced_and_called() -> None:
    built = build_network(ConvolutionalNeuralNetwork, CPU).eval()
    plain = ConvolutionalNeuralNetwork().eval()
    plain.load_state_dict(built.state_dict())
    assert isinstance(built, ConvolutionalNeuralNetwork)
    convolution, norm, relu, pool, *_ = built.conv_stack
    assert isinstance(convolution, nn.Conv2d) and isinstance(pool, nn.MaxPool2d) and len(built.conv_stack) == 11
    assert built.conv_stack[2] is relu and isinstance(built.fc_stack[-1], nn.Linear)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        first_four = built.conv_stack[:4](images)
        assert torch.equal(first_four, pool(relu(norm(convolution(images)))))
        assert torch.equal(built.conv_stack[4:](first_four), built.conv_stack(images))
        torch.testing.assert_close(built(images), plain(images))


def strided(tensor: Tensor) -> Tensor:
    """Return the same values, every second place in memory, the axes in reverse order."""
    reversed_axes = tensor.permute(*range(tensor.dim() - 1, -1, -1))
    room = torch.full([*reversed_axes.shape[:-1], 2 * reversed_axes.shape[-1]], float("nan"), dtype=tensor.dtype)
    laid_out = room[..., ::2]
    laid_out.copy_(reversed_axes)
    return laid_out.permute(*range(tensor.dim() - 1, -1, -1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(memory_format=torch.contiguous_format),
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "strided": strided,
}


@pytest.mark.parametrize("what", ["both", *slow("weights", "moments")])
@pytest.mark.parametrize(
    ("model_class", "layout"),
    [(NeuralNetwork, "strided"), *((ConvolutionalNeuralNetwork, layout) for layout in LAYOUTS)],
)
def test_the_layout_in_which_a_state_arrives_changes_no_bit(
    model_class: type[nn.Module], layout: str, what: str, epoch_before: dict[type, State]
) -> None:
    fit, before = make_fit(model_class, BATCH_SIZE=256), epoch_before[model_class]
    changed = copy.deepcopy(before)
    groups = {"weights": [changed["model"]], "moments": list(changed["optimizer"]["state"].values())}
    groups["both"] = groups["weights"] + groups["moments"]
    for tensors in groups[what]:
        for name, tensor in tensors.items():
            if tensor.dim() == 4 or (tensor.dim() > 0 and layout == "strided"):
                tensors[name] = LAYOUTS[layout](tensor)
    (expected, expected_metrics), (state, metrics) = run_epoch(fit, 2, before), run_epoch(fit, 2, changed)
    for name in ("validation/loss", "validation/accuracy", "train/loss", "train/accuracy"):
        assert metrics[name] == expected_metrics[name]
    assert all(torch.equal(value, state["model"][name]) for name, value in expected["model"].items())
    for number, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, state["optimizer"]["state"][number][name]) for name, value in moments.items())


@pytest.fixture(scope="module")
def epoch_before() -> dict[type, State]:
    """The states of both networks after their first epoch."""
    classes = (NeuralNetwork, ConvolutionalNeuralNetwork)
    return {each: run_epoch(make_fit(each, BATCH_SIZE=256), 1, None)[0] for each in classes}


def test_each_fit_and_epoch_has_a_seed_of_its_own() -> None:
    fits = [make_fit(name=name, FOLDS=5) for name in ("final", *(f"fold-{number}" for number in range(1, 6)))]
    assert [fit.number for fit in fits] == [0, 1, 2, 3, 4, 5]
    seeds = {seed_of(replace(fit, rng_seed=rng_seed), epoch) for fit in fits for epoch in (1, 2) for rng_seed in (0, 1)}
    assert len(seeds) == 6 * 2 * 2
    assert 2**62 < max(seeds) < 2**64  # all 64 bits, so that no two of a thousand are alike by chance


def test_the_seed_is_made_of_rng_seed_number_and_epoch_alone() -> None:
    fold = make_fit(name="fold-1", RNG_SEED=7)
    other = make_fit(ConvolutionalNeuralNetwork, name="fold-1", RNG_SEED=7, LEARNING_RATE=0.1, EPOCHS=9, MIRROR=True)
    assert seed_of(fold, 2) == seed_of(other, 2)


def test_two_folds_begin_from_other_weights_and_the_same_fold_from_the_same() -> None:
    first, again, second = (
        run_epoch(make_fit(name=name, LEARNING_RATE=1e-12, EPOCHS=1), 1, None)[0]["model"]["linear_relu_stack.0.weight"]
        for name in ("fold-1", "fold-1", "fold-2")
    )
    assert torch.equal(first, again) and not torch.allclose(first, second, atol=1e-3)


class DrawsFromAll(NeuralNetwork):
    """Draws random numbers from torch, numpy and Python."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, with noise."""
        noise = np.random.rand() + random.random() + torch.rand(1).item()
        return super().forward(images) * (1 + noise if self.training else 1)


def test_random_numbers_of_numpy_and_python_are_seeded_too() -> None:
    fit = make_fit(DrawsFromAll)
    losses = []
    for draws in (0, 3):
        for _ in range(draws):
            np.random.rand()
            random.random()
        losses.append(run_epoch(fit, 1, None)[1]["train/loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_epoch_leaves_threads_and_generators_as_they_were(threads: int) -> None:
    torch.set_num_threads(threads)
    states = []
    for _ in range(2):
        numpys = np.random.get_state()[1]  # type: ignore[index]
        states.append((torch.get_rng_state(), torch.get_num_threads(), random.getstate(), numpys))
        run_epoch(make_fit(), 1, None)
    before, after = states
    assert torch.equal(before[0], after[0]) and before[1] == after[1] == threads
    assert before[2] == after[2] and np.array_equal(before[3], after[3])


def test_what_goes_wrong_in_an_attempt_comes_back_as_a_value() -> None:
    failure = attempt(int, "x")
    assert isinstance(failure, Failure) and isinstance(failure.error, ValueError)
    assert attempt(int, "3") == 3


def test_a_failure_of_another_process_names_the_lines_where_it_happened() -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "as planned", "nowhere")

    failure = pickle.loads(pickle.dumps(attempt(fail)))
    assert isinstance(failure.error, FileNotFoundError) and failure.error.filename == "nowhere"
    heading, *places = failure.error.__notes__[0].splitlines()
    assert heading == "In a worker process, most recent call last:" and places[0].startswith('  File "')
    assert re.fullmatch(f'  File "{re.escape(__file__)}", line \\d+, in fail', places[-2])
    assert places[-1] == '    raise FileNotFoundError(2, "as planned", "nowhere")'


def test_an_exception_that_cannot_be_pickled_comes_back_in_words() -> None:
    class Own(Exception):
        pass

    def fail() -> None:
        raise Own("as planned")

    error = pickle.loads(pickle.dumps(attempt(fail))).error
    assert type(error) is RuntimeError and str(error).endswith(".Own: as planned")
    assert "\n" not in str(error)


def test_of_an_exception_that_cannot_be_pickled_the_notes_come_back_too() -> None:
    class Own(Exception):
        pass

    def fail() -> None:
        error = Own("as planned")
        error.add_note("with a note")
        raise error

    error = pickle.loads(pickle.dumps(attempt(fail))).error
    assert str(error).endswith(".Own: as planned\nwith a note")


def test_a_network_that_ends_the_process_is_a_failure_that_says_so() -> None:
    failure = attempt(sys.exit, 3)
    assert isinstance(failure, Failure) and str(failure.error) == "the network called sys.exit(3)"
    assert traceback.extract_tb(failure.error.__traceback__)  # so that one can see where


def test_a_pickled_function_is_called_with_its_arguments() -> None:
    assert Pickled(pickle.dumps(divmod))(7, 2) == (3, 1)


@pytest.mark.parametrize(("hooked", "its_outcome"), [(1, "relu"), (2, "relu of pooled")])
def test_a_hook_on_a_relu_or_the_pooling_behind_it_is_called_with_what_it_would_see(
    hooked: int, its_outcome: str
) -> None:
    seen: list[Tensor] = []
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(676, 10))
    network[hooked].register_forward_hook(lambda module, inputs, output: seen.append(output))
    built = build_network(lambda: network, CPU)
    images = torch.randn(2, 1, 28, 28)
    built(images)
    expected = network[0](images).relu()
    if its_outcome == "relu of pooled":
        expected = nn.functional.max_pool2d(expected, 2)
    assert len(seen) == 1 and torch.equal(seen[0], expected)


class Counting(TorchDispatchMode):
    """Counts the values that go through a ReLU, by whichever function."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Call a function of torch."""
        if function.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.clamp_min, torch.ops.aten.threshold):
            self.values += arguments[0].numel()
        return function(*arguments, **(keywords or {}))


def test_a_relu_in_front_of_a_pooling_has_a_quarter_of_the_work() -> None:
    def network() -> nn.Module:
        stack = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 5), nn.ReLU())
        stack.append(nn.MaxPool2d(2))  # the last of its Sequential
        return nn.Sequential(stack, nn.Flatten(), nn.Linear(128, 10))

    images, counts = torch.randn(2, 1, 28, 28), []
    for each in (network(), build_network(network, CPU)):
        with torch.no_grad(), Counting() as counting:
            each(images)
        counts.append(counting.values)
    plain = 2 * (4 * 24 * 24 + 8 * 8 * 8)
    assert counts == [plain, plain // 4]


class Layouts(TorchDispatchMode):
    """Keeps in which layout the gradients of images come to a ReLU or a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.are_channels_last: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Call a function of torch."""
        backward = (torch.ops.aten.threshold_backward, torch.ops.aten.max_pool2d_with_indices_backward)
        if function.overloadpacket in backward and arguments[0].dim() == 4:
            self.are_channels_last.append(arguments[0].is_contiguous(memory_format=torch.channels_last))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("pooling", [[], [nn.MaxPool2d(2)]], ids=["ReLU last", "pooling last"])
def test_gradients_have_the_layout_of_the_images_in_front_of_flatten_too(pooling: list[nn.Module]) -> None:
    def network() -> nn.Module:
        stack = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Conv2d(4, 8, 5), nn.ReLU(), *pooling)
        return nn.Sequential(stack, nn.Flatten(), nn.LazyLinear(10))

    logits = build_network(network, CPU)(torch.randn(2, 1, 28, 28))
    with Layouts() as layouts:
        logits.sum().backward()
    assert layouts.are_channels_last == [True] * (2 + len(pooling))


class LazyInBothModes(nn.Module):
    """Has lazy layers, one of which is used in training alone, and statistics that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.norm, self.last, self.helper = (
            nn.Flatten(),
            nn.LazyBatchNorm1d(),
            nn.LazyLinear(10),
            nn.LazyLinear(10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        normed = self.norm(self.flatten(images))
        return self.last(normed) + self.helper(normed) if self.training else self.last(normed)


def test_lazy_layers_have_the_sizes_of_images_before_the_optimizer_asks_for_their_weights() -> None:
    built = build_network(LazyInBothModes, CPU)
    assert {name: tuple(weight.shape) for name, weight in built.named_parameters()} == {
        "norm.weight": (784,),
        "norm.bias": (784,),
        "last.weight": (10, 784),
        "last.bias": (10,),
        "helper.weight": (10, 784),
        "helper.bias": (10,),
    }


class LazyInEvaluation(nn.Module):
    """Has a lazy layer that is used in evaluation alone, behind one that takes images with their channel."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.training_head, self.head = nn.LazyConv2d(4, 3), nn.LazyLinear(10), nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        features = self.convolution(images).flatten(1)
        return self.training_head(features) if self.training else self.head(features)


def test_lazy_layers_of_images_and_of_evaluation_have_their_sizes_too() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in build_network(LazyInEvaluation, CPU).named_parameters()}
    assert shapes["convolution.weight"] == (4, 1, 3, 3)
    assert shapes["training_head.weight"] == shapes["head.weight"] == (10, 4 * 26 * 26)


def test_a_network_without_lazy_layers_is_asked_about_nothing_while_it_is_built() -> None:
    seen: list[Tensor] = []

    def network() -> nn.Module:
        layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        layers.register_forward_hook(lambda module, inputs, output: seen.append(output))
        return layers

    build_network(network, CPU)
    assert seen == []


class ComplexWeights(nn.Module):
    """Has complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(784, 10, dtype=torch.complex64) / 28)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return (images.flatten(1).to(torch.complex64) @ self.weight).real


def test_a_network_with_complex_weights_trains() -> None:
    assert run_epoch(make_fit(ComplexWeights), 1, None)[1]["train/accuracy"] > 0.3


def test_a_scripted_network_trains() -> None:
    fit = make_fit(lambda: torch.jit.script(NeuralNetwork()))  # type: ignore[arg-type]
    assert run_epoch(fit, 1, None)[1]["train/accuracy"] > 0.1


def test_a_network_is_built_on_the_device_that_trains() -> None:
    meta = torch.device("meta")  # which is on every machine, and computes nothing
    for network in (NeuralNetwork, LazyInBothModes):
        assert {parameter.device for parameter in build_network(network, meta).parameters()} == {meta}
