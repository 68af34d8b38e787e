"""What the results of a run depend on, and when two runs compute the same."""

from collections.abc import Mapping
from typing import Any

# The constants of the entry scripts that say what is computed.
HYPERPARAMETERS = (
    "dataset",
    "image_shape",
    "folds",
    "epochs",
    "batch_size",
    "learning_rate",
    "lr_schedule",
    "mirror",
    "rng_seed",
)
KEPT_AT_RESUME = ("threads", "precision")  # a resumed run keeps its original values of these
MACHINE_DEPENDENT = ("torch", "device")  # can differ between machines with the same settings
UNEQUAL_CLASSES = 2  # ratio of the largest class to the smallest above which accuracy alone misleads
FINGERPRINT_TOLERANCE = 1e-3  # two types of CPU differ by a few parts in a million
NEGLIGIBLE_GRADIENT = 1e-6  # of the largest norm; below it are rounding errors, as for a bias before batch norm


def has_unequal_classes(class_sizes: Mapping[str, float]) -> bool:
    """Return whether macro F1 is shown beside the accuracy, given the number of training images of each class."""
    sizes = [size for size in class_sizes.values() if size]
    return bool(sizes) and max(sizes) > UNEQUAL_CLASSES * min(sizes)


def same_identity(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two runs compute the same, so that one may resume the other.

    Parameters
    ----------
    one, other : dict
        "identity" of two runs' config.json. Everything must be equal; fingerprints may differ a little.
    """
    return not differing_parts(one, other)


def differing_parts(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Return the names of the parts in which the identities of two runs differ.

    "network" stands for another structure, "fingerprint" for another fingerprint of the same structure.
    """
    different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} - {"network"}
    networks = one["network"], other["network"]
    if not same_structure(*networks):
        different.add("network")
    elif not same_fingerprint(*(network["fingerprint"] for network in networks)):
        different.add("fingerprint")
    return different


def same_structure(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two networks have the same name, layers and number of parameters."""
    return all(one[name] == other[name] for name in ("name", "printed", "parameters"))


def same_fingerprint(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Return whether two fingerprints agree to one part in a thousand.

    Differences of logits are relative to the largest logit, those of a gradient's norm to this norm.
    """
    if any(len(one[name]) != len(other[name]) for name in ("logits", "gradients")):
        return False
    largest_logit, largest_gradient = (
        max(map(abs, one[name] + other[name]), default=0.0) for name in ("logits", "gradients")
    )
    for first, second in zip(one["logits"], other["logits"], strict=True):
        if abs(first - second) > FINGERPRINT_TOLERANCE * largest_logit:
            return False
    for first, second in zip(one["gradients"], other["gradients"], strict=True):
        tolerance = FINGERPRINT_TOLERANCE * max(first, second) + NEGLIGIBLE_GRADIENT * largest_gradient
        if abs(first - second) > tolerance:
            return False
    return True
