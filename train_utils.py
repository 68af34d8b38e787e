"""One epoch of one network: the train and test loops, and `run_epoch`, which worker processes compute.

Nothing here writes a file or talks to the user. What makes it fast without changing a bit stands at the end.
"""

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
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
_one_at_a_time = threading.Lock()  # a process has one random generator and one number of threads


@dataclass(frozen=True)
class Fit:
    """One model to train on some images and to evaluate on others, with all that its bits depend on.

    `held_out` are the training images to evaluate on, as `data_utils.split` takes them; None makes it the final fit.
    """

    name: str
    model_class: Callable[[], nn.Module]
    dataset: str
    data_dir: str
    data_digest: str
    held_out: bytes | None
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


def run_epoch(fit: Fit, epoch: int, state: State | None) -> tuple[State, dict[str, Any]]:
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
    with _one_at_a_time:
        _keep_freed_memory()
        torch.set_num_threads(fit.threads)
        torch.manual_seed(int(np.random.SeedSequence((fit.rng_seed, epoch)).generate_state(1, np.uint64)[0]))
        device, precision = torch.device(fit.device), getattr(torch, fit.precision)
        train_on, evaluate_on = split(cached_dataset(fit.dataset, path_of(fit.data_dir), fit.data_digest), fit.held_out)
        mean, std = pixel_statistics(train_on[0])
        batches = Batches(*train_on, fit.batch_size, mean, std, device, training=True, mirror=fit.mirror)
        model = build_network(fit.model_class, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=fit.learning_rate, fused=True)
        scheduler = _make_scheduler(fit, optimizer, len(batches) * fit.epochs)
        if state is not None:
            _load(state, model, optimizer, scheduler)

        loss_fn = nn.CrossEntropyLoss()
        metrics: dict[str, Any] = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        loss, accuracy = train_loop(batches, model, loss_fn, optimizer, scheduler, precision)
        metrics |= {"train/loss": loss, "train/accuracy": accuracy}
        if fit.held_out is not None or epoch == fit.epochs:
            batches = Batches(*evaluate_on, EVALUATION_BATCH_SIZE, mean, std, device)
            loss, labels, probabilities = test_loop(batches, model, loss_fn, precision, fit.mirror)
            if fit.held_out is not None:
                accuracy = (probabilities.argmax(1) == labels).double().mean().item()
                metrics |= {"validation/loss": loss, "validation/accuracy": accuracy}
            if epoch == fit.epochs:
                metrics["evaluation"] = loss, labels, probabilities
        for values in optimizer.state.values():
            values |= {name: value.cpu() for name, value in values.items()}
        parts: dict[str, Any] = {"model": model.cpu(), "optimizer": optimizer, "scheduler": scheduler}
        return {name: part.state_dict() for name, part in parts.items()}, metrics


def _make_scheduler(fit: Fit, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return the scheduler of a fit that takes so many steps; the optimizer's learning rate is the peak of each."""
    if fit.lr_schedule == "one_cycle":
        return OneCycleLR(optimizer, fit.learning_rate, total_steps=steps)
    if fit.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    return ConstantLR(optimizer, factor=1.0)


def _load(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Go on from a state, with copies of its tensors that lie in memory as the model's parameters do.

    Adam(fused=True) reads both as flat memory: in another layout, which Dask may send, it computes something else.
    """
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            values[name] = torch.empty_like(parameter if value.shape == parameter.shape else value).copy_(value)


def build_network(model_class: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build a network as it is trained: on its device, and fast. Its layers and their order stay what they were."""
    model = model_class().to(device)
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        with torch.no_grad():  # lazy layers take their sizes from the first batch
            model.eval()(torch.zeros(2, 1, 28, 28, device=device))
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=CHANNELS_LAST)
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward:
            module.forward = MethodType(_forward_fast, module)
    return model


def _forward_fast(self: nn.Sequential, images: Tensor) -> Tensor:
    """Compute what nn.Sequential computes, to the bit, with less work.

    Pooling before ReLU gives the same values for a quarter of ReLU's work. And what comes back to ReLU from flattened
    images lies in memory in another layout, which would slow down all layers below: it is put right there.
    """
    layers = deque(self)
    while layers:
        layer = layers.popleft()
        is_relu = type(layer) is nn.ReLU and not layer.inplace
        if is_relu and layers and type(layers[0]) is nn.MaxPool2d and not layers[0].return_indices:
            images = torch.threshold(layers.popleft()(images), 0, 0)  # ReLU, whose result may be changed in place
        else:
            images = layer(images)
        if is_relu and images.requires_grad and images.dim() == 4 and images.is_contiguous(memory_format=CHANNELS_LAST):
            images.register_hook(lambda gradient: gradient.contiguous(memory_format=CHANNELS_LAST))
    return images


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch (`man mallopt`), where new pages may take a third of the time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap shrinks only where so much is free at its end
