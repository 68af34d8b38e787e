"""One epoch of one network: the train and test loops, and `run_epoch`, which worker processes compute.

Nothing here writes a file or talks to the user. What makes it fast without changing a bit stands at the end.
"""

import ctypes
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from data_utils import Batches, cached_dataset, path_of, pixel_statistics, split

EVALUATION_BATCH_SIZE = 256  # larger ones leave the processor's cache and are slower
CHANNELS_LAST = torch.channels_last  # the layout in which convolutions are faster
State = dict[str, Any]  # state dicts of "model", "optimizer" and "scheduler"
Metrics = dict[str, Any]  # of one epoch, by the names under which they are logged
_one_at_a_time = threading.Lock()  # a process has one random generator and one number of threads


@dataclass(frozen=True)
class Fit:
    """One model to train on some images and to evaluate on others, with all that its bits depend on.

    `number` is part of its seed: 0 for the final fit, k for fold k. `held_out_mask` says which training images to
    evaluate on, as `data_utils.split` takes it; None makes it the final fit.
    """

    name: str
    number: int
    model_class: Callable[[], nn.Module]
    dataset: str
    data_dir: str
    data_digest: str
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
    model, loss_fn
        From images to logits (B, classes), and from logits and labels to the batch's mean loss.
    optimizer, scheduler
        The scheduler, if there is one, changes the learning rate after each batch.
    precision : torch.dtype
        What the network is computed in: float32, or bfloat16 by autocast. Weights and loss are float32 in any case.

    Returns
    -------
    loss, accuracy : float
        Mean loss per sample and share of right predictions, both as they were while training.
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
        losses.append(loss.detach())  # summed up at the end: reading a value here would make a GPU wait
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
    """Evaluate a model; what it takes is what `train_loop` takes of the same name.

    With `mirror`, the answer to an image is the mean of the class probabilities of it and of its mirror image.

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
            if mirror:  # the logarithm of the sum of both probabilities: logits of their mean
                logits = logits.log_softmax(1).logaddexp(model(images.flip(-1)).float().log_softmax(1))
        losses.append(loss_fn(logits, labels))
        all_labels.append(labels)
        all_probabilities.append(logits.softmax(1))
    mean_loss = _mean_per_sample(losses, [len(labels) for labels in all_labels])
    return mean_loss, torch.cat(all_labels).cpu(), torch.cat(all_probabilities).cpu()


def _mean_per_sample(losses: list[Tensor], sizes: list[int]) -> float:
    weights = torch.tensor(sizes, dtype=torch.float64)
    return (torch.stack(losses).cpu().double() @ weights / weights.sum()).item()


def run_epoch(fit: Fit, epoch: int, state: State | None) -> tuple[State, Metrics]:
    """Train one fit for one epoch and evaluate it where that is due; the same arguments give the same bits.

    Parameters
    ----------
    fit : Fit
    epoch : int
        From 1 to ``fit.epochs``.
    state : dict or None
        What the epoch before returned, in whatever memory layout; None before the first. It is left as it is.

    Returns
    -------
    state : dict
        State dicts of "model", "optimizer" and "scheduler", on the CPU.
    metrics : dict
        ``epoch``, ``train/loss``, ``train/accuracy``, ``learning_rate`` (at the epoch's start); for folds also
        ``validation/loss`` and ``validation/accuracy``. After the last epoch also "evaluation": loss, labels and class
        probabilities of the images held out, or of the test images.

    Raises
    ------
    data_utils.DatasetError
        If this machine cannot get the data set, or has another one of that name.
    """
    device, precision = torch.device(fit.device), getattr(torch, fit.precision)
    with _one_at_a_time, threads_and_seed(fit.threads, seed_of(fit, epoch), device):
        _keep_freed_memory()
        dataset = cached_dataset(fit.dataset, path_of(fit.data_dir), fit.data_digest)
        training_part, evaluation_part = split(dataset, fit.held_out_mask)
        mean, std = pixel_statistics(training_part[0])
        training_batches = Batches(*training_part, fit.batch_size, mean, std, device, training=True, mirror=fit.mirror)

        model = build_network(fit.model_class, device)
        loss_fn = nn.CrossEntropyLoss()
        optimizer = make_optimizer(model, fit.learning_rate)
        scheduler = _make_scheduler(fit, optimizer, len(training_batches) * fit.epochs)
        if state is not None:
            load_state(state, model, optimizer)
            scheduler.load_state_dict(state["scheduler"])

        metrics: Metrics = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        train_loss, train_accuracy = train_loop(training_batches, model, loss_fn, optimizer, scheduler, precision)
        metrics |= {"train/loss": train_loss, "train/accuracy": train_accuracy}

        is_fold, is_last = fit.held_out_mask is not None, epoch == fit.epochs
        if is_fold or is_last:
            evaluation_batches = Batches(*evaluation_part, EVALUATION_BATCH_SIZE, mean, std, device)
            evaluation = test_loop(evaluation_batches, model, loss_fn, precision, fit.mirror)
            if is_fold:
                metrics |= {"validation/loss": evaluation[0], "validation/accuracy": accuracy_of(*evaluation[1:])}
            if is_last:
                metrics["evaluation"] = evaluation
        return state_of(model, optimizer) | {"scheduler": scheduler.state_dict()}, metrics


def seed_of(fit: Fit, epoch: int) -> int:
    """Return the seed of all that is random in one epoch of a fit, from 0 to 2⁶⁴ − 1.

    Each fit has its own, and the same one in every run of the same RNG_SEED. With one for all, the spread of the folds
    would not show what the seed is worth, and a comparison of two runs would take it for an effect (docs/results.md).
    """
    sequence = np.random.SeedSequence((fit.rng_seed, fit.number, epoch))
    return int(sequence.generate_state(1, np.uint64)[0])


def accuracy_of(labels: Tensor, probabilities: Tensor) -> float:
    """Return the share of right answers, of labels (N,) and class probabilities (N, classes)."""
    return (probabilities.argmax(1) == labels).double().mean().item()


@contextmanager
def threads_and_seed(threads: int, seed: int, device: torch.device) -> Iterator[None]:
    """Compute with so many threads, everything random seeded; leave threads and generators as they were."""
    threads_before = torch.get_num_threads()
    numpy_before, python_before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # it takes no more
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            np.random.set_state(numpy_before)
            random.setstate(python_before)


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba, 2014) for all weights of a model; fused, which knows no complex weights."""
    is_complex = any(parameter.is_complex() for parameter in model.parameters())
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=not is_complex)


def _make_scheduler(fit: Fit, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return the scheduler of a fit that takes so many steps; the optimizer's learning rate is the peak of each."""
    if fit.lr_schedule == "one_cycle":
        return OneCycleLR(optimizer, fit.learning_rate, total_steps=steps)
    if fit.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return ConstantLR(optimizer, factor=1.0)


def load_state(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Go on from a state, with copies of its tensors that lie in memory as the model's parameters do.

    Adam(fused=True) reads both as flat memory: in another layout, which Dask may send, it computes something else.
    """
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            like = parameter if value.shape == parameter.shape else value
            values[name] = torch.empty_like(like).copy_(value)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return the state dicts of "model" and "optimizer", on the CPU; the model goes there, too."""
    for values in optimizer.state.values():
        for name, value in values.items():
            values[name] = value.cpu()
    return {"model": model.cpu().state_dict(), "optimizer": optimizer.state_dict()}


class Failure:
    """What went wrong in a call, as a value; `error` is the exception.

    So whatever an executor raises is the executor's own failure, and nobody has to guess whose an exception is.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it with the places of its traceback, since a traceback cannot be pickled."""
        try:
            pickled = pickle.dumps(self.error)
            pickle.loads(pickled)
        except Exception:  # an exception of the user's own may raise anything when it is pickled
            in_words = RuntimeError("".join(traceback.format_exception_only(self.error)).strip())
            pickled = pickle.dumps(in_words)
        frames = traceback.extract_tb(self.error.__traceback__)
        return _failure_elsewhere, (pickled, [(frame.filename, frame.lineno, frame.name) for frame in frames])


def _failure_elsewhere(pickled: bytes, places: list[tuple[str, int, str]]) -> Failure:
    """Return a failure of another process with its traceback as a note; a notebook's lines are known only here."""
    error = pickle.loads(pickled)
    stack = traceback.StackSummary.from_list([(file, line, name, None) for file, line, name in places])
    error.add_note("In a worker process, most recent call last:\n" + "".join(stack.format()).rstrip())
    return Failure(error)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns or, if anything goes wrong in it, a `Failure`."""
    try:
        return function(*arguments)
    except Exception as error:
        return Failure(error)
    except SystemExit as end:  # which would end a worker process without a word
        told = RuntimeError(f"the network called sys.exit({end.code!r})")
        return Failure(told.with_traceback(end.__traceback__))


@dataclass(frozen=True)
class Pickled:
    """A function or a class that is taken out of its pickle where it is called, so that this, too, can be attempted."""

    content: bytes

    def __call__(self, *arguments: Any) -> Any:
        """Call what is in the pickle."""
        return pickle.loads(self.content)(*arguments)


# What follows makes it fast, and may be skipped: it changes how a network computes, but no bit of what it computes.


def build_network(model_class: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build a network as it is trained: on its device, and fast. Its layers and their order stay what they were."""
    model = model_class().to(device)
    _give_lazy_layers_their_sizes(model, device)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=CHANNELS_LAST)
    for module in model.modules():
        if getattr(type(module), "forward", None) is nn.Sequential.forward:
            module.forward = MethodType(_forward_fast, module)
    return model


def _give_lazy_layers_their_sizes(model: nn.Module, device: torch.device) -> None:
    """Ask a network about two images, evaluating, then training: lazy layers take their sizes from the first batch."""
    for training in (False, True):
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
            with torch.no_grad():
                model.train(training)(torch.zeros(2, 1, 28, 28, device=device))


def _forward_fast(self: nn.Sequential, images: Tensor) -> Tensor:
    """Compute what nn.Sequential computes, to the bit, with less work."""
    layers = list(self)
    position = 0
    while position < len(layers):
        layer = layers[position]
        next_layer = layers[position + 1] if position + 1 < len(layers) else None
        if _is_plain_relu(layer) and _is_plain_pooling(next_layer):
            images = _pool_first(next_layer, images)
            position += 2
        else:
            images = layer(images)
            position += 1
        if _is_plain_relu(layer):
            _keep_layout_of_gradient(images)
    return images


def _is_plain_relu(layer: nn.Module) -> bool:
    return type(layer) is nn.ReLU and not layer.inplace and not _has_hooks(layer)


def _is_plain_pooling(layer: nn.Module | None) -> bool:
    return type(layer) is nn.MaxPool2d and not layer.return_indices and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    """Return whether anybody looks at what goes into a layer or comes out of it."""
    of_its_own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(of_its_own) or nn.modules.module._has_any_global_hook()


def _pool_first(pooling: nn.Module | None, images: Tensor) -> Tensor:
    """Return ReLU, then max pooling, of images: in the other order, which has a quarter of the work for ReLU."""
    assert pooling is not None
    return torch.threshold(pooling(images), 0, 0)  # ReLU; the result of torch.relu may not be changed in place


def _keep_layout_of_gradient(images: Tensor) -> None:
    """Let the gradient of images come back in their layout: out of `Flatten` it has another, slow for what is below."""
    if images.requires_grad and images.dim() == 4 and images.is_contiguous(memory_format=CHANNELS_LAST):
        images.register_hook(lambda gradient: gradient.contiguous(memory_format=CHANNELS_LAST))


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch (`man mallopt`), where new pages may take a third of the time."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap shrinks only where so much is free at its end
