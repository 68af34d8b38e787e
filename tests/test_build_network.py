"""`build_network`: what makes training fast changes no bit, and nothing that a user sees of a network."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_fit
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import ConvolutionalNeuralNetwork, NeuralNetwork
from train_utils import build_network, run_epoch

CPU = torch.device("cpu")
PRECISIONS = [torch.float32, torch.bfloat16]


def outputs_and_gradients(network: nn.Module, images: Tensor, precision: torch.dtype = torch.float32) -> list[Tensor]:
    """Return logits, gradients and buffers after one backward pass."""
    torch.manual_seed(1)  # for dropout
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits = network.train()(images)
    nn.CrossEntropyLoss()(logits.float(), torch.arange(len(images)) % 10).backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [logits, *gradients, *network.buffers()]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def in_channels_last(network: nn.Module) -> nn.Module:
    """Return a copy with the memory layout of `build_network` and without its other speed-ups."""
    plain = copy.deepcopy(network)
    for parameter in plain.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return plain


@pytest.mark.parametrize("precision", PRECISIONS)
def test_built_cnn_gives_the_bits_of_its_modules_in_the_printed_order(precision: torch.dtype) -> None:
    plain = in_channels_last(ConvolutionalNeuralNetwork())
    built = build_network(lambda: copy.deepcopy(plain), CPU)
    images = torch.randn(64, 1, 28, 28)
    assert_same_bits(outputs_and_gradients(built, images, precision), outputs_and_gradients(plain, images, precision))


def image_size(layers: list[nn.Module]) -> int:
    """Return the height and width of the images behind convolutional layers."""
    return nn.Sequential(*layers).eval()(torch.zeros(1, 1, 28, 28)).shape[-1]


@st.composite
def convolutional_layers(draw: Any) -> list[nn.Module]:
    """Draw one to three convolutions, each with up to four layers behind it."""
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(draw(st.integers(1, 3))):
        kernel, out_channels = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([3, 8, 16, 20, 32]))
        padding, stride = draw(st.sampled_from([0, kernel // 2])), draw(st.sampled_from([1, 1, 2]))
        layers.append(nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=draw(st.booleans())))
        channels = out_channels
        make: dict[str, Callable[[], nn.Module]] = {
            "norm": partial(nn.BatchNorm2d, channels),
            "relu": nn.ReLU,
            "in-place relu": partial(nn.ReLU, inplace=True),
            "max": lambda: nn.MaxPool2d(
                draw(st.sampled_from([2, 3])),
                draw(st.sampled_from([None, 1, 2])),
                draw(st.sampled_from([0, 1])),
                ceil_mode=draw(st.booleans()),
            ),
            "average": partial(nn.AvgPool2d, 2),
            "dropout": partial(nn.Dropout, 0.3),
            "gelu": nn.GELU,
        }
        kinds = st.sampled_from([*make, "relu"])  # twice as often
        for kind in draw(st.lists(kinds, max_size=4)):
            if kind not in ("max", "average") or image_size(layers) >= 4:
                layers.append(make[kind]())
        if image_size(layers) < 5:
            break
    return layers


@st.composite
def networks(draw: Any) -> nn.Sequential:
    """Draw a network as a user might stack it, in one Sequential or in nested ones."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layers = draw(convolutional_layers())
    features = nn.Sequential(*layers).eval()(torch.zeros(1, 1, 28, 28)).numel()
    head: list[nn.Module] = [nn.Flatten(), nn.Linear(features, 10)]
    if draw(st.booleans()):
        head[1:] = [nn.Linear(features, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)]
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(layers)))
        return nn.Sequential(nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:]), nn.Sequential(*head))
    return nn.Sequential(*layers, *head)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.sampled_from([2, 7, 64]), st.sampled_from(PRECISIONS))
def test_any_network_of_sequentials_gives_the_bits_of_its_plain_forward(
    network: nn.Sequential, batch_size: int, precision: torch.dtype
) -> None:
    plain, built = in_channels_last(network), build_network(lambda: copy.deepcopy(network), CPU)
    images = torch.randn(batch_size, 1, 28, 28)
    try:
        expected = outputs_and_gradients(plain, images, precision)
    except RuntimeError:
        reject()  # PyTorch cannot train an in-place ReLU behind another ReLU
    assert_same_bits(outputs_and_gradients(built, images, precision), expected)
    with torch.no_grad():
        assert torch.equal(built.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("in_place", [nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True)])
@pytest.mark.parametrize("nested", [False, True])
def test_an_in_place_layer_behind_pooling_gives_the_same_bits(in_place: nn.Module, nested: bool) -> None:
    stack = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(676, 10))
    network = nn.Sequential(stack, in_place, head) if nested else nn.Sequential(*stack, in_place, *head)
    built = build_network(lambda: copy.deepcopy(network), CPU)
    images = torch.randn(8, 1, 28, 28)
    assert_same_bits(outputs_and_gradients(built, images), outputs_and_gradients(in_channels_last(network), images))


# --- What a user sees of a network ---


@pytest.mark.parametrize("model_class", [NeuralNetwork, ConvolutionalNeuralNetwork])
def test_printed_structure_and_state_dict_are_those_of_the_class(model_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = model_class()
    torch.manual_seed(0)
    built = build_network(model_class, CPU)
    assert type(built) is model_class and str(built) == str(plain)
    assert list(built.state_dict()) == list(plain.state_dict())
    assert_same_bits(list(built.state_dict().values()), list(plain.state_dict().values()))
    model_class().load_state_dict(built.state_dict())
    built.load_state_dict(model_class().state_dict())


def test_layers_can_be_unpacked_sliced_and_called() -> None:
    built: Any = build_network(ConvolutionalNeuralNetwork, CPU).eval()
    convolution, norm, relu, pool, *_ = built.conv_stack
    assert isinstance(convolution, nn.Conv2d) and isinstance(pool, nn.MaxPool2d) and len(built.conv_stack) == 11
    assert built.conv_stack[2] is relu and isinstance(built.fc_stack[-1], nn.Linear)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        first_four = built.conv_stack[:4](images)
        assert torch.equal(first_four, pool(relu(norm(convolution(images)))))
        assert torch.equal(built.conv_stack[4:](first_four), built.conv_stack(images))


def pickle_copy(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network))


@pytest.mark.parametrize("make_copy", [pickle_copy, copy.deepcopy])
def test_copy_of_a_built_network_gives_the_same_outputs_from_its_own_parameters(
    make_copy: Callable[[nn.Module], nn.Module],
) -> None:
    built = build_network(ConvolutionalNeuralNetwork, CPU).eval()
    copied = make_copy(built)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        expected = built(images)
        assert torch.equal(copied(images), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(built(images), expected)
        assert not copied(images).any()


@pytest.mark.parametrize("position", [1, 2], ids=["ReLU", "pooling"])
def test_hook_is_called_once_with_the_ordinary_output(position: int) -> None:
    outputs: list[Tensor] = []
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(676, 10))
    plain: Any = in_channels_last(network)
    network[position].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images = torch.randn(2, 1, 28, 28)
    build_network(lambda: network, CPU)(images)
    assert len(outputs) == 1 and torch.equal(outputs[0], plain[: position + 1](images))


# --- The speed-ups are used ---


class OperationLog(TorchDispatchMode):
    """Calls a function with the first argument of each call of some PyTorch operations."""

    def __init__(self, operations: tuple[Any, ...], log: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.operations, self.log = operations, log

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Log an operation and compute it."""
        if operation.overloadpacket in self.operations:
            self.log(arguments[0])
        return operation(*arguments, **(keywords or {}))


def test_relu_before_pooling_computes_a_quarter_of_the_values() -> None:
    def make_network() -> nn.Module:
        stack = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 5), nn.ReLU())
        stack.append(nn.MaxPool2d(2))  # the last of its Sequential
        return nn.Sequential(stack, nn.Flatten(), nn.Linear(128, 10))

    def values_in_relu(network: nn.Module) -> int:
        sizes: list[int] = []
        relu = (torch.ops.aten.relu, torch.ops.aten.clamp_min, torch.ops.aten.threshold)
        with torch.no_grad(), OperationLog(relu, lambda tensor: sizes.append(tensor.numel())):
            network(torch.randn(2, 1, 28, 28))
        return sum(sizes)

    plain = 2 * (4 * 24 * 24 + 8 * 8 * 8)
    assert values_in_relu(make_network()) == plain
    assert values_in_relu(build_network(make_network, CPU)) == plain // 4


@pytest.mark.parametrize("pooling", [[], [nn.MaxPool2d(2)]], ids=["ReLU last", "pooling last"])
def test_gradients_before_flatten_are_channels_last(pooling: list[nn.Module]) -> None:
    def make_network() -> nn.Module:
        stack = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Conv2d(4, 8, 5), nn.ReLU(), *pooling)
        return nn.Sequential(stack, nn.Flatten(), nn.LazyLinear(10))

    layouts: list[bool] = []

    def log(gradient: Tensor) -> None:
        if gradient.dim() == 4:
            layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))

    backward = (torch.ops.aten.threshold_backward, torch.ops.aten.max_pool2d_with_indices_backward)
    logits = build_network(make_network, CPU)(torch.randn(2, 1, 28, 28))
    with OperationLog(backward, log):
        logits.sum().backward()
    assert layouts == [True] * (2 + len(pooling))


# --- Uncommon networks ---


class Lazy(nn.Module):
    """Has lazy layers, some of which only training or only evaluation uses, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()
        self.training_head, self.evaluation_head = nn.LazyLinear(10), nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        features = self.norm(self.convolution(images)).flatten(1)
        return self.training_head(features) if self.training else self.evaluation_head(features)


def test_lazy_layers_have_their_sizes_before_the_optimizer_is_made() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in build_network(Lazy, CPU).named_parameters()}
    assert shapes["convolution.weight"] == (4, 1, 3, 3)
    assert shapes["norm.weight"] == (4,)
    assert shapes["training_head.weight"] == shapes["evaluation_head.weight"] == (10, 4 * 26 * 26)


def test_network_without_lazy_layers_is_not_called_while_it_is_built() -> None:
    def make_network() -> nn.Module:
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        network.register_forward_hook(lambda module, inputs, output: calls.append(output))
        return network

    calls: list[Tensor] = []
    build_network(make_network, CPU)
    assert calls == []


@pytest.mark.parametrize("model_class", [NeuralNetwork, Lazy])
def test_network_is_built_on_its_device(model_class: type[nn.Module]) -> None:
    meta = torch.device("meta")  # exists on every machine and computes nothing
    assert {parameter.device for parameter in build_network(model_class, meta).parameters()} == {meta}


class UsesView(nn.Module):
    """Flattens the output of convolutions with `Tensor.view`, which needs them contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
        self.linear = nn.Linear(4 * 11 * 11, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        features = self.convolutions(images)
        return self.linear(features.view(features.size(0), -1))


def test_a_network_may_flatten_with_view() -> None:
    torch.manual_seed(0)
    network = UsesView()
    images = torch.randn(2, 1, 28, 28)
    plain = network(images)
    assert torch.equal(build_network(lambda: network, CPU)(images), plain)


class ComplexParameters(nn.Module):
    """Has complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(784, 10, dtype=torch.complex64) / 28)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return (images.flatten(1).to(torch.complex64) @ self.weight).real


def scripted_network() -> nn.Module:
    return torch.jit.script(NeuralNetwork())


@pytest.mark.parametrize("model_class", [ComplexParameters, Lazy, scripted_network])
def test_uncommon_network_trains(model_class: Any) -> None:
    assert run_epoch(make_fit(model_class, LEARNING_RATE=0.01), 1, None)[1]["train/accuracy"] > 0.3
