"""What the results of a run depend on, and when two runs compute the same."""

from typing import Any

# The constants of the entry scripts that say what is computed.
HYPERPARAMETERS = ("dataset", "folds", "epochs", "batch_size", "learning_rate", "lr_schedule", "mirror", "rng_seed")
FINGERPRINT_TOLERANCE = 1e-3  # two types of CPU differ by a few parts in a million


def same_identity(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two runs compute the same, so that one may resume the other.

    Parameters
    ----------
    one, other : dict
        "identity" of two runs' config.json. Everything must be equal; fingerprints may differ a little.
    """
    if one.keys() != other.keys():
        return False
    rest_is_equal = all(one[name] == other[name] for name in one if name != "network")
    return rest_is_equal and same_network(one["network"], other["network"])


def same_network(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two networks, as config.json records them, have the same structure and fingerprint."""
    same_structure = all(one[name] == other[name] for name in ("name", "printed", "parameters"))
    return same_structure and same_fingerprint(one["fingerprint"], other["fingerprint"])


def same_fingerprint(one: list[float], other: list[float]) -> bool:
    """Return whether two fingerprints agree to one part in a thousand of their largest value."""
    if len(one) != len(other):
        return False
    largest = max(map(abs, [*one, *other]), default=0.0)
    difference = max((abs(first - second) for first, second in zip(one, other, strict=True)), default=0.0)
    return difference <= FINGERPRINT_TOLERANCE * largest
