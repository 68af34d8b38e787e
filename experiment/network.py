"""The user's network: tried before anything starts, sent as it is in memory, and told apart from other networks."""

import contextlib
import copy
import inspect
import io
import marshal
import os
import pickle
import re
import site
import sys
import sysconfig
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from experiment.console import warn
from experiment.errors import ConfigurationError, RunError, end_traceback_outside, is_stop_of_an_agent
from experiment.plan import Plan
from train_utils import (
    Failure,
    Pickled,
    attempt,
    build_network,
    load_state,
    make_optimizer,
    state_of,
    threads_and_seed,
    train_loop,
)

ASKED_IMAGES = 4
TRIAL_SEED = 0
TOLERANCE = 1e-3  # two kinds of CPU differ by a few parts in a million
CPU = torch.device("cpu")
PROGRAM = ("experiment", "train_utils", "data_utils")  # what a worker has of this program, or never needs


class ByValue:
    """A function or a class that reaches other processes as it is in memory here, not as its file says.

    Called in this process, it is the function itself.

    Raises
    ------
    Exception
        Whatever cloudpickle raises where something in it, such as a lock, cannot be sent.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._pickled = function, _pickle_by_value(function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self._function(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as what another process can call."""
        return Pickled, (self._pickled,)


@dataclass(frozen=True)
class Network:
    """What the trial of a network found.

    Attributes
    ----------
    model_class : callable
        Builds it, here and in other processes.
    name : str
        Of its class.
    printed : str
        Its structure as PyTorch prints it, without addresses in memory.
    weights : int
        How many there are to train.
    answers : list of float
        The logits of a few random images, in training and in evaluation mode, from weights of a fixed seed.
    answers_again : bool
        Whether it gave the same ones when it was built a second time.
    """

    model_class: Callable[[], nn.Module]
    name: str
    printed: str
    weights: int
    answers: list[float]
    answers_again: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds of it."""
        return {"name": self.name, "printed": self.printed, "weights": self.weights, "answers": self.answers}


def same_network(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two networks, as `Network.to_dict` has them, have the same structure and answer alike."""
    structure = ("name", "printed", "weights")
    return all(one[key] == other[key] for key in structure) and same_answers(one["answers"], other["answers"])


def is_still(trained: dict[str, Any], model_class: Callable[[], nn.Module]) -> bool:
    """Return whether a class builds the network that was trained, as `Network.to_dict` has it, and no edited one.

    It may have another name. Where it answers otherwise each time that it is built, its structure alone counts.
    """
    structure = _printed(build_network(model_class, CPU)).partition("(")[2]
    answers, again = _answers_of(model_class), _answers_of(model_class)
    answers_alike = same_answers(trained["answers"], answers) or not same_answers(answers, again)
    return trained["printed"].partition("(")[2] == structure and answers_alike


def same_answers(one: list[float], other: list[float]) -> bool:
    """Return whether two networks answer alike, to a part in a thousand of the largest answer."""
    if len(one) != len(other):
        return False
    first, second = torch.tensor([one, other], dtype=torch.float64)
    return bool((first - second).abs().max() <= TOLERANCE * torch.maximum(first.abs(), second.abs()).max())


def try_network(model_class: Callable[[], nn.Module], plan: Plan) -> Network:
    """Build a network here, train it on two images and evaluate it: what is wrong with it shows here, and at once.

    Parameters
    ----------
    model_class : callable
        Returns the network; takes no arguments.
    plan : Plan
        Where and in what it will be trained.

    Raises
    ------
    ConfigurationError
        If it cannot be built without arguments, is not a new one each time, does not return logits (N, 10), has nothing
        to train, keeps a state that no checkpoint can hold, or cannot be sent.
    Exception
        What the network itself raises, with its own line as the last of the traceback.
    """
    _check_callable(model_class)
    sendable: Callable[[], nn.Module] = model_class
    if plan.is_sent:
        try:
            sendable = ByValue(model_class)  # before it is tried: what it counts anywhere has not begun yet
        except Exception as error:  # cloudpickle's, of whatever type
            raise ConfigurationError(
                f"the network cannot be sent to other processes: {_first_line(error)}. What it needs must be made in "
                "the network itself; or set WORKERS = 1"
            ) from None
    found = _tried(_examine, model_class, plan.device, plan.precision)
    if found["problem"]:
        raise ConfigurationError(f"{found['name']} {found['problem']}")
    answers_again = same_answers(found["answers"], _tried(_answers_of, model_class))
    network = Network(sendable, found["name"], found["printed"], found["weights"], found["answers"], answers_again)
    if not answers_again:
        found["doubts"].append(
            "answers otherwise when it is built a second time: what it keeps outside its weights and buffers begins "
            "anew in each epoch, or its random numbers are none that torch, numpy and random seed (docs/trouble.md)"
        )
    for doubt in found["doubts"]:
        warn(f"{network.name} {doubt}.")
    return network


def _tried(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function does with a network; raise what the network raises, with its own line as the last."""
    found = attempt(function, *arguments)
    if isinstance(found, Failure):
        end_traceback_outside(found.error, torch.__path__[0], train_loop.__code__.co_filename, __file__)
        raise found.error
    return found


def _check_callable(model_class: Callable[[], nn.Module]) -> None:
    if isinstance(model_class, nn.Module):
        name = type(model_class).__name__
        raise ConfigurationError(
            f"the network must be a class, or a function that builds it, got a {name} that is built already: each fit "
            f"needs a new one, as in run_experiment({name}, …), without brackets behind it"
        )
    try:
        inspect.signature(model_class).bind()
    except ValueError:  # not everything that is written in C says what it takes
        pass
    except TypeError as error:
        raise ConfigurationError(
            f"the network must be built without arguments: {error}. functools.partial(Net, width=32) gives a class its "
            "arguments"
        ) from None


def start_trial(network: Network, plan: Plan, pool: Executor) -> Future[Any]:
    """Let a network be tried where it will be trained.

    Raises
    ------
    RunError
        If the executor takes no work.
    """
    return submit(pool, attempt, ByValue(_examine), network.model_class, plan.device, plan.precision)


def check_trial(network: Network, trial: Future[Any]) -> None:
    """Compare what was found of a network elsewhere with what was found here.

    Raises
    ------
    ConfigurationError
        If it cannot be built there, or is another one there.
    RunError
        If the executor itself failed.
    """
    try:
        found = trial.result()
    except Exception as error:  # what goes wrong in the network is a Failure
        reason = f"{type(error).__name__}: {_first_paragraph(error)}"
        raise RunError(f"the executor failed at its first call: {reason}") from None
    advice = "Define it where other processes can import or rebuild all that it needs, or set WORKERS = 1"
    if isinstance(found, Failure):
        raise ConfigurationError(
            f"{network.name} works here, but not in the process that would train it: {type(found.error).__name__}: "
            f"{_first_line(found.error)}. {advice}"
        )
    if found["problem"] is None:
        there = {key: found[key] for key in network.to_dict()}
        if not network.answers_again:  # nor will it there, as the user has been told
            there["answers"] = network.answers
        if same_network(network.to_dict(), there):
            return
    raise ConfigurationError(
        f"{network.name} is another network in the process that would train it: it answers otherwise. {advice}"
    )


def submit(pool: Executor, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Give a call to an executor.

    Raises
    ------
    RunError
        If it takes no more work: one that was handed over may be broken, each in its own way.
    """
    try:
        return pool.submit(function, *arguments)
    except Exception as error:
        if is_stop_of_an_agent(error):
            raise
        raise RunError(f"{type(pool).__name__} takes no more work: {error}") from None


# From here to the end of the trial: sent to other processes by value, so it names nothing of this folder.


def _examine(model_class: Callable[[], nn.Module], device_name: str, precision_name: str) -> dict[str, Any]:
    """Try a network; return what it is, "problem" (what keeps it from being trained, or None), and else "doubts"."""
    device, precision = torch.device(device_name), getattr(torch, precision_name)
    with threads_and_seed(torch.get_num_threads(), TRIAL_SEED, device):
        network = build_network(model_class, device)
        weights = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        found: dict[str, Any] = {"name": type(network).__name__, "weights": weights, "printed": _printed(network)}
        found["problem"] = _train_once(network, device, precision)
        if found["problem"] is None:
            found["problem"] = _same_twice(model_class)
        if found["problem"] is None:
            found["problem"] = _save_and_load(network, model_class, device)
        if found["problem"] is None:
            found["answers"] = _answers_of(model_class)
            found["doubts"] = _doubts_about(model_class, found["answers"])
    return found


def _printed(network: nn.Module) -> str:
    """Return the structure of a network as PyTorch prints it, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(network))


def _train_once(network: nn.Module, device: torch.device, precision: torch.dtype) -> str | None:
    """Do a step of training and an evaluation; return what is wrong, unless the network itself raises something."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return "must have parameters that can be trained, got none"
    images, labels = _random_images(2).to(device), torch.zeros(2, dtype=torch.int64, device=device)
    for training in (False, True):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = network.train(training)(images)
        if not isinstance(logits, Tensor):
            return f"must return logits (N, 10), got {type(logits).__name__}"
        if logits.shape != (2, 10):
            return f"must return logits (N, 10), got {tuple(logits.shape)}"
        if training and not logits.requires_grad:
            return (
                "returns logits from which no gradient leads back to its weights: torch.no_grad(), .detach(), .item() "
                "or numpy cuts it off"
            )
    alone = _answer_to_one_image(network, device)
    if alone is not None and alone.shape != (1, 10):
        return f"must return logits (N, 10), of one image, too; got {tuple(alone.shape)}: is there a squeeze()?"
    nn.CrossEntropyLoss()(logits.float(), labels).backward()
    try:
        # Not fused: Adam(fused=True) writes without a word over what overlaps in memory, such as an expanded tensor.
        torch.optim.Adam(network.parameters(), lr=1e-3, fused=False).step()
    except RuntimeError as error:
        return f"has weights that the optimizer cannot change: {_first_line(error)}"
    return None


def _answer_to_one_image(network: nn.Module, device: torch.device) -> Tensor | None:
    """Return the logits of one image, such as the last batch may have; None where they cannot be had."""
    # Batch norm without running statistics raises a ValueError of a single image.
    with torch.no_grad(), contextlib.suppress(ValueError):
        return network.eval()(_random_images(1).to(device))
    return None


def _same_twice(model_class: Callable[[], nn.Module]) -> str | None:
    """Build a network twice; return what is wrong if what is trained in one is trained in the other."""
    one, other = build_network(model_class, CPU), build_network(model_class, CPU)  # at once: no memory is used again
    if _memory_of_what_is_trained(one) & _memory_of_what_is_trained(other):
        return (
            "is the same network, or has the same weights, when it is built a second time, so that each fit would go "
            "on from the last one's: build all of it in the function that returns it"
        )
    return None


def _memory_of_what_is_trained(network: nn.Module) -> set[int]:
    """Return where in memory the weights lie that are trained."""
    return {each.data_ptr() for each in network.parameters() if each.requires_grad and each.numel()}


def _save_and_load(network: nn.Module, model_class: Callable[[], nn.Module], device: torch.device) -> str | None:
    """Let a new network go on from the state of one; return what keeps it from that."""
    optimizer = make_optimizer(network, 1e-3)
    optimizer.step()
    buffer = io.BytesIO()
    state = state_of(network, optimizer)
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
    except Exception:  # whatever pickle raises of the user's own things
        names = [name for name, value in state["model"].items() if not isinstance(value, Tensor)]
        return (
            f"keeps what no checkpoint can hold (in {', '.join(names)}): beside tensors only numbers, texts, lists and "
            "dicts of these can be read back"
        )
    again = build_network(model_class, device)
    try:
        load_state(loaded, again, make_optimizer(again, 1e-3))
    except Exception as error:  # of set_extra_state, which is the user's, may come anything
        return f"cannot go on from its own state, as it must in each epoch: {_last_line(error)}"
    return None


def _doubts_about(model_class: Callable[[], nn.Module], answers: list[float]) -> list[str]:
    """Return what is probably a mistake, though the network can be trained."""
    doubts = []
    evaluating = torch.tensor(answers).view(2, ASKED_IMAGES, 10)[1]
    # A softmax that the network takes in a lower precision sums to 1 only roughly.
    if (evaluating >= 0).all() and torch.allclose(evaluating.sum(1), torch.ones(ASKED_IMAGES), atol=0.02):
        doubts.append("returns probabilities (rows that sum to 1), not logits: leave the softmax out")
    remembered = _remembered(model_class)
    if remembered:
        doubts.append(
            f"keeps {', '.join(remembered)} outside its weights and buffers, which begins anew in each epoch: what "
            "shall last is a buffer (docs/trouble.md)"
        )
    return doubts


def _remembered(model_class: Callable[[], nn.Module]) -> list[str]:
    """Return the attributes in which a network remembers what no state holds, by name.

    It is asked the same twice, from the same state and the same random numbers: a counter goes on from the first time,
    and what is only kept at hand, such as a mask or the last activations, is the same again.
    """
    network = build_network(model_class, CPU).train()
    state = copy.deepcopy(network.state_dict())
    kept = []
    for _ in range(2):
        network.load_state_dict(state)
        with threads_and_seed(torch.get_num_threads(), TRIAL_SEED, CPU), torch.no_grad():
            network(_random_images(ASKED_IMAGES))
        kept.append(_values_outside_the_state(network))
    first, second = kept
    return sorted(name for name, value in second.items() if first.get(name) != value)


def _values_outside_the_state(network: nn.Module) -> dict[str, bytes]:
    """Return what is kept in attributes of a network, of its modules and of their classes, pickled, by name."""
    of_any_module = vars(nn.Module()).keys()
    in_state = network.state_dict().keys()
    values: dict[str, Any] = {name: buffer for name, buffer in network.named_buffers() if name not in in_state}
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if name not in of_any_module:
                values[f"{path}.{name}".lstrip(".")] = value
    classes = {each for module in network.modules() for each in type(module).__mro__}
    for each in classes:
        for name, value in vars(each).items():
            values[f"{each.__name__}.{name}"] = value
    return {name: _as_bytes(value) for name, value in values.items()}


def _as_bytes(value: Any) -> bytes:
    """Return bytes that are equal if two values are; nothing of what cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _PicklerOfValues(buffer).dump(value)
    except Exception:  # the user's own things may raise anything
        return b""
    return buffer.getvalue()


class _PicklerOfValues(pickle.Pickler):
    """Pickles of a tensor its numbers alone, without where they lie."""

    def reducer_override(self, value: Any) -> Any:
        """Return how a value is pickled."""
        if isinstance(value, Tensor):
            return bytes, (value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),)
        return NotImplemented


def _answers_of(model_class: Callable[[], nn.Module]) -> list[float]:
    """Return the logits of a few random images, in training and in evaluation mode, from weights of a fixed seed."""
    with threads_and_seed(torch.get_num_threads(), TRIAL_SEED, CPU):
        network = build_network(model_class, CPU)
        answers = [network.train(training)(_random_images(ASKED_IMAGES)) for training in (True, False)]
        finite = torch.cat(answers).detach().flatten().double().nan_to_num()  # JSON knows neither NaN nor infinity
        return [float(f"{answer:.7g}") for answer in finite.tolist()]


def _random_images(count: int) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(TRIAL_SEED))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _first_paragraph(error: BaseException) -> str:
    return " ".join(str(error).strip().partition("\n\n")[0].split())


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


# How it is sent.


def _pickle_by_value(function: Callable[..., Any]) -> bytes:
    """Pickle a function or a class with the user's own code in it: elsewhere it may be missing, or be another."""
    added = []
    for module in [*_users_own_modules(), sys.modules[__name__]]:
        if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            added.append(module)
    try:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(function)
        return buffer.getvalue()
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    return marshal.loads, (marshal.dumps(code),)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's, but that code keeps the name of its file: an error is to be shown with its line."""

    dispatch_table = ChainMap({CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


def _users_own_modules() -> list[ModuleType]:
    """Return the modules that are neither installed nor of this program: elsewhere they may not be as they are here."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    folders += [os.path.realpath(folder) for folder in folders]
    installed = tuple(os.path.join(folder, "") for folder in folders)
    own = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        is_here = isinstance(module, ModuleType) and module.__name__ == name
        is_of_program = name.partition(".")[0] in PROGRAM
        if file and is_here and not is_of_program and not str(file).startswith(installed):
            own.append(module)
    return own
