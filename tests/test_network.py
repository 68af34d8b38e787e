"""The trial of a network: what is refused before anything starts, what reaches a worker, what tells two apart."""

import functools
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import main_tutorial
from experiment.errors import ConfigurationError, RunError
from experiment.network import (
    Network,
    _users_own_modules,
    check_trial,
    is_still,
    same_answers,
    same_network,
    start_trial,
    try_network,
)
from experiment.plan import Plan
from experiment.workers import WorkerProcesses
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import Failure

HERE = Plan(device="cpu", precision="float32", threads=1, workers=1, executor=None)
SENT = Plan(device="cpu", precision="float32", threads=1, workers=2, executor=None)
MODULE = """
import functools
import torch
from torch import nn

SCALE = 1.0

def helper(images):
    return SCALE * images.flatten(1)

class Own(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images):
        return self.layers(helper(images))
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(1) as pool:
        yield pool


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return a module of the user's own, imported from its file."""
    (tmp_path / "users_own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("users_own")
    del sys.modules["users_own"]


def tried_in(pool: Executor, model_class: Callable[[], nn.Module]) -> Network:
    """Try a network here and there; raise unless both are the same."""
    network = try_network(model_class, SENT)
    check_trial(network, start_trial(network, SENT, pool))
    return network


def plain_answers(model_class: Callable[[], nn.Module]) -> list[float]:
    return try_network(model_class, HERE).answers


def test_a_constant_that_was_set_in_memory_reaches_the_workers(module: ModuleType, pool: WorkerProcesses) -> None:
    before = plain_answers(module.Own)
    module.SCALE = 0.01  # type: ignore[attr-defined]  # of the test's own module, which mypy does not see
    assert not same_answers(tried_in(pool, module.Own).answers, before)


def test_a_module_that_was_edited_after_it_was_imported_is_sent_as_it_is_in_memory(
    module: ModuleType, pool: WorkerProcesses
) -> None:
    Path(str(module.__file__)).write_text(MODULE.replace("SCALE = 1.0", "SCALE = 2.0"))
    assert same_answers(tried_in(pool, module.Own).answers, plain_answers(module.Own))


def test_a_method_that_was_replaced_reaches_the_workers(module: ModuleType, pool: WorkerProcesses) -> None:
    before = plain_answers(module.Own)
    module.Own.forward = lambda self, images: -self.layers(images.flatten(1))
    assert not same_answers(tried_in(pool, module.Own).answers, before)


@pytest.mark.parametrize("how", ["runpy", "spec_from_file_location"])
def test_a_class_of_a_module_that_nobody_can_import_reaches_the_workers(
    how: str, tmp_path: Path, pool: WorkerProcesses
) -> None:
    path = tmp_path / "nowhere.py"
    path.write_text(MODULE)
    if how == "runpy":
        model_class = runpy.run_path(str(path))["Own"]
    else:
        spec = importlib.util.spec_from_file_location("nowhere", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model_class = module.Own
    assert tried_in(pool, model_class).name == "Own"


@pytest.mark.parametrize(
    "model_class",
    [
        functools.partial(lambda width: nn.Sequential(nn.Flatten(), nn.Linear(width, 10)), width=784),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    ],
    ids=["partial", "lambda"],
)
def test_any_callable_will_do_and_the_networks_own_class_gives_the_name(
    model_class: Callable[[], nn.Module], pool: WorkerProcesses
) -> None:
    assert tried_in(pool, model_class).name == "Sequential"


IN_ANOTHER_FOLDER = """
import os, sys
sys.path.insert(0, "")
import main_tutorial
os.chdir({folder!r})
settings = {{"DATASET": "Digits", "FOLDS": 2, "EPOCHS": 1, "WORKERS": 2, "WANDB_MODE": "disabled"}}
for name, value in (settings | {{"RUNS_DIR": {folder!r}}}).items():
    setattr(main_tutorial, name, value)
print(main_tutorial.main().final.name)
"""


@pytest.mark.slow
def test_workers_find_the_program_after_os_chdir(tmp_path: Path) -> None:
    repository = Path(main_tutorial.__file__).parent
    code = IN_ANOTHER_FOLDER.format(folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.endswith("final\n")


class WithSoftmax(NeuralNetwork):
    """The commonest mistake of all."""

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities."""
        return super().forward(images).softmax(1)


class WithRoughSoftmax(NeuralNetwork):
    """Makes it in a lower precision."""

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities."""
        return super().forward(images).bfloat16().softmax(1)


@pytest.mark.parametrize("network", [WithSoftmax, WithRoughSoftmax])
def test_a_network_that_returns_probabilities_is_told_once_to_leave_the_softmax_out(
    network: type[nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    try_network(network, HERE)
    assert capsys.readouterr().err == (
        f"{network.__name__} returns probabilities (rows that sum to 1), not logits: leave the softmax out.\n"
    )


class WithReLU(NeuralNetwork):
    """Its answers are no probabilities, though none is below zero."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return super().forward(images).relu()


@pytest.mark.parametrize("network", [NeuralNetwork, ConvolutionalNeuralNetwork, WithReLU])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_that_returns_logits_raises_no_doubt(
    network: type[nn.Module], precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try_network(network, Plan("cpu", precision, 1, 1, None))
    assert capsys.readouterr().err == ""


class Remembering(NeuralNetwork):
    """Has a place for what it shall remember."""

    seen_by_all: int = 0
    seen: Any = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.remember(images)
        return super().forward(images)

    def remember(self, images: Tensor) -> None:
        """Keep something of the images."""


class Counting(Remembering):
    """Counts in a number."""

    def remember(self, images: Tensor) -> None:
        """Count."""
        self.seen = (self.seen or 0) + 1


class Listing(Remembering):
    """Keeps what it has seen in a list."""

    def remember(self, images: Tensor) -> None:
        """Keep one number more."""
        self.seen = [*(self.seen or []), images.mean().item()]


class Averaging(Remembering):
    """Keeps a moving average in a tensor that is no buffer."""

    def remember(self, images: Tensor) -> None:
        """Move it."""
        self.seen = images.mean() if self.seen is None else 0.9 * self.seen + images.max()


class InBuffer(NeuralNetwork):
    """Counts in a buffer that is no part of its state."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.seen += 1
        return super().forward(images)


class OwnRandomNumbers(Remembering):
    """Has a random generator of its own, which begins anew whenever it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = np.random.default_rng(1)

    def remember(self, images: Tensor) -> None:
        """Draw a number."""
        self.seen.normal()


class OfTorch(OwnRandomNumbers):
    """The same with torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.Generator().manual_seed(1)

    def remember(self, images: Tensor) -> None:
        """Draw a number."""
        torch.rand(1, generator=self.seen)


@pytest.mark.parametrize("network", [Counting, Listing, Averaging, InBuffer, OwnRandomNumbers, OfTorch])
def test_what_is_remembered_outside_the_state_is_told_of(
    network: type[nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    try_network(network, HERE)
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{network.__name__} keeps seen outside its weights and buffers, which begins anew in each epoch: what shall "
        "last is a buffer (docs/trouble.md)."
    )


def test_a_counter_in_an_attribute_of_the_class_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    class OfTheClass(Remembering):
        def remember(self, images: Tensor) -> None:
            type(self).seen_by_all += 1
            self.seen = self.seen_by_all

    try_network(OfTheClass, HERE)
    assert capsys.readouterr().err.startswith("OfTheClass keeps OfTheClass.seen_by_all, seen outside its weights")


class BatchSize(Remembering):
    """Keeps at hand how many images it has."""

    def remember(self, images: Tensor) -> None:
        """Keep it."""
        self.seen = len(images)


class Activations(Remembering):
    """Keeps its last activations, which a picture may be drawn of."""

    def remember(self, images: Tensor) -> None:
        """Keep them."""
        self.seen = torch.dropout(self.flatten(images), 0.5, self.training)


class Mask(Remembering):
    """Makes a mask once."""

    def remember(self, images: Tensor) -> None:
        """Make it."""
        if self.seen is None:
            self.seen = torch.ones_like(images)


class InState(NeuralNetwork):
    """Counts in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.seen += 1
        return super().forward(images)


@pytest.mark.parametrize("network", [BatchSize, Activations, Mask, InState])
def test_what_is_only_kept_at_hand_or_in_a_buffer_raises_no_doubt(
    network: type[nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    try_network(network, HERE)
    assert capsys.readouterr().err == ""


def test_what_answers_otherwise_each_time_is_told_of_and_trains_in_a_worker_too(
    pool: WorkerProcesses, capsys: pytest.CaptureFixture[str]
) -> None:
    class OfTheSystem(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + int.from_bytes(os.urandom(2))

    assert tried_in(pool, OfTheSystem).name == "OfTheSystem"
    assert "OfTheSystem answers otherwise when it is built a second time" in capsys.readouterr().err


def test_a_counter_outside_the_network_that_changes_its_answers_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[None] = []

    class Drifting(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(None)
            return super().forward(images) * len(calls)

    try_network(Drifting, HERE)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Drifting answers otherwise when it is built a second time: what it keeps outside its weights and buffers "
        "begins anew in each epoch, or its random numbers are none that torch, numpy and random seed (docs/trouble.md)."
    )


def test_two_networks_are_the_same_if_they_answer_alike_to_a_part_in_a_thousand() -> None:
    network = try_network(NeuralNetwork, HERE).to_dict()
    near = network | {"answers": [1.0001 * answer for answer in network["answers"]]}
    far = network | {"answers": [1.01 * answer for answer in network["answers"]]}
    assert same_network(network, near) and not same_network(network, far)
    assert not same_network(network, network | {"printed": "another"})
    assert not same_network(network, network | {"answers": network["answers"][:-1]})


@pytest.mark.parametrize("value", [0, np.inf])
def test_a_network_that_answers_with_zeros_or_infinity_is_the_same_as_itself(value: float) -> None:
    class Extreme(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits + value if value else logits * 0

    one, other = (try_network(Extreme, HERE).to_dict() for _ in range(2))
    assert same_network(one, other) and not same_network(one, try_network(NeuralNetwork, HERE).to_dict())


def test_a_class_still_builds_what_was_trained_under_another_name_and_not_once_it_was_edited() -> None:
    class Renamed(NeuralNetwork):
        pass

    class Negated(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return -super().forward(images)

    class Random(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * int.from_bytes(os.urandom(2))

    trained = try_network(NeuralNetwork, HERE).to_dict()
    assert is_still(trained, NeuralNetwork) and is_still(trained, Renamed)
    assert not is_still(trained, Negated) and not is_still(trained, ConvolutionalNeuralNetwork)
    assert is_still(trained, Random)  # which answers otherwise each time, so that its structure alone counts
    assert not is_still(try_network(ConvolutionalNeuralNetwork, HERE).to_dict(), Random)


EDITS = {
    "a helper function": ("return SCALE * images", "return -SCALE * images"),
    "a constant beside the class": ("SCALE = 1.0", "SCALE = 1.1"),
    "what is done in training alone": ("(helper(images))", "(helper(images) * (2 if self.training else 1))"),
    "what is done in evaluation alone": ("(helper(images))", "(helper(images) * (1 if self.training else 2))"),
    "an initialisation": ("super().__init__()\n", "super().__init__()\n        torch.manual_seed(3)\n"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_no_structure_shows_changes_the_answers(edit: str, tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(MODULE)
    (tmp_path / "after.py").write_text(MODULE.replace(*EDITS[edit]))
    before, after = (runpy.run_path(str(tmp_path / name))["Own"] for name in ("before.py", "after.py"))
    one, other = try_network(before, HERE).to_dict(), try_network(after, HERE).to_dict()
    assert one["printed"] == other["printed"] and not same_network(one, other)


def test_a_reworded_comment_or_docstring_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(MODULE)
    (tmp_path / "after.py").write_text(
        MODULE.replace("def forward", '"""A docstring."""\n    # a comment\n    def forward')
    )
    before, after = (runpy.run_path(str(tmp_path / name))["Own"] for name in ("before.py", "after.py"))
    assert same_network(try_network(before, HERE).to_dict(), try_network(after, HERE).to_dict())


def test_what_a_network_prints_of_itself_has_no_addresses() -> None:
    class Printing(NeuralNetwork):
        def extra_repr(self) -> str:
            return f"{object()}, {test_what_a_network_prints_of_itself_has_no_addresses}"

    printed = try_network(Printing, HERE).printed
    assert "<object object>" in printed and "0x" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}],
    ids=["this one", "AVX2", "SSE4"],
)
def test_answers_are_the_same_on_another_kind_of_cpu(environment: dict[str, str]) -> None:
    code = """
import json, models
from experiment.network import try_network
from experiment.plan import Plan
print(json.dumps(try_network(models.ConvolutionalNeuralNetwork, Plan("cpu", "float32", 1, 1, None)).to_dict()))
"""
    repository = Path(main_tutorial.__file__).parent
    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=repository, env=os.environ | environment, text=True
    )
    assert same_network(json.loads(printed), try_network(ConvolutionalNeuralNetwork, HERE).to_dict())


def test_what_a_network_is_called_and_how_many_weights_are_trained_is_found() -> None:
    class Frozen(NeuralNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)

    network = try_network(Frozen, HERE)
    weights = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert (network.name, network.weights) == ("Frozen", weights) and network.printed.startswith("Frozen(\n  (flatten)")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_is_tried_in_the_precision_in_which_it_will_be_trained(precision: str) -> None:
    seen = []

    class Watching(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    try_network(Watching, Plan("cpu", precision, 1, 1, None))
    assert seen[:2] == [getattr(torch, precision)] * 2  # evaluating, then training


class Misshapen(NeuralNetwork):
    """Its layer does not fit: PyTorch raises."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return super().forward(images[:, :, 1:])


class Raising(NeuralNetwork):
    """Cannot even be built."""

    def __init__(self) -> None:
        super().__init__()
        raise OSError("as planned")


@pytest.mark.parametrize(
    ("network", "file", "method"), [(Misshapen, "models.py", "forward"), (Raising, __file__, "__init__")]
)
def test_the_traceback_of_what_a_network_raises_ends_at_its_own_line(
    network: type[nn.Module], file: str, method: str
) -> None:
    with pytest.raises((RuntimeError, OSError)) as error:
        try_network(network, HERE)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.filename.endswith(file) and last.name == method


def test_a_configuration_error_of_the_trial_names_the_class_of_the_network() -> None:
    with pytest.raises(ConfigurationError, match="Flatten must have parameters"):
        try_network(nn.Flatten, HERE)


class Wide(NeuralNetwork):
    """Needs an argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class Unlearnable(NeuralNetwork):
    """Cuts its gradient off."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images)


class WithLoss(NeuralNetwork):
    """Returns two things in training."""

    def forward(self, images: Tensor) -> Any:
        """Return logits, or logits and a penalty."""
        logits = super().forward(images)
        return (logits, logits.square().mean()) if self.training else logits


class Guessing(NeuralNetwork):
    """Returns a class in evaluation, not logits."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or classes."""
        logits = super().forward(images)
        return logits if self.training else logits.argmax(1)


class Squeezing(NeuralNetwork):
    """Returns (10,) for a single image."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images).squeeze()


BUILT = NeuralNetwork()
SHARED_LAYER = nn.Linear(784, 10)
SHARED_WEIGHTS = torch.randn(784, 10)


class SharedWeights(nn.Module):
    """Trains a tensor that is made outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(SHARED_WEIGHTS)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return images.flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            Wide,
            "the network must be built without arguments: missing a required argument: 'width'. "
            "functools.partial(Net, width=32) gives a class its arguments",
        ),
        (BUILT, "the network must be a class, or a function that builds it, got a NeuralNetwork that is built already"),
        (3, "the network must be built without arguments: 3 is not a callable object"),
        (
            Unlearnable,
            "Unlearnable returns logits from which no gradient leads back to its weights: torch.no_grad(), .detach(), "
            ".item() or numpy cuts it off",
        ),
        (WithLoss, "WithLoss must return logits (N, 10), got tuple"),
        (Guessing, "Guessing must return logits (N, 10), got (2,)"),
        (Squeezing, "Squeezing must return logits (N, 10), of one image, too; got (10,): is there a squeeze()?"),
        (
            lambda: BUILT,
            "NeuralNetwork is the same network, or has the same weights, when it is built a second time, so that each "
            "fit would go on from the last one's: build all of it in the function that returns it",
        ),
        (lambda: nn.Sequential(nn.Flatten(), SHARED_LAYER), "Sequential is the same network, or has the same weights"),
        (SharedWeights, "SharedWeights is the same network, or has the same weights"),
    ],
    ids=[
        "arguments",
        "built already",
        "no callable",
        "no gradient",
        "two things",
        "classes",
        "squeeze",
        "same network",
        "layer",
        "weights",
    ],
)
def test_what_could_not_be_trained_fit_by_fit_is_one_line(network: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        try_network(network, HERE)
    assert str(error.value).startswith(says) and len(str(error.value).splitlines()) == 1


def test_a_network_whose_batch_norm_knows_no_single_image_is_not_refused() -> None:
    try_network(
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, track_running_stats=False), nn.Linear(784, 10)), HERE
    )


def test_layers_that_are_shared_and_frozen_do_no_harm() -> None:
    backbone = nn.Linear(784, 16).requires_grad_(False)
    assert try_network(lambda: nn.Sequential(nn.Flatten(), backbone, nn.Linear(16, 10)), HERE).name == "Sequential"


@pytest.mark.slow
def test_a_compiled_network_raises_no_doubt_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    try_network(lambda: torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(784, 10))), HERE)  # type: ignore[arg-type, return-value]
    assert "docs/trouble.md" not in capfd.readouterr().err


def test_what_cannot_be_sent_is_named_with_advice() -> None:
    lock = threading.Lock()

    class Locking(NeuralNetwork):
        def forward(self, images: Tensor) -> Tensor:
            with lock:
                return super().forward(images)

    with pytest.raises(ConfigurationError) as refused:
        try_network(Locking, SENT)
    assert str(refused.value) == (
        "the network cannot be sent to other processes: cannot pickle '_thread.lock' object. What it needs must be "
        "made in the network itself; or set WORKERS = 1"
    )
    assert try_network(Locking, HERE).name == "Locking"


def test_an_executor_that_cannot_take_its_first_call_is_told_of_with_the_whole_reason() -> None:
    network, failed = try_network(NeuralNetwork, HERE), Future[Any]()
    failed.set_exception(
        RuntimeError("It occurs if both\nhave different environments.\n\nMore in a page.\n\nAnd more.")
    )
    with pytest.raises(RunError, match=r"RuntimeError: It occurs if both have different environments\.$"):
        check_trial(network, failed)


ADVICE = "Define it where other processes can import or rebuild all that it needs, or set WORKERS = 1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError("weights.txt\nsecond line"), "FileNotFoundError: weights.txt"),
        (ValueError(), "ValueError: ValueError"),
    ],
)
def test_what_goes_wrong_where_it_would_be_trained_is_said_in_a_line_with_advice(error: Exception, said: str) -> None:
    network, trial = try_network(NeuralNetwork, HERE), Future[Any]()
    trial.set_result(Failure(error))
    with pytest.raises(ConfigurationError) as refused:
        check_trial(network, trial)
    begin = "NeuralNetwork works here, but not in the process that would train it: "
    assert str(refused.value) == f"{begin}{said}. {ADVICE}"


def test_what_a_network_raises_where_it_would_be_trained_is_no_fault_of_the_executor() -> None:
    class InTheMainThreadAlone(NeuralNetwork):
        def __init__(self) -> None:
            super().__init__()
            if threading.current_thread() is not threading.main_thread():
                raise OSError("no such thread")

    network = try_network(InTheMainThreadAlone, HERE)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigurationError, match=": OSError: no such thread. Define"):
        check_trial(network, start_trial(network, HERE, pool))


@pytest.mark.parametrize("change", [{"answers": [1.0] * 80}, {"weights": 1}, {"problem": "must return logits"}])
def test_a_network_that_is_another_one_where_it_would_be_trained_is_refused_with_advice(
    change: dict[str, Any],
) -> None:
    network, trial = try_network(NeuralNetwork, HERE), Future[Any]()
    trial.set_result(network.to_dict() | {"problem": None} | change)
    with pytest.raises(ConfigurationError) as refused:
        check_trial(network, trial)
    begin = "NeuralNetwork is another network in the process that would train it: it answers otherwise. "
    assert str(refused.value) == begin + ADVICE


def test_an_executor_that_takes_no_more_work_is_named_with_its_reason() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    said = "ThreadPoolExecutor takes no more work: cannot schedule new futures after shutdown"
    with pytest.raises(RunError, match=f"^{said}$"):
        start_trial(try_network(NeuralNetwork, HERE), HERE, pool)


def test_an_agents_stop_while_work_is_handed_over_is_no_fault_of_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Exception()  # which W&B's agent puts, bare, into the thread that it started

    class Stopped(ThreadPoolExecutor):
        def submit(self, *_arguments: Any, **_keywords: Any) -> Any:
            raise stop

    monkeypatch.setitem(sys.modules, "wandb.agents.pyagent", ModuleType("wandb.agents.pyagent"))
    with Stopped(1) as pool, pytest.raises(Exception) as ended:
        start_trial(try_network(NeuralNetwork, HERE), HERE, pool)
    assert ended.value is stop


def test_of_the_modules_in_memory_the_users_own_alone_are_sent(module: ModuleType) -> None:
    sent = {each.__name__ for each in _users_own_modules()}
    assert {"users_own", "models", "main_cnn", __name__} <= sent
    for name in ("torch.nn", "numpy", "pytest", "json", "pathlib", "experiment.plan", "experiment", "train_utils"):
        assert name in sys.modules and name not in sent


class ArrayInState(NeuralNetwork):
    """Keeps an array of numpy's in its state."""

    def get_extra_state(self) -> Any:
        """Return what a checkpoint cannot hold."""
        return np.zeros(3)

    def set_extra_state(self, state: Any) -> None:
        """Take it back."""


class PathInState(ArrayInState):
    """Keeps a path in its state."""

    def get_extra_state(self) -> Any:
        """Return what a checkpoint cannot hold."""
        return Path("here")


class PathsInState(PathInState):
    """Has another such network in it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = PathInState()


class Growing(NeuralNetwork):
    """Has a buffer that grows."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.seen = torch.cat([self.seen, images.mean().detach().view(1)])
        return super().forward(images)


class Expanded(nn.Module):
    """Its weights overlap in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(784, 1).expand(784, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return images.flatten(1) @ self.weight


class Choosy(NeuralNetwork):
    """Takes no state back."""

    def get_extra_state(self) -> Any:
        """Return something."""
        return 1

    def set_extra_state(self, state: Any) -> None:
        """Raise, in several lines, as PyTorch does."""
        raise RuntimeError(f"Error(s) in loading:\n  one thing\n  {state} is not mine\n")


class Speechless(Choosy):
    """Gives no reason either."""

    def set_extra_state(self, state: Any) -> None:
        """Raise an exception that says nothing."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            ArrayInState,
            "ArrayInState keeps what no checkpoint can hold (in _extra_state): beside tensors only numbers, ",
        ),
        (
            PathsInState,
            "PathsInState keeps what no checkpoint can hold (in _extra_state, other._extra_state): beside tensors only "
            "numbers, texts, lists and dicts of these can be read back",
        ),
        (Growing, "Growing cannot go on from its own state, as it must in each epoch: size mismatch for seen"),
        (Choosy, "Choosy cannot go on from its own state, as it must in each epoch: 1 is not mine"),
        (Speechless, "Speechless cannot go on from its own state, as it must in each epoch: NotImplementedError"),
        (Expanded, "Expanded has weights that the optimizer cannot change: unsupported operation"),
    ],
)
def test_what_could_not_go_on_in_the_second_epoch_is_found_in_the_trial(network: type[nn.Module], says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{re.escape(says)}") as refused:
        try_network(network, HERE)
    assert "\n" not in str(refused.value)
