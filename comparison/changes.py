"""The changes between two runs, and the run that differs least from another."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import zip_longest

from comparison.run_reader import FinishedRun, Identity, NetworkRecord, display_path
from experiment.identity import HYPERPARAMETERS, same_fingerprint

FOLD_SETTINGS = ("dataset", "image_shape", "folds", "rng_seed")  # which images a fold consists of
MAX_CLASSES_SHOWN = 3
MAX_LAYER_WIDTH = 40  # characters of a layer that was added, removed or replaced
PRINTED_DEFAULTS = {  # of PyTorch's layers, as they are printed
    *("stride=(1, 1)", "padding=0", "dilation=1", "ceil_mode=False", "bias=True", "inplace=False"),
    *("eps=1e-05", "momentum=0.1", "affine=True", "track_running_stats=True", "start_dim=1", "end_dim=-1"),
}


@dataclass(frozen=True)
class Change:
    """One change between two runs, such as ``MIRROR False → True`` or ``Dropout(p=0.5 → 0.2)``.

    `distance` is its weight in the distance between two runs: 1, or for another network class the number of changed
    lines.
    """

    text: str
    distance: int = 1


def changes_between(before: FinishedRun, after: FinishedRun) -> list[Change]:
    """Return all changes between two runs: constants, threads, PyTorch's version, and the network.

    Of networks of the same class, each changed line of the printed structure is one change.
    """
    changes = []
    for name in (*HYPERPARAMETERS, "device", "precision", "threads", "torch"):
        old, new = getattr(before.identity, name), getattr(after.identity, name)
        if old != new:
            label = name if name in ("threads", "torch") else name.upper()
            changes.append(Change(f"{label} {old} → {new}"))
    changes += _code_changes(before.identity.code, after.identity.code)
    return changes + _network_changes(before.identity.network, after.identity.network)


def _code_changes(before: dict[str, str], after: dict[str, str]) -> list[Change]:
    """Return the functions of the training code that differ, as one change that counts for each of them."""
    names = [name for name in before | after if before.get(name) != after.get(name)]
    if not names:
        return []
    functions = ", ".join(name.partition(".")[2] for name in names)
    return [Change(f"training code: {functions} edited", distance=len(names))]


def _network_changes(before: NetworkRecord, after: NetworkRecord) -> list[Change]:
    structure = _structure_changes(before.printed, after.printed)
    if before.name != after.name:
        parameters = f"{before.parameters:,} → {after.parameters:,} parameters"
        return [Change(f"network {before.name} → {after.name} ({parameters})", distance=max(1, len(structure)))]
    if structure:
        return list(structure)
    if before.fingerprint != after.fingerprint and not same_fingerprint(before.fingerprint, after.fingerprint):
        return [Change("network with the same structure but other outputs")]
    return []


@cache
def _structure_changes(printed_before: str, printed_after: str) -> tuple[Change, ...]:
    """Return each changed line of two printed networks as a change.

    The result is kept, because the page of all runs compares many runs of few networks.
    """
    lines = _changed_lines(_layers(printed_before), _layers(printed_after))
    return tuple(Change(_layer_change(old, new)) for old, new in lines)


def _layers(printed: str) -> list[str]:
    """Return the lines of a printed network without the layers' numbers, which shift when a layer is added.

    Lines with only a closing parenthesis are left out.
    """
    lines = re.sub(r"(?m)^( *)\(\d+\): ", r"\1", printed).splitlines()
    return [line for line in lines if line.strip() != ")"]


def _changed_lines(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each changed line with its replacement; "" stands for a line that one of them does not have."""
    for kind, start, end, new_start, new_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        for old, new in zip_longest(before[start:end], after[new_start:new_end], fillvalue=""):
            yield old.strip(), new.strip()


def _layer_change(old: str, new: str) -> str:
    """Return how a layer changed; of the same kind of layer only what differs, as in ``Linear(3136, 256 → 512)``."""
    if not old:
        return f"added {_shorten(new)}"
    if not new:
        return f"removed {_shorten(old)}"
    replaced = f"{_shorten(old)} → {_shorten(new)}"
    kind, arguments = _split_layer(old)
    new_kind, new_arguments = _split_layer(new)
    if kind != new_kind:
        shown = _without_defaults(arguments)
        has_same_arguments = shown and shown == _without_defaults(new_arguments)
        return f"{kind} → {new_kind}({', '.join(shown)})" if has_same_arguments else replaced
    positional = [argument for argument in arguments if "=" not in argument]
    new_positional = [argument for argument in new_arguments if "=" not in argument]
    if len(positional) != len(new_positional):
        return replaced
    shown = []
    for argument, new_argument in zip(positional, new_positional, strict=True):
        shown.append(argument if argument == new_argument else f"{argument} → {new_argument}")
    keywords, new_keywords = _keywords(arguments), _keywords(new_arguments)
    for name in keywords | new_keywords:
        value, new_value = keywords.get(name, "default"), new_keywords.get(name, "default")
        if value != new_value:
            shown.append(f"{name}={value} → {new_value}")
    return f"{kind}({', '.join(shown)})"


def _split_layer(line: str) -> tuple[str, list[str]]:
    """Return a printed layer's kind and arguments, such as ``Conv2d`` and ``["32", "64", "kernel_size=(3, 3)"]``."""
    match = re.fullmatch(r"((?:\(\w+\): )?\w+)\((.+)\)", line)
    if match is None:
        return line.removesuffix("()"), []
    return match[1], re.split(r", (?![^(]*\))", match[2])


def _keywords(arguments: Sequence[str]) -> dict[str, str]:
    """Return the values of a printed layer's arguments that have a name; PyTorch prints some only if they are set."""
    pairs = [argument.partition("=") for argument in arguments if "=" in argument]
    return {name: value for name, _, value in pairs}


def _without_defaults(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument not in PRINTED_DEFAULTS]


def _shorten(layer: str) -> str:
    """Return a printed layer without the defaults of its arguments, and of at most `MAX_LAYER_WIDTH` characters."""
    kind, arguments = _split_layer(layer)
    if arguments or layer.endswith("()"):
        layer = f"{kind}({', '.join(_without_defaults(arguments))})"
    return layer if len(layer) <= MAX_LAYER_WIDTH else f"{layer[: MAX_LAYER_WIDTH - 1]}…"


def describe_changes(changes: Sequence[Change], max_width: int, frequency: Mapping[str, int] | None = None) -> str:
    """Return changes as one string of about `max_width` characters; changes beyond that are counted.

    Parameters
    ----------
    changes : sequence of Change
    max_width : int
    frequency : mapping of str to int, optional
        How many runs have each change, by its text. The rarest come first: they distinguish a run from the others.
    """
    counts = Counter(change.text for change in changes)
    texts = list(counts)
    if frequency is not None:
        texts.sort(key=lambda text: frequency[text])
    shown: list[str] = []
    for text in texts:
        if counts[text] > 1:
            text = f"{text}, {counts[text]} times"
        if shown and len(", ".join([*shown, text])) > max_width:
            return f"{', '.join(shown)} and {len(texts) - len(shown)} more"
        shown.append(textwrap.shorten(text, max_width, placeholder=" …"))
    return ", ".join(shown) or "repetition"


def why_not_comparable(before: FinishedRun, after: FinishedRun) -> str | None:
    """Return why two runs cannot be compared, as one line; None if they can.

    Their folds must consist of the same images, and at least two folds must have a result in both.
    """
    if not same_images(before, after):
        reason = _why_other_images(before.identity, after.identity)
    elif len(before.folds.keys() & after.folds.keys()) < 2:
        reason = "fewer than two folds have a result in both"
    else:
        return None
    return f"{display_path(after.path)} cannot be compared with {display_path(before.path)}: {reason}."


def same_images(before: FinishedRun, after: FinishedRun) -> bool:
    """Return whether the folds of two runs consist of the same images, perhaps resized to different shapes."""
    one, other = before.identity, after.identity
    return one.images == other.images or (one.source != "" and one.source == other.source)


def _why_other_images(before: Identity, after: Identity) -> str:
    differing = _fold_settings_that_differ(before, after)
    if differing:
        old, new = getattr(before, differing[0]), getattr(after, differing[0])
        return f"{differing[0].upper()} is {new}, not {old}, so their folds consist of different images"
    return f"their folds consist of different images: the data set on disk was different{size_change(before, after)}"


def size_change(before: Identity, after: Identity) -> str:
    """Return which numbers of training images differ, in parentheses; "" if none does, or if they are not known."""
    old, new = before.class_sizes, after.class_sizes
    differing = [name for name in old | new if old.get(name, 0) != new.get(name, 0)]
    if not old or not new or not differing:
        return ""
    shown = [f"{name} {old.get(name, 0):,} → {new.get(name, 0):,}" for name in differing[:MAX_CLASSES_SHOWN]]
    more = f" and {len(differing) - MAX_CLASSES_SHOWN} more classes" if len(differing) > MAX_CLASSES_SHOWN else ""
    return f" ({sum(new.values()) - sum(old.values()):+,} training images: {', '.join(shown)}{more})"


def comparable(before: FinishedRun, after: FinishedRun) -> bool:
    """Return whether two runs can be compared."""
    return why_not_comparable(before, after) is None


def nearest_run(run: FinishedRun, runs: Sequence[FinishedRun]) -> FinishedRun | None:
    """Return the comparable run with the fewest changes, the newest of several; None if there is none.

    If one thing is changed at a time, the comparison therefore shows the effect of that one thing.
    """
    return run_with_fewest_changes(run, [other for other in runs if other.path != run.path and comparable(other, run)])


def run_with_fewest_changes(run: FinishedRun, others: Sequence[FinishedRun]) -> FinishedRun | None:
    """Return the run with the fewest changes, the newest of several, whether or not their metrics can be compared."""
    newest_first = sorted(others, key=lambda other: other.finished, reverse=True)
    return min(newest_first, key=lambda other: _distance(other, run), default=None)


def _distance(before: FinishedRun, after: FinishedRun) -> int:
    return sum(change.distance for change in changes_between(before, after))


def why_nothing_comparable(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """Return why a run has no comparable run among others, as one line."""
    if len(run.folds) < 2:
        return "Not compared with other runs: fewer than two folds have a result."
    others = [other for other in runs if other.path != run.path]
    if not others:
        return "First finished run: there is nothing to compare it with yet."
    if any(same_images(other, run) for other in others):
        return "Not compared with other runs: none has a result in two of the same folds."
    newest_first = sorted(others, key=lambda other: other.finished, reverse=True)
    nearest = min(newest_first, key=lambda other: len(_fold_settings_that_differ(other.identity, run.identity)))
    fewest = _fold_settings_that_differ(nearest.identity, run.identity)
    if not fewest:
        sizes = size_change(nearest.identity, run.identity)
        return f"First run with these images: the other runs on this data set used different images{sizes}."
    settings = ", ".join(f"{name.upper()} {getattr(run.identity, name)}" for name in fewest)
    return f"First run with these folds ({settings})."


def _fold_settings_that_differ(before: Identity, after: Identity) -> list[str]:
    """Return which of the settings that determine the folds differ between two runs.

    IMAGE_SHAPE is one of them only if a run did not record the digest of the images before they were resized.
    """
    names = [name for name in FOLD_SETTINGS if getattr(before, name) != getattr(after, name)]
    if before.source and after.source and "image_shape" in names:
        names.remove("image_shape")
    return names
