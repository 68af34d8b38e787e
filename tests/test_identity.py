"""When two runs compute the same, from what config.json records of them."""

from typing import Any

import pytest

from experiment.identity import HYPERPARAMETERS, same_fingerprint, same_identity, same_network

NETWORK: dict[str, Any] = {"name": "Net", "printed": "Net()", "parameters": 7, "fingerprint": [-2.0, 0.5, 1.0]}
IDENTITY: dict[str, Any] = {name: 1 for name in HYPERPARAMETERS} | {"device": "cpu", "network": NETWORK}


def test_identity_is_the_same_as_itself() -> None:
    assert same_identity(IDENTITY, IDENTITY | {"network": dict(NETWORK)})


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, "device"])
def test_identity_with_another_value_is_another(name: str) -> None:
    assert not same_identity(IDENTITY, IDENTITY | {name: 2})


def test_identity_with_other_names_is_another() -> None:
    more = IDENTITY | {"added later": 1}
    assert not same_identity(IDENTITY, more) and not same_identity(more, IDENTITY)


@pytest.mark.parametrize(
    "change", [{"name": "Other"}, {"printed": "Net(1)"}, {"parameters": 8}, {"fingerprint": [-2.0, 0.5, 1.1]}]
)
def test_another_network_is_another_identity(change: dict[str, Any]) -> None:
    other = NETWORK | change
    assert not same_network(NETWORK, other)
    assert not same_identity(IDENTITY, IDENTITY | {"network": other})


@pytest.mark.parametrize(("difference", "same"), [(0.0019, True), (0.0021, False)])
def test_fingerprints_may_differ_by_a_thousandth_of_their_largest_value(difference: float, same: bool) -> None:
    fingerprint = NETWORK["fingerprint"]
    other = [*fingerprint[:2], fingerprint[2] + difference]
    assert same_fingerprint(fingerprint, other) == same_fingerprint(other, fingerprint) == same


@pytest.mark.parametrize("fingerprint", [[], [0.0, 0.0], [1.7976931348623157e308, -1.0]])
def test_fingerprint_of_extreme_values_is_the_same_as_itself(fingerprint: list[float]) -> None:
    assert same_fingerprint(fingerprint, list(fingerprint))


def test_fingerprint_of_another_length_is_another() -> None:
    assert not same_fingerprint([1.0], [1.0, 1.0])
