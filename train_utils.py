"""The train and test loops, and `run_epoch`: one epoch of one fit, the unit of work of the worker processes.

Nothing here writes a file or prints. What makes training fast is at the end, and may be skipped.
"""

import ast
import ctypes
import functools
import hashlib
import inspect
import math
import pickle
import random
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

import data_utils
from data_files import DEFAULT_SHAPE, cached_dataset, resolve_path
from data_utils import Batches, pixel_statistics, split

EVALUATION_BATCH_SIZE = 256  # larger batches do not fit into the processor's cache and are slower
EVALUATION_BATCH_VALUES = 2**20  # pixels × channels per evaluation batch of large images, which has at least 32 images
CHANNELS_LAST = torch.channels_last  # the memory layout in which convolutions are faster
State = dict[str, Any]  # state dicts of "model", "optimizer" and "scheduler"
Metrics = dict[str, Any]  # metric name → value, for one epoch
_process_lock = threading.Lock()  # threads take turns: the random generator and the thread count are global


@dataclass(frozen=True)
class Fit:
    """One model to train on some images and to evaluate on others, with everything that its result depends on.

    Attributes
    ----------
    name : str
        "final" or "fold-k".
    number : int
        0 for the final fit, k for fold k; a part of the fit's seed.
    model_class : callable
        Builds the network, without arguments.
    dataset, data_dir, data_digest : str
        Which data set, where it is stored, and the digest that it must have.
    image_shape : tuple of int
        Channels, height and width of its images.
    held_out_mask : bytes or None
        Which training images to evaluate on, as `data_utils.split` takes it; None for the final fit.
    epochs, batch_size, learning_rate, lr_schedule, mirror, rng_seed
        The constants of the entry scripts.
    device, precision : str
        As PyTorch names them.
    threads : int
        Number of threads on the CPU.
    code_digest : str
        What `code_digest()` returns in the process that started the run.
    """

    name: str
    number: int
    model_class: Callable[[], nn.Module]
    dataset: str
    data_dir: str
    data_digest: str
    image_shape: tuple[int, int, int]
    held_out_mask: bytes | None
    epochs: int
    batch_size: int
    learning_rate: float
    lr_schedule: str
    mirror: bool
    rng_seed: int
    device: str
    precision: str
    threads: int
    code_digest: str


class CodeChangedError(RuntimeError):
    """This process would train with other code than the run was started with."""

    exit_status = 1


def train_fit(fit: Fit) -> tuple[State, list[Metrics]]:
    """Train one fit from its first to its last epoch, in this process.

    Returns
    -------
    state : dict
        As `run_epoch` returns it after the last epoch.
    history : list of dict
        The metrics of each epoch.
    """
    state, history = None, []
    for epoch in range(1, fit.epochs + 1):
        state, metrics = run_epoch(fit, epoch, state)
        history.append(metrics)
    assert state is not None  # there is at least one epoch
    return state, history


def train_loop(
    dataloader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Train a model for one epoch.

    Parameters
    ----------
    dataloader : iterable of (images, labels)
        Float images (B, …) and int64 labels (B,), on the model's device.
    model : nn.Module
        Maps images to logits (B, classes).
    loss_fn : callable
        Maps logits and labels to the mean loss of the batch.
    optimizer : torch.optim.Optimizer
    scheduler : LRScheduler, optional
        Changes the learning rate after each batch.
    precision : torch.dtype
        What the network is computed in: float32, or bfloat16 by autocast. Parameters and loss are always float32.

    Returns
    -------
    loss, accuracy : float
        Mean loss per sample and share of correct predictions, each measured while the model was training.
    """
    model.train()
    losses, correct, sizes = [], [], []
    for images, labels in dataloader:
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
        loss = loss_fn(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())  # averaged at the end: reading a value here would synchronize a GPU in every step
        correct.append((logits.argmax(1) == labels).sum())
        sizes.append(len(labels))
    return _mean_per_sample(losses, sizes), torch.stack(correct).sum().item() / sum(sizes)


@torch.no_grad()
def test_loop(
    dataloader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    precision: torch.dtype = torch.float32,
    mirror: bool = False,
) -> tuple[float, Tensor, Tensor]:
    """Evaluate a model.

    Parameters
    ----------
    dataloader, model, loss_fn, precision
        As in `train_loop`.
    mirror : bool
        Average the class probabilities of each image and of its mirror image.

    Returns
    -------
    loss : float
        Mean loss per sample.
    labels, probabilities : Tensor
        int64 (N,) and float32 (N, classes), on the CPU, in the order of the batches.
    """
    model.eval()
    losses, all_labels, all_probabilities = [], [], []
    for images, labels in dataloader:
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits = model(images).float()
            if mirror:  # logaddexp gives log(p1 + p2), and the softmax of that is their mean
                logits = logits.log_softmax(1).logaddexp(model(images.flip(-1)).float().log_softmax(1))
        losses.append(loss_fn(logits, labels))
        all_labels.append(labels)
        all_probabilities.append(logits.softmax(1))
    mean_loss = _mean_per_sample(losses, [len(labels) for labels in all_labels])
    return mean_loss, torch.cat(all_labels).cpu(), torch.cat(all_probabilities).cpu()


def _mean_per_sample(losses: list[Tensor], sizes: list[int]) -> float:
    weights = torch.tensor(sizes, dtype=torch.float64)
    return (torch.stack(losses).cpu().double() @ weights / weights.sum()).item()


def compute_accuracy(labels: Tensor, probabilities: Tensor) -> float:
    """Return the share of correct predictions, given labels (N,) and class probabilities (N, classes)."""
    return (probabilities.argmax(1) == labels).double().mean().item()


def run_epoch(fit: Fit, epoch: int, state: State | None) -> tuple[State, Metrics]:
    """Train one fit for one epoch and evaluate it; the same arguments give the same bits in any process.

    Parameters
    ----------
    fit : Fit
    epoch : int
        From 1 to ``fit.epochs``.
    state : dict or None
        What the previous epoch returned, in any memory layout; None before the first epoch. It is not changed.

    Returns
    -------
    state : dict
        State dicts of "model", "optimizer" and "scheduler", on the CPU.
    metrics : dict
        ``epoch``, ``train/loss``, ``train/accuracy``, ``learning_rate`` (at the start of the epoch); for folds also
        ``validation/loss`` and ``validation/accuracy``. After the last epoch also "evaluation": loss, labels and class
        probabilities of the fold's held-out images or, for the final fit, of the test images.

    Raises
    ------
    data_files.DatasetError
        If this machine does not have the data set, or a different one of that name.
    CodeChangedError
        If the code of this module or of data_utils is not that of the process that started the run.
    """
    _check_code(fit)
    device, precision, seed = torch.device(fit.device), getattr(torch, fit.precision), epoch_seed(fit, epoch)
    with _process_lock, isolated_rng(fit.threads, seed, device):
        _tune_malloc()
        dataset = cached_dataset(fit.dataset, resolve_path(fit.data_dir), fit.data_digest, fit.image_shape)
        training_part, evaluation_part = split(dataset, fit.held_out_mask)
        mean, std = pixel_statistics(training_part.images, training_part.rows)
        training_batches = Batches(*training_part, fit.batch_size, mean, std, device, training=True, mirror=fit.mirror)

        model = build_network(fit.model_class, device, fit.image_shape)
        seed_generators(seed)  # again, so that the order of the images does not depend on the network
        loss_fn = nn.CrossEntropyLoss()
        optimizer = make_optimizer(model, fit.learning_rate)
        scheduler = make_scheduler(fit, optimizer, len(training_batches) * fit.epochs)
        if state is not None:
            load_state(state, model, optimizer, scheduler)

        learning_rate = scheduler.get_last_lr()[0]
        train_loss, train_accuracy = train_loop(training_batches, model, loss_fn, optimizer, scheduler, precision)
        metrics: Metrics = {
            "epoch": epoch,
            "learning_rate": learning_rate,
            "train/loss": train_loss,
            "train/accuracy": train_accuracy,
        }

        is_fold, is_last = fit.held_out_mask is not None, epoch == fit.epochs
        if is_fold or is_last:
            batch_size = evaluation_batch_size(fit.image_shape)
            evaluation_batches = Batches(*evaluation_part, batch_size, mean, std, device)
            # Always the plain cross-entropy, so that runs with different training losses can be compared.
            evaluation = test_loop(evaluation_batches, model, nn.CrossEntropyLoss(), precision, fit.mirror)
            if is_fold:
                loss, labels, probabilities = evaluation
                metrics |= {"validation/loss": loss, "validation/accuracy": compute_accuracy(labels, probabilities)}
            if is_last:
                metrics["evaluation"] = evaluation
        return get_state(model, optimizer, scheduler), metrics


def evaluation_batch_size(image_shape: tuple[int, int, int]) -> int:
    """Return how many images of a shape are evaluated at a time: fewer of large ones, which take much memory."""
    return min(EVALUATION_BATCH_SIZE, max(32, EVALUATION_BATCH_VALUES // math.prod(image_shape)))


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba 2014) for all parameters of a model."""
    is_complex = any(parameter.is_complex() for parameter in model.parameters())
    # The fused kernel is faster, but does not support complex parameters.
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=not is_complex)


def make_scheduler(fit: Fit, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return the learning-rate schedule of a fit that takes this number of steps."""
    if fit.lr_schedule == "one_cycle":
        return OneCycleLR(optimizer, fit.learning_rate, total_steps=steps)
    if fit.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return ConstantLR(optimizer, factor=1.0)


def load_state(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Load a state into model, optimizer and scheduler: copies of its tensors, in the memory layout of the parameters.

    ``Adam(fused=True)`` reads parameters and moments as flat memory. If a moment arrives in another layout, as it may
    from Dask, it computes wrong updates without an error.
    """
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):  # some optimizers also store numbers
                like = parameter if value.shape == parameter.shape else value
                values[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    scheduler.load_state_dict(state["scheduler"])


def get_state(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> State:
    """Return the state dicts of "model", "optimizer" and "scheduler" on the CPU; this moves the model there, too."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.cpu()
    return {
        "model": model.cpu().state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def epoch_seed(fit: Fit, epoch: int) -> int:
    """Return the seed of all random numbers in one epoch of a fit, from 0 to 2⁶⁴ − 1.

    Each fit has its own, the same in every run with the same RNG_SEED. If all fits shared one, the spread of the folds
    would not contain the effect of the seed, and a comparison of two runs would attribute it to the change.
    """
    sequence = np.random.SeedSequence((fit.rng_seed, fit.number, epoch))
    return int(sequence.generate_state(1, np.uint64)[0])


@contextmanager
def isolated_rng(threads: int, seed: int, device: torch.device) -> Iterator[None]:
    """Seed all random generators and set the number of threads; restore both at the end."""
    threads_before = torch.get_num_threads()
    numpy_before, python_before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_num_threads(threads)
        seed_generators(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            np.random.set_state(numpy_before)
            random.setstate(python_before)


def seed_generators(seed: int) -> None:
    """Seed the global random generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # its largest seed is 2³² − 1
    random.seed(seed)


# --- How a call and its outcome reach another process ---


class RemoteError:
    """Wraps an exception of an epoch as a return value: what a future itself raises is then the executor's failure."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the exception, and where its traceback points to, since a traceback cannot be pickled."""
        try:
            pickled = pickle.dumps(self.error)
            pickle.loads(pickled)
        except Exception:  # an exception class of the user's own may raise anything when it is pickled
            message = "".join(traceback.format_exception_only(self.error)).strip()
            pickled = pickle.dumps(RuntimeError(message))
        frames = traceback.extract_tb(self.error.__traceback__)
        return _unpickle_error, (pickled, [(frame.filename, frame.lineno, frame.name) for frame in frames])


def _unpickle_error(pickled: bytes, places: list[tuple[str, int, str]]) -> RemoteError:
    """Return another process's error with its traceback as a note; the source lines come from this process's files."""
    error = pickle.loads(pickled)
    stack = traceback.StackSummary.from_list([(file, line, name, None) for file, line, name in places])
    error.add_note("In a worker process, most recent call last:\n" + "".join(stack.format()).rstrip())
    return RemoteError(error)


def call_safely(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns or, if it raises an Exception or calls sys.exit, a `RemoteError`."""
    try:
        return function(*arguments)
    except Exception as error:
        return RemoteError(error)
    except SystemExit as end:  # would end a worker process without a message
        exit_error = RuntimeError(f"the network called sys.exit({end.code!r})")
        return RemoteError(exit_error.with_traceback(end.__traceback__))


@dataclass(frozen=True)
class CloudpickledFactory:
    """A function or class that is unpickled when it is called, so that `call_safely` catches errors of unpickling."""

    content: bytes

    def __call__(self) -> Any:
        """Unpickle the function or class, and call it."""
        return pickle.loads(self.content)()


# --- Which code trains: all fits of a run must be trained with the same ---


def _without_docstring(node: ast.FunctionDef | ast.Lambda) -> ast.AST:
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return node


def _read_functions(module: ModuleType) -> dict[tuple[str, int], str]:
    """Return the source of each function in a module's file, normalized, by file and first line."""
    functions = {}
    for node in ast.walk(_TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            first = min(getattr(node, "decorator_list", None) or [node], key=lambda part: part.lineno)
            functions[str(module.__file__), first.lineno] = ast.unparse(_without_docstring(node))
    return functions


def _read_assignments(module: ModuleType) -> dict[str, str]:
    """Return the source of the last assignment to each name at the top level of a module's file, normalized."""
    assignments: dict[str, str] = {}
    for node in _TREES[module].body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        assignments |= {target.id: ast.unparse(node) for target in targets if isinstance(target, ast.Name)}
    return assignments


_MODULES = (data_utils, sys.modules[__name__])
# Read when the module is imported, since the file may be edited later.
_TREES = {module: ast.parse(inspect.getsource(module)) for module in _MODULES}
_FUNCTIONS = _read_functions(data_utils) | _read_functions(sys.modules[__name__])
_ASSIGNMENTS = {module.__name__: _read_assignments(module) for module in _MODULES}
_LIBRARIES = ("torch", "numpy", "data_files")
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.memory_format)


def code_digests() -> dict[str, str]:
    """Return a digest of each function, class and constant of data_utils and train_utils, by ``module.name``.

    The digests are of the objects in memory: a function that is replaced at run time changes its digest, and an edited
    file does so once it is imported. Comments, docstrings and formatting do not count. Of an object of any other type,
    such as a loss function with arguments, the digest is that of the line that creates it.
    """
    digests = {}
    for module in _MODULES:
        for name, value in vars(module).items():
            if name.startswith("__") or name in ("_FUNCTIONS", "_ASSIGNMENTS"):
                continue
            code = _describe(value) or _ASSIGNMENTS[module.__name__].get(name)
            if code is not None:
                digests[f"{module.__name__}.{name}"] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return digests


def code_digest() -> str:
    """Return one digest per file, such as ``data_utils.py=3fa4… train_utils.py=90b1…``."""
    hashes = {module.__name__: hashlib.sha256() for module in _MODULES}
    for name, digest in sorted(code_digests().items()):
        hashes[name.partition(".")[0]].update(f"{name} {digest}\n".encode())
    return " ".join(f"{module}.py={sha.hexdigest()[:16]}" for module, sha in hashes.items())


def _check_code(fit: Fit) -> None:
    here = code_digest()
    if here == fit.code_digest:
        return
    pairs = zip(here.split(), fit.code_digest.split(), strict=True)
    files = [one.partition("=")[0] for one, other in pairs if one != other]
    raise CodeChangedError(
        f"{' and '.join(files)} was edited during the run: a process that started afterwards would train with "
        "other code than the rest of the run. Run the same command again to start a new run with the edited file."
    )


def _describe(value: Any, seen: set[int] | None = None) -> str | None:
    """Return what a constant, function, class or the user's module consists of; None for anything else.

    `seen` are the ids of what is described already: each object is described once.
    """
    if _is_constant(value):
        return _repr(value)
    if isinstance(value, (classmethod, staticmethod, property)):
        value = value.fget if isinstance(value, property) else value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    seen = set() if seen is None else seen
    if id(value) in seen or not isinstance(value, (FunctionType, type, ModuleType)):
        return None
    seen.add(id(value))
    if isinstance(value, ModuleType):
        return _describe_attributes(value, seen) if value not in _MODULES and _is_users(value.__name__) else None
    if _is_of_library(value.__module__):
        return None
    if isinstance(value, FunctionType):
        is_generated = value.__code__.co_filename == "<string>"  # by dataclasses, from the annotations
        return None if is_generated else _describe_function(value, seen)
    return f"{vars(value).get('__annotations__')!r}\n{_describe_attributes(value, seen)}"


def _describe_attributes(owner: type | ModuleType, seen: set[int]) -> str:
    """Return what the attributes of a class or module consist of, one per line."""
    parts = []
    for name, attribute in sorted(vars(owner).items()):
        is_metadata = name.startswith("__") and not callable(attribute)
        code = None if is_metadata else _describe(attribute, seen)
        if code is not None:
            parts.append(f"{name} {code}")
    return "\n".join(parts)


def _is_constant(value: Any) -> bool:
    """Return whether a value is a number, text or the like, or a container of such values."""
    if isinstance(value, dict):
        return all(map(_is_constant, [*value, *value.values()]))
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_constant, value))
    return isinstance(value, _CONSTANTS)


def _repr(value: Any) -> str:
    """Return the `repr` of a constant, with the elements of a set in order, which differs between processes."""
    return repr(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)


def _is_of_library(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _LIBRARIES or package in sys.stdlib_module_names


def _is_users(module: str) -> bool:
    """Return whether a module is a file of the user's own, not of an installed package."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not _is_of_library(module) and not re.search("(site|dist)-packages", file)


def _describe_function(function: FunctionType, seen: set[int]) -> str:
    """Return the source of a function in the two files; of any other its bytecode, defaults, and what it uses."""
    code = function.__code__
    source = _FUNCTIONS.get((code.co_filename, code.co_firstlineno))
    if source is not None:
        return source
    variables = inspect.getclosurevars(function)
    used = {**variables.globals, **variables.nonlocals}
    if not _is_users(function.__module__):
        used = {name: value for name, value in used.items() if _is_constant(value)}
    # Not their `repr`, which may contain an address in memory.
    used |= {f"default {number}": value for number, value in enumerate(function.__defaults__ or ())}
    used |= {f"default of {name}": value for name, value in (function.__kwdefaults__ or {}).items()}
    described = [
        (name, _describe(used[name], seen) or getattr(used[name], "__qualname__", "")) for name in sorted(used)
    ]
    return f"{_describe_bytecode(code)} {described}"


def _describe_bytecode(code: CodeType) -> str:
    constants = [_describe_bytecode(each) if isinstance(each, CodeType) else _repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


# --- What makes training fast. You may skip it: it changes how a network computes, not what it computes ---


def build_network(
    model_class: Callable[[], nn.Module], device: torch.device, image_shape: tuple[int, int, int] = DEFAULT_SHAPE
) -> nn.Module:
    """Build a network on a device, with the speed-ups below; its modules and their order stay as they are."""
    model = model_class().to(device)
    _initialize_lazy_modules(model, device, image_shape)
    if not _uses_view(model):
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=CHANNELS_LAST)
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            # A partial, unlike a method, can be pickled.
            module.forward = functools.partial(_fast_forward, module)  # type: ignore[method-assign]
    return model


def _initialize_lazy_modules(model: nn.Module, device: torch.device, image_shape: tuple[int, int, int]) -> None:
    """Evaluate, then train on two empty images: lazy modules get their sizes from the first batch."""
    for training in (False, True):
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
            with torch.no_grad():
                model.train(training)(torch.zeros(2, *image_shape, device=device))


def _uses_view(model: nn.Module) -> bool:
    """Return whether a module's forward calls `Tensor.view`, which fails if the channels are last in memory."""
    codes = [getattr(module.forward, "__code__", None) for module in model.modules()]
    return any("view" in getattr(code, "co_names", ()) for code in codes)


def _fast_forward(sequential: nn.Sequential, images: Tensor) -> Tensor:
    """Compute what nn.Sequential computes, to the bit, with less work."""
    modules = list(sequential)
    position = 0
    while position < len(modules):
        module = modules[position]
        next_module = modules[position + 1] if position + 1 < len(modules) else None
        if _is_plain_relu(module) and _is_plain_pooling(next_module):
            images = _pool_then_relu(next_module, images)
            position += 2
        else:
            images = module(images)
            position += 1
        if _is_plain_relu(module):
            _preserve_gradient_layout(images)
    return images


def _is_plain_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not module.inplace and not _has_hooks(module)


def _is_plain_pooling(module: nn.Module | None) -> bool:
    return type(module) is nn.MaxPool2d and not module.return_indices and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a hook sees the module's inputs or outputs, which must then be the ordinary ones."""
    own_hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own_hooks) or nn.modules.module._has_any_global_hook()


def _pool_then_relu(pooling: nn.Module | None, images: Tensor) -> Tensor:
    """Return the same as max pooling after ReLU, computed as ReLU after max pooling: fewer values for ReLU."""
    assert pooling is not None
    return torch.threshold(pooling(images), 0, 0)  # ReLU that allows a later in-place operation


def _preserve_gradient_layout(images: Tensor) -> None:
    """Keep the gradient in the layout of the images: `Flatten` returns it in another one, slow for convolutions."""
    if images.requires_grad and images.dim() == 4 and images.is_contiguous(memory_format=CHANNELS_LAST):
        images.register_hook(lambda gradient: gradient.contiguous(memory_format=CHANNELS_LAST))


def _tune_malloc() -> None:
    """Let glibc keep freed memory for the next batch (`man mallopt`); new pages can take a third of the time."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap shrinks only if this much is free at its end
