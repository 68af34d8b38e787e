"""How numbers look in messages, tables and pages."""

import pytest

from experiment.formatting import format_metric


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.93216, "0.9322"), (2544924268806259.0, "2.545e+15"), (-1e9, "-1e+09")],
)
def test_metric_has_four_decimals_unless_it_is_very_large(value: float, shown: str) -> None:
    assert format_metric(value) == shown
