"""Learning curves as SVG: points, axes and descriptions."""

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hand_made import HISTORIES

from experiment.charts import MAX_POINTS, draw_learning_curves, draw_thumbnail


def paths_of(svg: str) -> dict[str, list[str]]:
    """Return the drawn lines by their CSS classes."""
    found: dict[str, list[str]] = {}
    for element in ElementTree.fromstring(svg):
        if element.tag == "path":
            found.setdefault(element.attrib["class"], []).append(element.attrib["d"])
    return found


def labels_of(svg: str) -> list[str]:
    return [str(element.text) for element in ElementTree.fromstring(svg) if element.tag == "text"]


def one_fold(*losses: float | None) -> dict[str, list[Any]]:
    return {"fold-1": [{"train/loss": loss, "validation/loss": loss} for loss in losses]}


def test_each_fold_their_mean_and_the_final_fit_are_drawn() -> None:
    paths = paths_of(draw_learning_curves(HISTORIES, "accuracy"))
    counts = {name: len(lines) for name, lines in paths.items() if name != "grid"}
    assert counts == {"train fold": 2, "validation fold": 2, "final": 1, "train mean": 1, "validation mean": 1}


def test_points_are_where_the_axis_has_their_values() -> None:
    svg = draw_learning_curves(one_fold(1.0, 0.5, 0.0), "loss")
    assert labels_of(svg)[:-4] == ["0", "0.2", "0.4", "0.6", "0.8", "1"] and labels_of(svg)[-4:-1] == ["1", "2", "3"]
    (line,) = paths_of(svg)["train mean"]
    ys = [float(point.split()[1]) for point in line[1:].split("L")]
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1) and ys[0] < ys[2]


def test_losses_of_very_different_size_have_a_logarithmic_axis() -> None:
    svg = draw_learning_curves(one_fold(10.0, 1.0, 0.1), "loss")
    (line,) = paths_of(svg)["train mean"]
    ys = [float(point.split()[1]) for point in line[1:].split("L")]
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1) and "0.1" in labels_of(svg)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_losses_that_are_not_finite_are_left_out(value: float | None) -> None:
    (line,) = paths_of(draw_learning_curves(one_fold(1.0, value, 0.5), "loss"))["train mean"]
    assert line.count("L") == 1 and "nan" not in line


def test_single_epoch_is_a_dot_and_no_epoch_is_no_drawing() -> None:
    assert "train mean dot" in paths_of(draw_learning_curves(one_fold(1.0), "loss"))
    without: list[dict[str, list[Any]]] = [{}, {"fold-1": []}, one_fold(math.nan), {"final": [], "fold-1": []}]
    for histories in without:
        assert draw_learning_curves(histories, "loss") == draw_thumbnail(histories) == ""


def test_mean_ends_with_the_shortest_fold() -> None:
    histories = one_fold(1.0, 0.5, 0.4) | {"fold-2": one_fold(2.0, 1.0)["fold-1"], "fold-3": []}
    assert paths_of(draw_learning_curves(histories, "loss"))["train mean"][0].count("L") == 1


def test_many_epochs_make_no_large_drawing() -> None:
    svg = draw_learning_curves(one_fold(*[1 / epoch for epoch in range(1, 5001)]), "loss")
    assert max(map(len, re.findall(r' d="(.*?)"', svg))) < 14 * (MAX_POINTS + 2)
    assert [label for label in labels_of(svg) if label == "5000"]


def test_description_has_the_first_and_the_last_value() -> None:
    assert ElementTree.fromstring(draw_learning_curves(HISTORIES, "loss")).attrib["aria-label"] == (
        "Loss after each epoch: mean training loss 1.1 after epoch 1, 0.7 after epoch 2; "
        "mean validation loss 0.9 after epoch 1, 0.6 after epoch 2."
    )


def test_thumbnail_has_the_two_means() -> None:
    assert sorted(paths_of(draw_thumbnail(HISTORIES))) == ["train mean", "validation mean"]
