"""When two runs compute the same, from what config.json records of them."""

from typing import Any

import pytest

from experiment.identity import HYPERPARAMETERS, same_fingerprint, same_identity

Fingerprint = dict[str, list[float]]
FINGERPRINT: Fingerprint = {"logits": [-2.0, 0.5, 1.0], "gradients": [5.0, 0.01]}
NETWORK: dict[str, Any] = {"name": "Net", "printed": "Net()", "parameters": 7, "fingerprint": FINGERPRINT}
IDENTITY: dict[str, Any] = {name: 1 for name in HYPERPARAMETERS} | {"device": "cpu", "code": {}, "network": NETWORK}


def test_identity_is_the_same_as_itself() -> None:
    assert same_identity(IDENTITY, IDENTITY | {"network": dict(NETWORK)})


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, "device", "code"])
def test_identity_with_another_value_is_another(name: str) -> None:
    assert not same_identity(IDENTITY, IDENTITY | {name: 2})


def test_identity_with_other_names_is_another() -> None:
    more = IDENTITY | {"added later": 1}
    assert not same_identity(IDENTITY, more) and not same_identity(more, IDENTITY)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Other"},
        {"printed": "Net(1)"},
        {"parameters": 8},
        {"fingerprint": FINGERPRINT | {"logits": [-2.0, 0.5, 1.1]}},
    ],
)
def test_another_network_is_another_identity(change: dict[str, Any]) -> None:
    other = NETWORK | change
    assert not same_identity({"network": NETWORK}, {"network": other})
    assert not same_identity(IDENTITY, IDENTITY | {"network": other})


@pytest.mark.parametrize(("difference", "same"), [(0.0019, True), (0.0021, False)])
def test_logits_may_differ_by_a_thousandth_of_the_largest(difference: float, same: bool) -> None:
    other = FINGERPRINT | {"logits": [-2.0, 0.5, 1 + difference]}
    assert same_fingerprint(FINGERPRINT, other) == same_fingerprint(other, FINGERPRINT) == same


@pytest.mark.parametrize(("gradient", "same"), [(0.010009, True), (0.01003, False), (0.0, False)])
def test_a_gradient_may_differ_by_a_thousandth_of_itself(gradient: float, same: bool) -> None:
    other = FINGERPRINT | {"gradients": [5.0, gradient]}
    assert same_fingerprint(FINGERPRINT, other) == same_fingerprint(other, FINGERPRINT) == same


def test_a_gradient_that_is_a_rounding_error_may_differ() -> None:
    one, other = ({"logits": [1.0], "gradients": [5.0, value]} for value in (1e-9, 3e-8))
    assert same_fingerprint(one, other)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.7976931348623157e308, -1.0]])
def test_fingerprint_of_extreme_values_is_the_same_as_itself(values: list[float]) -> None:
    fingerprint = {"logits": values, "gradients": [abs(value) for value in values]}
    assert same_fingerprint(fingerprint, dict(fingerprint))


@pytest.mark.parametrize("name", ["logits", "gradients"])
def test_fingerprint_of_another_length_is_another(name: str) -> None:
    assert not same_fingerprint(FINGERPRINT, FINGERPRINT | {name: [1.0]})
