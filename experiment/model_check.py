"""The check of the user's network before training, and the record that tells it apart from other networks."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_files import DEFAULT_SHAPE, ImageShape
from experiment.errors import ConfigurationError, end_traceback_at_user_code
from experiment.identity import same_fingerprint
from experiment.terminal import warn
from train_utils import build_network, isolated_rng, make_optimizer, seed_generators, train_loop

FINGERPRINT_IMAGES = 4
FINGERPRINT_SEED = 0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelSummary:
    """What config.json records of a network.

    Attributes
    ----------
    name : str
        The name of its class.
    printed : str
        Its structure as PyTorch prints it, without memory addresses.
    parameters : int
        The number of trainable parameters.
    fingerprint : dict
        Of the network built from a fixed seed, for a few fixed random images: its "logits" in training and in
        evaluation mode, and the norm of the "gradients" of each parameter. It changes with what `printed` does not
        show: a helper function, a constant, an initialisation, a `.detach()`.
    """

    name: str
    printed: str
    parameters: int
    fingerprint: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON stores it."""
        return asdict(self)


def check_model(
    model_class: Callable[[], nn.Module],
    device: str,
    precision: str,
    image_shape: ImageShape = DEFAULT_SHAPE,
    classes: int = 10,
    dataset: str = "the data set",
) -> ModelSummary:
    """Build a network twice, train it for one step, evaluate it, and describe it.

    Parameters
    ----------
    model_class : callable
        Returns the network; takes no arguments.
    device, precision : str
        Where and in what the training step is computed.
    image_shape : tuple of int
        Channels, height and width of the images.
    classes : int
        The number of classes of the data set.
    dataset : str
        What messages call the data set.

    Raises
    ------
    ConfigurationError
        If it is no network that PyTorch can train on the images, shares parameters with a second one that is built,
        does not return logits (N, C), C at least the number of classes, or has no trainable parameters.
    Exception
        What the network itself raises, with the user's own line as the last one of the traceback.
    """
    check_logits = functools.partial(_check_logits, classes=classes, dataset=dataset)
    build = functools.partial(build_module, model_class)
    try:
        with isolated_rng(torch.get_num_threads(), FINGERPRINT_SEED, torch.device(device)):
            first = build_network(build, CPU, image_shape)
            name = type(first).__name__
            outputs = _fingerprint_outputs(first, image_shape)
            for logits in outputs:
                check_logits(first, logits, FINGERPRINT_IMAGES)
            second = build_network(build, CPU, image_shape)
            _check_parameters(name, first, second)
            _check_gradient(first, outputs[0])
            fingerprint = _fingerprint(first, outputs, image_shape)
            train_device, dtype = torch.device(device), getattr(torch, precision)
            _train_and_evaluate(second.to(train_device), train_device, dtype, image_shape, check_logits)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the network raises
        if isinstance(error, (RuntimeError, ValueError, IndexError)):  # of PyTorch, if the shapes do not fit
            shape = ", ".join(map(str, image_shape))
            error.add_note(f"The images have the shape (N, {shape}), which IMAGE_SHAPE sets.")
        end_traceback_at_user_code(error, torch.__path__[0], train_loop.__code__.co_filename, __file__)
        raise
    _warn_of_probabilities(name, outputs[1])
    _warn_of_unused_logits(name, outputs[1], classes, dataset)
    parameters = sum(parameter.numel() for parameter in first.parameters() if parameter.requires_grad)
    return ModelSummary(name, _printed(first), parameters, fingerprint)


def is_same_network(
    recorded: dict[str, Any], model_class: Callable[[], nn.Module], image_shape: ImageShape = DEFAULT_SHAPE
) -> bool:
    """Return whether a class builds the network that was recorded in config.json; it may have another name."""
    with isolated_rng(torch.get_num_threads(), FINGERPRINT_SEED, CPU):
        network = build_network(model_class, CPU, image_shape)
        fingerprint = _fingerprint(network, _fingerprint_outputs(network, image_shape), image_shape)
    same_structure = recorded["printed"].partition("(")[2] == _printed(network).partition("(")[2]
    return same_structure and same_fingerprint(recorded["fingerprint"], fingerprint)


def check_callable(model_class: Callable[[], nn.Module]) -> None:
    """Check that a network can be built without arguments, as far as that shows without calling it.

    Raises
    ------
    ConfigurationError
        If it is built already, or needs arguments.
    """
    if isinstance(model_class, nn.Module):
        name = type(model_class).__name__
        raise ConfigurationError(
            f"the network must be a class, or a function that builds it, got a {name} that is already built: each fit "
            f"needs a new one, as in run_experiment({name}, …). Remove the parentheses behind it"
        )
    try:
        inspect.signature(model_class).bind()
    except ValueError:  # some callables written in C have no signature
        pass
    except TypeError as error:
        raise ConfigurationError(
            f"the network must be built without arguments: {error}. functools.partial(Net, width=32) gives a class its "
            "arguments"
        ) from None


def build_module(model_class: Callable[[], nn.Module]) -> nn.Module:
    """Return a network; raise a ConfigurationError if it is none, or if PyTorch cannot train it on the images."""
    network: Any = model_class()
    _check_defaults()
    if not isinstance(network, nn.Module):
        raise ConfigurationError(
            f"the function that builds the network must return an nn.Module, got {type(network).__name__}"
        )
    _check_hashable(network)
    return network


def _check_defaults() -> None:
    """Raise unless new tensors are float32 and on the CPU, as the images are when a network is checked."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise ConfigurationError(
            f"the images are float32, but PyTorch's default is {dtype}: remove the call of torch.set_default_dtype"
        )
    if device != CPU:
        raise ConfigurationError(
            f"networks are built on the CPU, but PyTorch's default is {device}: remove the call of "
            "torch.set_default_device and set DEVICE"
        )


def _check_hashable(module: nn.Module) -> None:
    """Raise if a module or one inside it cannot be a key of PyTorch's own dicts and sets."""
    if type(module).__hash__ is None:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be hashed, as PyTorch needs it: write @dataclass(eq=False) above the "
            "class, or __hash__ = nn.Module.__hash__ below its __eq__"
        )
    for child in module._modules.values():  # children() hashes them
        if child is not None:
            _check_hashable(child)


def _check_logits(network: nn.Module, logits: Any, images: int, classes: int, dataset: str) -> None:
    """Raise unless a network returned logits for that number of images, at least one per class."""
    name = type(network).__name__
    if not isinstance(logits, Tensor):
        raise ConfigurationError(f"{name} must return logits (N, {classes}), got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != images:
        advice = " for a single image: is there a squeeze()?" if images == 1 else ""
        raise ConfigurationError(f"{name} must return logits (N, {classes}), got {tuple(logits.shape)}{advice}")
    if logits.shape[1] < classes:
        returned = "1 logit" if logits.shape[1] == 1 else f"{logits.shape[1]} logits"
        raise ConfigurationError(
            f"{name} returns {returned}, but {dataset} has {classes} classes: let the last Linear return {classes}"
        )


def _check_gradient(network: nn.Module, logits: Tensor) -> None:
    if not logits.requires_grad:
        raise ConfigurationError(
            f"{type(network).__name__} returns logits without a gradient: look for torch.no_grad(), .detach(), .item() "
            "or numpy in its forward"
        )


def _check_parameters(name: str, first: nn.Module, second: nn.Module) -> None:
    """Check that there is something to train, and that it is not the same in two networks."""
    addresses = [
        {parameter.data_ptr() for parameter in network.parameters() if parameter.requires_grad and parameter.numel()}
        for network in (first, second)
    ]
    if not addresses[0]:
        raise ConfigurationError(f"{name} must have trainable parameters, got none")
    if addresses[0] & addresses[1]:
        raise ConfigurationError(
            f"{name} shares parameters with a second network that is built, so each fit would continue from the last "
            "one: create all layers in the function that returns the network"
        )


def _train_and_evaluate(
    network: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    image_shape: ImageShape,
    check_logits: Callable[[nn.Module, Any, int], None],
) -> None:
    """Take one training step on two images and evaluate one image, as the last batch may have only one."""
    images = _random_images(2, image_shape).to(device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    network.train()
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        logits = network(images)
    check_logits(network, logits, len(images))
    nn.CrossEntropyLoss()(logits.float(), labels).backward()
    make_optimizer(network, learning_rate=1e-3).step()
    # Batch norm without running statistics cannot evaluate a single image and raises a ValueError.
    single = None
    network.eval()
    with torch.no_grad(), contextlib.suppress(ValueError):
        single = network(images[:1])
    if single is not None:
        check_logits(network, single, 1)


def _warn_of_probabilities(name: str, outputs: Tensor) -> None:
    """Warn if a network ends in a softmax: the loss applies its own, so it would train badly and without an error."""
    sums = outputs.float().sum(1)  # the network may compute in another precision
    if (outputs >= 0).all() and torch.allclose(sums, torch.ones(len(sums)), atol=0.02):
        warn(f"{name} returns probabilities (rows that sum to 1), not logits: remove the softmax.")


def _warn_of_unused_logits(name: str, logits: Tensor, classes: int, dataset: str) -> None:
    """Warn if a network returns more logits than there are classes: the others get a part of the probability."""
    returned = logits.shape[1]
    if returned > classes:
        warn(
            f"{name} returns {returned} logits, but {dataset} has only {classes} classes: let the last Linear return "
            f"{classes}."
        )


def _printed(network: nn.Module) -> str:
    """Return the structure of a network as PyTorch prints it, without memory addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(network))


def _fingerprint_outputs(network: nn.Module, image_shape: ImageShape) -> list[Tensor]:
    """Return what a network returns for the fixed images in training mode, then in evaluation mode."""
    outputs = []
    for training in (True, False):
        network.train(training)
        outputs.append(network(_random_images(FINGERPRINT_IMAGES, image_shape)))
    return outputs


def _fingerprint(network: nn.Module, outputs: list[Tensor], image_shape: ImageShape) -> dict[str, list[float]]:
    """Return the logits, and the norm of each parameter's gradient in training mode."""
    seed_generators(FINGERPRINT_SEED)  # whatever was drawn since the network was built
    network.train()
    logits = network(_random_images(FINGERPRINT_IMAGES, image_shape))
    nn.CrossEntropyLoss()(logits, torch.arange(FINGERPRINT_IMAGES) % logits.shape[1]).backward()
    gradients = [0.0 if each.grad is None else float(each.grad.norm()) for each in network.parameters()]
    return {
        "logits": _to_floats(torch.cat(outputs).detach().flatten()),
        "gradients": _to_floats(torch.tensor(gradients)),
    }


def _to_floats(values: Tensor) -> list[float]:
    finite = values.double().nan_to_num()  # JSON has neither NaN nor infinity
    return [float(f"{value:.7g}") for value in finite.tolist()]


def _random_images(count: int, image_shape: ImageShape) -> Tensor:
    return torch.randn(count, *image_shape, generator=torch.Generator().manual_seed(FINGERPRINT_SEED))
