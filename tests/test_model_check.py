"""The model check: what is refused before training starts, and what distinguishes one network from another."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import NETWORK_SOURCE, REPOSITORY
from torch import Tensor, nn

from experiment.errors import ConfigurationError
from experiment.identity import same_identity
from experiment.model_check import ModelSummary, check_callable, check_model, is_same_network
from models import ConvolutionalNeuralNetwork, NeuralNetwork


def check(model_class: Any, precision: str = "float32") -> ModelSummary:
    return check_model(model_class, "cpu", precision)


def changed_output(change: Callable[[Tensor, bool], Any]) -> type[nn.Module]:
    """Return a NeuralNetwork whose output is a function of its logits and of whether it is training."""

    class Changed(NeuralNetwork):
        def forward(self, images: Tensor) -> Any:
            return change(super().forward(images), self.training)

    return Changed


# --- The summary ---


def test_summary_has_name_structure_and_number_of_trainable_parameters() -> None:
    class Frozen(NeuralNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)

    summary = check(Frozen)
    assert summary.name == "Frozen" and summary.printed.startswith("Frozen(\n  (flatten)")
    assert summary.parameters == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_printed_structure_has_no_memory_addresses() -> None:
    class Printing(NeuralNetwork):
        def extra_repr(self) -> str:
            return f"{object()}, {check}"

    printed = check(Printing).printed
    assert "<object object>" in printed and "0x" not in printed


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_step_is_computed_in_the_precision_of_the_run(precision: str) -> None:
    training = []

    def record(logits: Tensor, is_training: bool) -> Tensor:
        training.extend([logits.dtype] if is_training and len(logits) == 2 else [])
        return logits

    check(changed_output(record), precision)
    assert training == [getattr(torch, precision)]


# --- What is refused ---


class NeedsWidth(NeuralNetwork):
    """Cannot be built without arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class NeedsTaller(NeuralNetwork):
    """Its first layer does not fit: PyTorch raises."""

    def forward(self, images: Tensor) -> Tensor:
        """Raise."""
        return super().forward(images[:, :, 1:])


class CannotBeBuilt(NeuralNetwork):
    """Raises when it is built."""

    def __init__(self) -> None:
        super().__init__()
        raise OSError("as planned")


BUILT = NeuralNetwork()
SHARED_LAYER = nn.Linear(784, 10)
SHARED_TENSOR = torch.randn(784, 10)


class SharedTensor(nn.Module):
    """Trains a tensor that is created outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(SHARED_TENSOR)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return images.flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (changed_output(lambda logits, training: logits.detach()), "Changed returns logits without a gradient: "),
        (changed_output(lambda logits, training: (logits, 1)), "Changed must return logits (N, 10), got tuple"),
        (
            changed_output(lambda logits, training: logits if training else logits.argmax(1)),
            "Changed must return logits (N, 10), got (4,)",
        ),
        (
            changed_output(lambda logits, training: logits.squeeze()),
            "Changed must return logits (N, 10), got (10,) for a single image: is there a squeeze()?",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)),
            "Sequential must have trainable parameters, got none",
        ),
        (lambda: BUILT, "NeuralNetwork shares parameters with a second network that is built, so each fit would "),
        (lambda: nn.Sequential(nn.Flatten(), SHARED_LAYER), "Sequential shares parameters with a second network"),
        (SharedTensor, "SharedTensor shares parameters with a second network"),
    ],
    ids="detach tuple classes squeeze untrainable instance layer tensor".split(),
)
def test_network_that_cannot_be_trained_is_refused_in_one_line(model_class: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        check(model_class)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (NeedsWidth, "the network must be built without arguments: missing a required argument: 'width'. functools."),
        (BUILT, "the network must be a class, or a function that builds it, got a NeuralNetwork that is already built"),
        (3, "the network must be built without arguments: 3 is not a callable object"),
    ],
)
def test_network_that_cannot_be_built_is_refused_in_one_line(model_class: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        check_callable(model_class)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_class", "file", "method"),
    [(NeedsTaller, "models.py", "forward"), (CannotBeBuilt, __file__, "__init__")],
)
def test_traceback_of_a_networks_error_ends_at_its_own_line(
    model_class: type[nn.Module], file: str, method: str
) -> None:
    with pytest.raises((RuntimeError, OSError)) as error:
        check(model_class)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.filename.endswith(file) and last.name == method


def test_batch_norm_that_cannot_evaluate_a_single_image_is_accepted() -> None:
    check(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, track_running_stats=False), nn.Linear(784, 10)))


def test_shared_layers_that_are_frozen_are_accepted() -> None:
    backbone = nn.Linear(784, 16).requires_grad_(False)
    check(lambda: nn.Sequential(nn.Flatten(), backbone, nn.Linear(16, 10)))


# --- The warning of a softmax ---


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_network_that_returns_probabilities_gets_a_warning(
    precision: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    check(changed_output(lambda logits, training: logits.to(precision).softmax(1)))
    message = "Changed returns probabilities (rows that sum to 1), not logits: remove the softmax.\n"
    assert capsys.readouterr().err == message


def test_network_with_more_logits_than_classes_gets_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    check_model(NeuralNetwork, "cpu", "float32", (1, 28, 28), 3, "pictures")
    message = "NeuralNetwork returns 10 logits, but pictures has only 3 classes: let the last Linear return 3.\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "model_class",
    [NeuralNetwork, ConvolutionalNeuralNetwork, changed_output(lambda logits, training: logits.relu())],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_network_that_returns_logits_gets_no_warning(
    model_class: type[nn.Module], precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(model_class, precision)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtype_that_the_images_do_not_have_is_one_line(dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        torch.set_default_dtype(dtype)
        return NeuralNetwork()

    try:
        with pytest.raises(ConfigurationError, match=f"are float32, but PyTorch's default is {dtype}: remove"):
            check_model(build, "cpu", "float32")
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_that_is_not_the_cpu_is_one_line() -> None:
    def build() -> nn.Module:
        torch.set_default_device("meta")
        return NeuralNetwork()

    try:
        with pytest.raises(ConfigurationError, match=r"default is meta: remove the call of torch\.set_default_device"):
            check(build)
    finally:
        torch.set_default_device(None)


def test_network_that_cannot_be_hashed_is_one_line() -> None:
    @dataclass
    class Net(NeuralNetwork):
        width: int = 3

    class Comparable(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return self is other

    with pytest.raises(ConfigurationError, match=r"^Net cannot be hashed, .* write @dataclass\(eq=False\)"):
        check(Net)
    with pytest.raises(ConfigurationError, match=r"^Comparable cannot be hashed, .* __hash__ = nn.Module.__hash__"):
        check(lambda: nn.Sequential(nn.Flatten(), Comparable(784, 10)))


@pytest.mark.parametrize(
    ("build", "found"),
    [(lambda: None, "NoneType"), (lambda: (NeuralNetwork(), 1), "tuple"), (lambda: NeuralNetwork, "type")],
)
def test_function_that_returns_no_network_is_one_line(build: Callable[[], Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^the function .* must return an nn\.Module, got {found}$"):
        check(build)


def test_network_whose_train_and_eval_return_nothing_is_accepted() -> None:
    class Net(NeuralNetwork):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

        def eval(self) -> None:  # type: ignore[override]
            super().eval()

    check(Net)


# --- The fingerprint ---

EDITS = {
    "a helper function": ("return SCALE * images", "return -SCALE * images"),
    "a constant": ("SCALE = 1.0", "SCALE = 1.1"),
    "training": ("(helper(images))", "(helper(images) * (2 if self.training else 1))"),
    "evaluation": ("(helper(images))", "(helper(images) * (1 if self.training else 2))"),
    "the initialisation": ("super().__init__()\n", "super().__init__()\n        torch.manual_seed(3)\n"),
}


def summary_of(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "users_own"}
    exec(source, namespace)
    return check(namespace["Net"]).to_dict()


@pytest.mark.parametrize("edit", EDITS)
def test_edit_that_the_printed_structure_does_not_show_changes_the_fingerprint(edit: str) -> None:
    before, after = summary_of(NETWORK_SOURCE), summary_of(NETWORK_SOURCE.replace(*EDITS[edit]))
    assert before["printed"] == after["printed"] and not same_identity({"network": before}, {"network": after})


def test_comment_and_docstring_do_not_change_the_summary() -> None:
    commented = NETWORK_SOURCE.replace("def forward", '"""A docstring."""\n    # a comment\n    def forward')
    assert summary_of(NETWORK_SOURCE) == summary_of(commented)


def test_summary_does_not_depend_on_random_numbers_drawn_before() -> None:
    before = check(ConvolutionalNeuralNetwork)
    torch.rand(1)
    assert check(ConvolutionalNeuralNetwork) == before


@pytest.mark.parametrize("value", [0.0, torch.inf])
def test_network_that_returns_only_zeros_or_infinity_has_a_fingerprint(value: float) -> None:
    extreme = changed_output(lambda logits, training: logits * 0 + value)
    one, other = check(extreme).to_dict(), check(extreme).to_dict()
    assert same_identity({"network": one}, {"network": json.loads(json.dumps(other, allow_nan=False))})


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}],
    ids=["this one", "AVX2", "SSE4"],
)
def test_fingerprint_is_the_same_on_another_kind_of_cpu(environment: dict[str, str]) -> None:
    code = """
import json, models
from experiment.model_check import check_callable, check_model
print(json.dumps(check_model(models.ConvolutionalNeuralNetwork, "cpu", "float32").to_dict()))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, cwd=REPOSITORY, env=os.environ | environment, text=True)
    here = check(ConvolutionalNeuralNetwork).to_dict()
    assert same_identity({"network": json.loads(printed)}, {"network": here})


def test_renamed_class_builds_the_same_network() -> None:
    class Renamed(NeuralNetwork):
        pass

    assert is_same_network(check(NeuralNetwork).to_dict(), Renamed)


@pytest.mark.parametrize("model_class", [ConvolutionalNeuralNetwork, changed_output(lambda logits, training: -logits)])
def test_edited_class_builds_another_network(model_class: type[nn.Module]) -> None:
    assert not is_same_network(check(NeuralNetwork).to_dict(), model_class)
