"""Changes between two runs, which runs are comparable, and which is the nearest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import PRINTED, make_run

from comparison.changes import (
    Change,
    changes_between,
    comparable,
    describe_changes,
    nearest_run,
    why_not_comparable,
    why_nothing_comparable,
)
from comparison.run_reader import display_path, read_run

DROPOUT = PRINTED.replace("    (2)", "    (2): Dropout(p=0.5, inplace=False)\n    (3)")


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def changes(tmp_path: Path, old: dict[str, Any] | None = None, **new: Any) -> list[str]:
    """Return the changes between a run with the network `old` and one with the identity `new`."""
    one, other = make_run(tmp_path / "one", network=old), make_run(tmp_path / "other", **new)
    return [change.text for change in changes_between(read_run(one), read_run(other))]


def make_fingerprint(last_logit: float) -> dict[str, list[float]]:
    return {"logits": [0.5, -1.25, last_logit], "gradients": [0.25, 1.5]}


def test_repetition_has_no_changes(tmp_path: Path) -> None:
    assert changes(tmp_path) == []


def test_every_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    found = changes(tmp_path, epochs=3, mirror=True, device="cuda", precision="bfloat16", threads=2, torch="2.15.0")
    assert found == [
        "EPOCHS 10 → 3",
        "MIRROR False → True",
        "DEVICE cpu → cuda",
        "PRECISION float32 → bfloat16",
        "threads 1 → 2",
        "torch 2.14.1 → 2.15.0",
    ]


def test_added_layer_is_one_change_although_later_numbers_shift(tmp_path: Path) -> None:
    assert changes(tmp_path, network={"printed": DROPOUT}) == ["added Dropout(p=0.5)"]


def test_removed_layer_is_one_change(tmp_path: Path) -> None:
    assert changes(tmp_path, {"printed": DROPOUT}) == ["removed Dropout(p=0.5)"]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("ReLU()", "Tanh()", "ReLU() → Tanh()"),
        ("ReLU()", "PReLU(num_parameters=1)", "ReLU() → PReLU(num_parameters=1)"),
        ("Dropout(p=0.5, inplace=False)", "Dropout(p=0.2, inplace=False)", "Dropout(p=0.5 → 0.2)"),
        (
            "Conv2d(32, 64, kernel_size=(3, 3), padding=(1, 1))",
            "Conv2d(32, 96, kernel_size=(5, 5), padding=(1, 1))",
            "Conv2d(32, 64 → 96, kernel_size=(3, 3) → (5, 5))",
        ),
        (
            "Conv2d(1, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)",
            "Conv2d(1, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
            "Conv2d(1, 32, bias=False → default)",
        ),
        (
            "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)",
            "AvgPool2d(kernel_size=2, stride=2, padding=0)",
            "MaxPool2d → AvgPool2d(kernel_size=2, stride=2)",
        ),
        ("ReLU()", "BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True)", "ReLU() → BatchNorm2d(8)"),
        ("Own(1, a=1, b=2)", "Own(1, a=1, c=3)", "Own(1, b=2 → default, c=default → 3)"),
        ("Own(1)", "Own(1, 2)", "Own(1) → Own(1, 2)"),
        ("(own): Linear(1, 2)", "(own): Linear(1, 3)", "(own): Linear(1, 2 → 3)"),
        ("ReLU()", "Own(" + "n" * 35 + ")", "ReLU() → Own(" + "n" * 35 + ")"),
        ("ReLU()", "Own(" + "n" * 36 + ")", "ReLU() → Own(" + "n" * 35 + "…"),
    ],
)
def test_replaced_layer_is_one_change_and_shows_what_differs(old: str, new: str, text: str, tmp_path: Path) -> None:
    network = {"printed": PRINTED.replace("ReLU()", new)}
    assert changes(tmp_path, {"printed": PRINTED.replace("ReLU()", old)}, network=network) == [text]


def test_another_network_class_is_described_as_one_change(tmp_path: Path) -> None:
    other = {
        "name": "Wide",
        "printed": "Wide(\n" + "  a\n" * 30 + ")",
        "parameters": 669706,
        "fingerprint": {"logits": [1.0], "gradients": []},
    }
    assert changes(tmp_path, network=other) == ["network Network → Wide (50,890 → 669,706 parameters)"]


def test_same_structure_with_another_fingerprint_is_one_change(tmp_path: Path) -> None:
    found = changes(tmp_path, network={"fingerprint": make_fingerprint(2.1)})
    assert found == ["network with the same structure but other outputs"]


def test_fingerprints_that_differ_by_rounding_are_no_change(tmp_path: Path) -> None:
    assert changes(tmp_path, network={"fingerprint": make_fingerprint(2.00001)}) == []


def test_edited_functions_of_the_training_code_are_named_and_count_one_each(tmp_path: Path) -> None:
    code = {"train_utils.run_epoch": "other", "train_utils.train_loop": "b2", "train_utils.own": "new"}
    before, after = make_run(tmp_path / "one"), make_run(tmp_path / "other", code=code)
    assert changes_between(read_run(before), read_run(after)) == [
        Change("training code: run_epoch, own edited", distance=2)
    ]


def test_equal_changes_are_counted() -> None:
    assert describe_changes([Change("ReLU() → Tanh()")] * 2, 80) == "ReLU() → Tanh(), 2 times"


def test_changes_beyond_the_width_are_counted() -> None:
    several = [Change(f"{letter}" * 10) for letter in "abcd"]
    assert describe_changes(several, 22) == "aaaaaaaaaa, bbbbbbbbbb and 2 more"


def test_no_changes_are_described() -> None:
    assert describe_changes([], 80) == "repetition"


def test_rare_changes_are_described_first() -> None:
    both = [Change("EPOCHS 10 → 3"), Change("MIRROR False → True")]
    frequency = {"EPOCHS 10 → 3": 2, "MIRROR False → True": 1}
    assert describe_changes(both, 80, frequency) == "MIRROR False → True, EPOCHS 10 → 3"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"dataset": "KMNIST"}, "DATASET is KMNIST, not FashionMNIST, so their folds consist of different images"),
        ({"folds": 10}, "FOLDS is 10, not 5, so their folds consist of different images"),
        ({"rng_seed": 1}, "RNG_SEED is 1, not 314, so their folds consist of different images"),
        ({}, "their folds consist of different images: the data set on disk was different"),
    ],
)
def test_runs_with_different_images_are_not_comparable(
    other: dict[str, Any], reason: str, before: Path, tmp_path: Path
) -> None:
    run = read_run(make_run(tmp_path / "after", images="77", **other))
    message = f"{display_path(run.path)} cannot be compared with {display_path(before)}: {reason}."
    assert why_not_comparable(read_run(before), run) == message and not comparable(read_run(before), run)


def test_runs_on_the_same_images_in_another_shape_are_comparable(tmp_path: Path) -> None:
    other_shape: dict[str, Any] = {"images": "77", "image_shape": [3, 64, 64], "source": "s"}
    assert nearest_of(tmp_path / "known", {"source": "s"}, other_shape) == "0"
    assert nearest_of(tmp_path / "old", {}, {"images": "77", "image_shape": [3, 64, 64]}) is None


def test_of_other_images_in_another_shape_the_images_are_the_reason(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", source="s", class_sizes={"cat": 20})
    other: dict[str, Any] = {"images": "77", "image_shape": [3, 64, 64], "source": "t", "class_sizes": {"cat": 32}}
    after = make_run(tmp_path / "after", **other)
    reason = "the data set on disk was different (+12 training images: cat 20 → 32)."
    assert str(why_not_comparable(read_run(before), read_run(after))).endswith(reason)


@pytest.mark.parametrize(("diverged", "expected"), [(3, True), (4, False)])
def test_comparable_runs_have_two_folds_in_common(diverged: int, expected: bool, before: Path, tmp_path: Path) -> None:
    after = read_run(make_run(tmp_path / "after", [*[0.9] * (5 - diverged), *[np.nan] * diverged]))
    reason = why_not_comparable(read_run(before), after)
    assert (reason is None) == expected
    assert expected or str(reason).endswith(": fewer than two folds have a result in both.")


def nearest_of(tmp_path: Path, now: dict[str, Any], *others: dict[str, Any]) -> str | None:
    """Return the name of the nearest of several runs, named "0", "1"… in the order in which they were made."""
    runs = []
    for number, identity in enumerate(others):
        runs.append(read_run(make_run(tmp_path / str(number), minutes=number, **identity)))
    found = nearest_run(read_run(make_run(tmp_path / "now", minutes=99, **now)), runs)
    return None if found is None else found.path.name


def test_after_an_undo_the_nearest_run_is_the_one_before_both_changes(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"mirror": True}) == "0"


def test_in_a_chain_of_kept_changes_the_nearest_run_is_the_last(tmp_path: Path) -> None:
    kept = {"mirror": True, "epochs": 3}
    assert nearest_of(tmp_path, kept | {"batch_size": 16}, {}, {"mirror": True}, kept) == "2"


def test_the_nearest_run_of_a_repetition_is_the_repeated_run(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {}, {}, {"mirror": True}) == "0"


def test_of_equally_near_runs_the_newest_is_the_nearest(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"mirror": True, "epochs": 3}, {}) == "2"


def test_two_changed_layers_are_nearer_than_another_network_class(tmp_path: Path) -> None:
    other = {"name": "Wide", "printed": "Wide(\n  (a): Linear(1, 2)\n  (b): Linear(2, 3)\n  (c): Linear(3, 4)\n)"}
    shorter = {"printed": PRINTED.replace("    (1): ReLU()\n", "").replace("out_features=10", "out_features=11")}
    assert nearest_of(tmp_path, {"network": shorter}, {}, {"network": other}) == "0"


def test_another_class_with_the_same_layers_is_nearer_than_two_changed_settings(tmp_path: Path) -> None:
    renamed, two_settings = {"network": {"name": "Other"}}, {"mirror": True, "epochs": 3}
    assert nearest_of(tmp_path, {}, renamed, two_settings) == "0"


def test_another_torch_version_is_a_change_like_any_other(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"torch": "2.15.0", "mirror": True}, {}, {"torch": "2.15.0"}) == "1"


def test_run_that_is_not_comparable_is_never_the_nearest(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"epochs": 3, "images": "77"}) == "0"
    assert nearest_of(tmp_path / "again", {}, {"images": "77"}) is None


def test_run_is_not_its_own_nearest(before: Path) -> None:
    run = read_run(before)
    assert nearest_run(run, [run]) is None


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([], "First finished run: there is nothing to compare it with yet."),
        ([{"rng_seed": 1}], "First run with these folds (RNG_SEED 314)."),
        ([{"dataset": "KMNIST", "rng_seed": 1}], "First run with these folds (DATASET FashionMNIST, RNG_SEED 314)."),
        ([{"dataset": "KMNIST", "rng_seed": 1}, {"folds": 10}], "First run with these folds (FOLDS 5)."),
        ([{}], "First run with these images: the other runs on this data set used different images."),
        (
            [{"class_sizes": {"cat": 20}}],
            "First run with these images: the other runs on this data set used different images (+12 training "
            "images: cat 20 → 32).",
        ),
        (
            [{"images": "3fa4", "accuracies": [np.nan, np.nan, np.nan, np.nan, 0.9]}],
            "Not compared with other runs: none has a result in two of the same folds.",
        ),
    ],
)
def test_run_that_cannot_be_compared_has_a_reason(others: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    runs = []
    for number, identity in enumerate(others):
        runs.append(read_run(make_run(tmp_path / f"{number}", **{"images": "77"} | identity)))
    run = read_run(make_run(tmp_path / "now", class_sizes={"cat": 32}))
    assert nearest_run(run, [*runs, run]) is None and why_nothing_comparable(run, [*runs, run]) == reason


def test_run_with_a_single_result_has_a_reason(before: Path, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "now", [0.9, *[np.nan] * 4]))
    expected = "Not compared with other runs: fewer than two folds have a result."
    assert why_nothing_comparable(run, [read_run(before)]) == expected
