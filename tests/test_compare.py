"""Did it help? The statistics, what is said of a pair and of an evening, the pictures, and the command."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Configure, start_python
from matplotlib.colors import same_color, to_rgb
from PIL import Image
from scipy.stats import t, ttest_rel
from synthetic_runs import BASE, BETTER, NOISE, PRINTED, STARTED, make_identity, make_results, make_run

import main_tutorial
from experiment.compare import (
    Comparison,
    against_nearest,
    compare,
    holm,
    lead_by_chance,
    main,
    overview_of,
    overview_of_evening,
    paired_difference,
)
from experiment.errors import ConfigurationError
from experiment.figures import BLUE, ORANGE, png_of
from experiment.past_runs import PastRun, finished_runs, read_run

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def compared(before: Path, after: Path) -> str:
    return compare(read_run(before), read_run(after)).text


# The statistics


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_the_figures_are_those_of_nadeau_and_bengio(folds: int) -> None:
    old, new = np.random.default_rng(folds).normal(0.9, 0.01, (2, folds))
    mean, error, p = paired_difference(old.tolist(), new.tolist(), folds)
    gains = [b - a for a, b in zip(old, new, strict=True)]
    variance = sum((gain - sum(gains) / folds) ** 2 for gain in gains) / (folds - 1)
    assert mean == pytest.approx(sum(gains) / folds)
    assert error == pytest.approx((variance * (1 / folds + 1 / (folds - 1))) ** 0.5)
    uncorrected = ttest_rel(new, old).statistic  # of var / K, so that the corrected one is this much smaller:
    scaled = uncorrected / np.sqrt(folds * (1 / folds + 1 / (folds - 1)))
    assert mean / error == pytest.approx(scaled)
    assert p == pytest.approx(2 * t.sf(abs(scaled), folds - 1), rel=1e-6)


def test_folds_that_are_missing_do_not_change_the_share_of_a_test_set() -> None:
    _, error, _ = paired_difference(BASE[:3].tolist(), NOISE[:3].tolist(), 5)
    assert error == pytest.approx(np.std((NOISE - BASE)[:3], ddof=1) * np.sqrt(1 / 3 + 1 / 4))


def test_two_folds_need_thirteen_times_the_standard_error() -> None:
    error = paired_difference([0.0, 0.0], [0.0, 0.01], 2)[1]
    for times, better in ((12.5, False), (13.0, True)):
        assert (paired_difference([0, 0], [times * error - 0.005, times * error + 0.005], 2)[2] < 0.05) == better


def test_differences_that_are_alike_but_for_rounding_have_no_p() -> None:
    before = np.array([0.1, 0.3, 0.6, 0.9])
    assert np.ptp((before + 0.01) - before) > 0
    assert np.isnan(paired_difference(before.tolist(), (before + 0.01).tolist(), 4)[2])


def test_no_difference_in_any_fold_is_what_chance_always_brings() -> None:
    assert paired_difference([0.9, 0.8], [0.9, 0.8], 2) == (0, 0, 1)


@pytest.mark.parametrize("folds", [2, 5, 10])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping training sets", "independent errors"])
def test_equal_recipes_are_called_different_in_at_most_six_of_a_hundred(folds: int, overlap: bool) -> None:
    rng = np.random.default_rng(0)
    noise = fold_noise(rng, (2000, folds), folds if overlap else None)
    different = [paired_difference([0.0] * folds, gains, folds)[2] < 0.05 for gains in noise.tolist()]
    assert np.mean(different) <= 0.06


def fold_noise(rng: np.random.Generator, shape: tuple[int, ...], folds: int | None = None) -> np.ndarray:
    """Return normal noise (…, folds); a share 1/`folds` of its variance is common to all folds, if that is given."""
    share = 1 / folds if folds else 0
    return rng.normal(size=shape) * (1 - share) ** 0.5 + rng.normal(size=(*shape[:-1], 1)) * share**0.5


def test_holm_is_as_in_his_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_a_single_p_as_it_is_and_none_above_one() -> None:
    assert holm([0.03]) == [0.03] and holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_holm_keeps_what_is_no_p_apart() -> None:
    corrected = holm([np.nan, 0.02, np.nan, 0.03])
    assert np.isnan(corrected[0]) and np.isnan(corrected[2]) and corrected[1::2] == pytest.approx([0.04, 0.04])


def test_an_evening_of_ten_changes_that_do_nothing_calls_one_better_in_at_most_one_of_twenty() -> None:
    rng = np.random.default_rng(1)
    evenings, with_holm, without = 600, 0, 0
    for _ in range(evenings):
        runs = fold_noise(rng, (11, 5), 5)  # the first is what all ten are compared with
        told = [paired_difference(runs[0].tolist(), run.tolist(), 5) for run in runs[1:]]
        corrected = holm([p for _, _, p in told])
        with_holm += any(p < 0.05 and mean > 0 for (mean, _, _), p in zip(told, corrected, strict=True))
        without += any(p < 0.05 and mean > 0 for mean, _, p in told)
    assert with_holm / evenings <= 0.05 + 2 * (0.05 * 0.95 / evenings) ** 0.5
    assert without / evenings >= 0.1


@pytest.mark.parametrize("count", [2, 10, 40])
def test_the_best_of_many_that_do_nothing_leads_by_what_a_simulation_says(count: int) -> None:
    runs = np.random.default_rng(0).normal(0, 0.002, (20000, count + 1))
    leads = (runs[:, 1:] - runs[:, :1]).max(1)
    assert lead_by_chance([0.002 * 2**0.5] * count) == pytest.approx(leads.mean(), rel=0.06)


# A pair


def test_a_repetition_is_said_to_be_the_same_to_the_bit(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after")).splitlines()
    assert lines[0].endswith("before") and lines[1:] == ["  the same in every fold, to the bit"]


def test_a_change_without_any_effect_is_named_and_the_same_to_the_bit(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after", threads=2)).splitlines()
    assert lines[1:] == ["  threads        1 → 2", "  the same in every fold, to the bit"]


def test_a_run_that_gains_in_all_folds_is_better(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after", BETTER, mirror=True)).splitlines()
    assert lines[1:] == [
        "  MIRROR         False → True",
        "  accuracy  0.9232 → 0.9322   +0.0090 ± 0.0011 (± standard error)",
        "            better (p = 0.0011), in 5 of 5 folds",
        "  loss      0.0768 → 0.0678   −0.0090 ± 0.0011",
        "            better (p = 0.0011), in 5 of 5 folds",
        "  F1, most changed: Shirt +0.018, Coat +0.009",
    ]


def test_every_setting_that_differs_has_a_line(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after", BETTER, mirror=True, epochs=3)).splitlines()
    assert lines[1:3] == ["  EPOCHS         10 → 3", "  MIRROR         False → True"]


def test_a_fold_in_which_nothing_changed_is_none_of_the_better_ones(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", [*BASE, *BASE])
    after = make_run(tmp_path / "after", [*BETTER, *BETTER[:4], BASE[4]])
    assert compared(before, after).count(", in 9 of 10 folds") == 2


def test_what_finds_no_room_in_a_line_goes_on_below_where_it_began(before: Path, tmp_path: Path) -> None:
    network = {"name": "AConvolutionalNetworkOfMyOwnWithThreeBlocks", "printed": "AConvolutional()", "weights": 669706}
    lines = compared(before, make_run(tmp_path / "after", NOISE, network=network)).splitlines()
    assert lines[1:3] == [
        "  network        Network → AConvolutionalNetworkOfMyOwnWithThreeBlocks (50,890 →",
        "                   669,706 weights)",
    ]


def test_classes_with_long_names_go_on_in_the_next_line(tmp_path: Path) -> None:
    names = ["Kuzushiji character number one", "Kuzushiji character number two"]
    before, after = (make_run(tmp_path / name, gains, classes=names) for name, gains in (("a", BASE), ("b", BETTER)))
    assert compared(before, after).splitlines()[-2:] == [
        "  F1, most changed: Kuzushiji character number two +0.018, Kuzushiji character",
        "            number one +0.009",
    ]


def test_the_same_runs_the_other_way_round_are_worse(before: Path, tmp_path: Path) -> None:
    text = compared(make_run(tmp_path / "after", BETTER), before)
    assert text.count("worse (p = ") == 2 and "better" not in text


def test_noise_is_no_difference_that_these_folds_can_tell(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", NOISE))
    assert text.count("no difference that these folds can tell (p = ") == 2
    assert "better" not in text and "worse" not in text


def test_only_the_folds_that_both_have_are_compared_and_the_text_says_so(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", [*BETTER[:4], np.nan]))
    assert "over the 4 of 5 folds that both have" in text and "in 4 of 4 folds" in text
    assert f"{BASE[:4].mean():.4f} → {BETTER[:4].mean():.4f}" in text


def test_runs_that_are_not_comparable_are_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="other images in each fold"):
        compared(before, make_run(tmp_path / "after", images="77"))


@pytest.mark.parametrize(("p", "better"), [(0.049, True), (0.051, False)])
def test_better_needs_a_p_below_five_of_a_hundred(p: float, better: bool, before: Path, tmp_path: Path) -> None:
    noise = NOISE - BASE - np.mean(NOISE - BASE)
    gain = t.isf(p / 2, 4) * noise.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    text = compared(before, make_run(tmp_path / "after", BASE + noise + gain))
    assert text.count(f"better (p = {p:.2g})") == (2 if better else 0) and text.count(f"p = {p:.2g}") == 2


def test_differences_that_are_all_alike_tell_nothing(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", BASE + 0.01))
    said = "            no difference that these folds can tell (all differ alike, so no p)"
    assert text.splitlines().count(said) == 2


def test_a_very_small_p_is_not_shown_as_a_power_of_ten(before: Path, tmp_path: Path) -> None:
    gains = [0.0301, 0.0302, 0.0300, 0.0301, 0.0301]
    assert compared(before, make_run(tmp_path / "after", BASE + gains)).count("better (p < 0.0001)") == 2


def test_a_class_that_is_named_by_a_number_is_called_a_class(tmp_path: Path) -> None:
    before, after = (
        make_run(tmp_path / name, gains, classes=["0", "8"]) for name, gains in (("a", BASE), ("b", BETTER))
    )
    assert "  F1, most changed: class 8 +0.018, class 0 +0.009" in compared(before, after)


def test_a_minus_is_a_minus_and_no_hyphen(before: Path, tmp_path: Path) -> None:
    said = compared(make_run(tmp_path / "after", BETTER), before).partition("\n")[2]
    assert "−0.0090 ± " in said and "Shirt −0.018" in said and "-" not in said


def test_classes_that_hardly_changed_are_not_named(before: Path, tmp_path: Path) -> None:
    assert "F1" not in compared(before, make_run(tmp_path / "after", BASE + 0.0002))


def test_a_change_that_is_rounded_to_nothing_has_no_minus(before: Path, tmp_path: Path) -> None:
    gains = np.array([1e-6, -2e-6, 0, 0, 0])
    for after in (make_run(tmp_path / "more", BASE + gains), make_run(tmp_path / "less", BASE - gains)):
        assert compared(before, after).count("+0.0000 ± 0.0000") == 2


def test_layers_that_changed_alike_are_counted_in_one_line(tmp_path: Path) -> None:
    printed = PRINTED.replace("\n  )\n", "\n    (3): ReLU()\n  )\n")
    old = make_run(tmp_path / "old", network={"printed": printed})
    text = compared(old, make_run(tmp_path / "new", network={"printed": printed.replace("ReLU", "Tanh")}))
    assert text.splitlines()[1] == "  layer          ReLU() → Tanh(), 2 times"


def compared_layers(tmp_path: Path, count: int) -> str:
    """Return what is said of two runs whose networks differ in so many layers."""
    layers = "".join(f"    ({number}): Linear({number}, 7)\n" for number in range(count))
    old, new = (f"Network(\n  (stack): Sequential(\n{each}  )\n)" for each in (layers, layers.replace("7", "8")))
    old_run = make_run(tmp_path / "old", network={"printed": old})
    return compared(old_run, make_run(tmp_path / "new", BETTER, network={"printed": new}))


def test_of_a_network_that_differs_in_very_many_layers_six_are_shown(tmp_path: Path) -> None:
    lines = compared_layers(tmp_path, 20).splitlines()
    assert lines[6] == "  layer          Linear(5, 7 → 8)" and lines[7] == "  layers         and 14 more changes"
    assert lines[8].startswith("  accuracy")


def test_of_six_layers_that_differ_none_is_left_out(tmp_path: Path) -> None:
    text = compared_layers(tmp_path, 6)
    assert text.count("  layer          Linear(") == 6 and "more changes" not in text


def test_another_network_altogether_is_named_with_its_weights(before: Path, tmp_path: Path) -> None:
    network = {"name": "Wide", "printed": "Wide()", "weights": 669706}
    lines = compared(before, make_run(tmp_path / "after", BETTER, network=network)).splitlines()
    assert lines[1] == "  network        Network → Wide (50,890 → 669,706 weights)"


def test_a_folder_whose_name_is_no_text_can_be_compared_and_drawn(tmp_path: Path) -> None:
    before = make_run(tmp_path / "runs" / "br\udcfcder $\\x$")
    comparison = compare(read_run(before), read_run(make_run(tmp_path / "after", BETTER)))
    assert "br?der" in comparison.text.encode().decode()
    assert png_of(comparison.figure())


# What a run says at its end


def at_its_end(runs_dir: Path, accuracies: Any = BETTER, **identity: Any) -> Comparison | None:
    """Return what a run that ends now says of those in a folder."""
    return against_nearest(runs_dir / "now", make_results(accuracies, minutes=99), make_identity(**identity))


def test_a_run_is_compared_with_the_nearest_beside_it(before: Path) -> None:
    make_run(before.parent / "newer", minutes=1, mirror=True)
    comparison = at_its_end(before.parent, epochs=3)
    assert comparison is not None and comparison.before.path == before
    assert comparison.text.splitlines()[1] == "  EPOCHS         10 → 3" and "better" in comparison.text


def test_where_no_run_is_comparable_nothing_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "other-seed", rng_seed=1, images="77")
    assert at_its_end(tmp_path / "runs") is None
    assert at_its_end(tmp_path / "nowhere") is None


# The evening


CHANGES: list[dict[str, Any]] = [
    {},
    {"mirror": True},
    {"epochs": 3},
    {
        "network": {
            "printed": PRINTED.replace("ReLU()", "Conv2d(32, 64, kernel_size=(3, 3), stride=(1, 1), bias=False)")
        }
    },
    {"network": {"name": "ConvolutionalNeuralNetwork", "printed": "ConvolutionalNeuralNetwork()", "weights": 893546}},
    {"network": {"answers": [1.0, 2.0, 3.0]}},
    {"batch_size": 16, "learning_rate": 0.003, "lr_schedule": "one_cycle", "precision": "bfloat16", "threads": 2},
    {},
    {"torch": "2.15.0+cu130"},
    {"device": "cuda"},
]


def make_evening(runs_dir: Path, count: int = 10) -> list[PastRun]:
    """Make runs, one a minute, the third of them clearly better than the first; return them, the oldest first."""
    rng = np.random.default_rng(0)
    for number in range(count):
        change = CHANGES[number % len(CHANGES)]
        noise = rng.normal(0, 0.001, 5) if change else np.zeros(5)
        name = f"ConvolutionalNeuralNetwork-FashionMNIST-20261126-18{30 + number}07"
        accuracies = BETTER + 0.03 if number == 2 else BASE + noise
        make_run(runs_dir / name, accuracies, minutes=number, classes=FASHION, **change)
    return finished_runs(runs_dir)[::-1]


@pytest.fixture
def evening(tmp_path: Path) -> list[PastRun]:
    return make_evening(tmp_path / "runs")


def rows_of(text: str) -> list[str]:
    """Return the first line of each row of an overview."""
    return [line for line in text.splitlines() if re.match(r"[* ] (\d\d:\d\d |\d\d \w{3}) +\d\.\d{4} ", line)]


def test_a_hand_made_evening_is_told_in_these_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs_dir, linear = tmp_path / "runs", PRINTED.replace("ReLU()", "Identity()")
    make_run(runs_dir / "N-20261126-183000")
    make_run(runs_dir / "N-20261126-183100", BETTER, minutes=1, mirror=True)
    make_run(runs_dir / "N-20261126-183200", NOISE, minutes=2, epochs=3, network={"printed": linear})
    make_run(runs_dir / "N-20261126-183300", BASE + 0.01, minutes=3, learning_rate=0.01)
    make_run(runs_dir / "N-20261126-183400", minutes=4, resumed=True)
    make_run(runs_dir / "one that I called", [*NOISE[:3], np.nan, np.nan], minutes=5, batch_size=16)
    assert overview_of_evening([Path("runs")]).text.splitlines() == [
        "Against runs/N-20261126-183000",
        "  the oldest of these 6 in runs; FashionMNIST, 5 folds, RNG_SEED 314",
        "",
        "        accuracy      change           p    loss      change           p    took",
        "* 26 Nov  0.9332 +0.0100 ± 0.0000      –  0.0668 −0.0100 ± 0.0000      –    42 s",
        "  18:33 LEARNING_RATE 0.001 → 0.01",
        "  26 Nov  0.9322 +0.0090 ± 0.0011 0.0032  0.0678 −0.0090 ± 0.0011 0.0032    42 s",
        "  18:31 MIRROR False → True: accuracy better, loss better",
        "  26 Nov  0.9234 +0.0002 ± 0.0017      1  0.0766 −0.0002 ± 0.0017      1    42 s",
        "  18:32 EPOCHS 10 → 3, ReLU() → Identity()",
        "  26 Nov  0.9232                          0.0768                            42 s",
        "  18:30 the one that all are compared with",
        "  26 Nov  0.9232     the same             0.0768     the same              >42 s",
        "  18:34 a repetition",
        "  26 Nov  0.9217 +0.0000 ± 0.0020      1  0.0783 +0.0000 ± 0.0020      1    42 s",
        "  18:35 one that I called: BATCH_SIZE 64 → 16 (fold-4, fold-5 diverged)",
        "",
        "± is the standard error. p is corrected for 3 comparisons of each figure (Holm).",
        "> is the time since a run was resumed.",
        "* The highest accuracy, 0.0100 above the one that all are compared with. Had",
        "none of the 4 done anything, the best of them would still be about 0.0011 above",
        "it: who picks the best picks luck, too.",
    ]


def test_without_words_on_how_they_were_chosen_an_overview_says_what_they_have_in_common(before: Path) -> None:
    after = make_run(before.parent / "after", BETTER, mirror=True)
    lines = overview_of(read_run(before), [read_run(after)]).text.splitlines()
    assert lines[1] == "  FashionMNIST, 5 folds, RNG_SEED 314"


def test_two_comparisons_are_enough_for_the_best_to_be_luck(before: Path) -> None:
    others = [make_run(before.parent / name, BASE + change, epochs=3) for name, change in (("a", 1e-3), ("b", 2e-3))]
    text = overview_of(read_run(before), [read_run(other) for other in others]).text
    assert "Had none of the 2 done anything" in text.replace("\n", " ")


def test_where_nothing_can_be_compared_every_folder_and_every_reason_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (make_run(tmp_path / "a" / "cut-off") / "results.json").unlink()
    with pytest.raises(ConfigurationError) as error:
        overview_of_evening([Path("a"), Path("b")])
    unfinished = "a/cut-off is unfinished: it has no results.json."
    assert str(error.value).splitlines() == ["There is no finished run in a and b.", unfinished]
    make_run(tmp_path / "b" / "only")
    with pytest.raises(ConfigurationError) as error:
        overview_of_evening([Path("a"), Path("b")])
    only = "There is nothing in a and b to compare b/only with."
    assert str(error.value).splitlines() == [only, unfinished]


def test_two_folds_are_enough_for_a_run_to_be_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "old", [*BASE[:2], np.nan, np.nan, np.nan])
    make_run(tmp_path / "new", minutes=1)
    text = overview_of_evening([tmp_path]).text
    assert len(rows_of(text)) == 2 and "too few folds" not in " ".join(text.split())


def test_runs_on_other_images_are_counted_by_data_set(before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=9)
    for number, dataset in enumerate(("KMNIST", "MNIST", "KMNIST")):
        make_run(before.parent / f"{number}", minutes=number, images="77", dataset=dataset)
    text = overview_of_evening([before.parent]).text.replace("\n", " ")
    assert text.endswith(
        "Not here, since their folds are other images than the newest's: 2 on KMNIST, 1 on MNIST. "
        "Name them to compare them."
    )


def test_an_overview_has_a_row_a_run_by_accuracy_with_the_best_marked(evening: list[PastRun]) -> None:
    rows = rows_of(overview_of(evening[0], evening[1:]).text)
    accuracies = [float(row.split()[3 if row[0] == "*" else 2]) for row in rows]
    assert len(rows) == 10 and accuracies == sorted(accuracies, reverse=True)
    assert [row[0] for row in rows] == ["*", *[" "] * 9]


def test_a_row_has_differences_with_their_errors_the_corrected_p_and_the_time_it_took(evening: list[PastRun]) -> None:
    overview = overview_of(evening[0], evening[1:])
    best = overview.rows[0]
    assert best.comparison is not None
    p = best.comparison.effects["accuracy"].p
    assert best.p["accuracy"] == pytest.approx(8 * p)  # ten runs less the first and its repetition
    row = rows_of(overview.text)[0].split()
    assert row[4:8] == ["+0.0390", "±", "0.0011", "<0.001"] and row[9] == "−0.0390" and row[-2:] == ["42", "s"]


def test_what_differs_stands_below_a_row_with_what_is_told_of_it(evening: list[PastRun]) -> None:
    lines = overview_of(evening[0], evening[1:]).text.splitlines()
    below = [line.removeprefix(lines[lines.index(row) + 1][:8]) for row in rows_of("\n".join(lines)) for line in lines]
    assert "EPOCHS 10 → 3: accuracy better, loss better" in below
    text = "\n".join(lines)
    assert "the one that all are compared with" in text and "a repetition" in text
    assert "network answers otherwise (its code or initialisation)" in text


def test_what_tells_a_row_from_the_others_comes_first(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epochs": 3, "batch_size": 32}
    paths = [
        make_run(tmp_path / "first"),
        make_run(tmp_path / "second", NOISE, **shared),
        make_run(tmp_path / "third", BETTER, **shared, learning_rate=0.01),
    ]
    first, *others = [read_run(path) for path in paths]
    text = " ".join(overview_of(first, others).text.split())
    assert "second: EPOCHS 10 → 3, BATCH_SIZE 64 → 32" in text
    assert "third: LEARNING_RATE 0.001 → 0.01, EPOCHS 10 → 3, BATCH_SIZE 64 → 32" in text


def test_changes_that_find_no_room_in_an_overview_are_counted(before: Path, tmp_path: Path) -> None:
    layers = PRINTED.replace("ReLU()", "Tanh()").replace("Linear", "LazyLinear")
    after = make_run(tmp_path / "N-20261126-183100", NOISE, **CHANGES[6], mirror=True, network={"printed": layers})
    lines = overview_of(read_run(before), [read_run(after)]).text.splitlines()
    assert lines[5:7] == [
        "  18:30 BATCH_SIZE 64 → 16, LEARNING_RATE 0.001 → 0.003, LR_SCHEDULE constant →",
        "        one_cycle, MIRROR False → True and 5 more",
    ]


@pytest.mark.parametrize("digits", range(50, 62))
def test_the_sign_of_a_layer_that_came_or_went_is_not_parted_from_it(digits: int, before: Path, tmp_path: Path) -> None:
    fewer = PRINTED.replace("    (1): ReLU()\n", "")
    after = make_run(tmp_path / "after", NOISE, network={"printed": fewer}, batch_size=10**digits)
    text = compare(read_run(before), read_run(after)).figure().get_suptitle()
    assert re.search("→ 1(0+),\\s− ReLU\\(\\)\\nafter\n", text)


def test_every_line_of_an_overview_fits_into_80_columns(
    evening: list[PastRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evening[0].path.parents[1])
    text = overview_of(evening[0], evening[1:], "the oldest of these 10 in runs", ["a note"]).text
    assert max(map(len, text.splitlines())) <= 80


def test_every_line_of_a_pair_fits_into_80_columns(evening: list[PastRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evening[0].path.parents[1])
    for one in evening:
        for other in evening:
            assert max(map(len, compare(one, other).text.splitlines())) <= 80


def test_an_overview_says_for_how_many_its_p_is_corrected(evening: list[PastRun]) -> None:
    text = overview_of(evening[0], evening[1:]).text
    assert "p is corrected for 8 comparisons of each figure (Holm)" in text.replace("\n", " ")


def test_a_single_comparison_is_not_corrected(evening: list[PastRun]) -> None:
    assert "corrected" not in overview_of(evening[0], evening[1:2]).text


def test_an_overview_says_what_the_best_of_many_is_worth(evening: list[PastRun]) -> None:
    overview = overview_of(evening[0], evening[1:])
    errors = [each.effects["accuracy"].error for each in overview.comparisons if not each.is_the_same]
    text = overview.text.replace("\n", " ")
    assert "The highest accuracy, 0.0390 above the one that all are compared with." in text
    assert f"none of the 8 done anything, the best of them would still be about {lead_by_chance(errors):.4f}" in text


def test_where_the_first_is_the_best_an_overview_says_so(before: Path, tmp_path: Path) -> None:
    worse = read_run(make_run(tmp_path / "worse", BASE - 0.01 + (NOISE - BASE)))
    said = "* No run has a higher accuracy than the one that all are compared with."
    assert said in overview_of(read_run(before), [worse]).text.splitlines()


def test_a_run_of_today_has_its_time_and_another_its_date_and_time(tmp_path: Path) -> None:
    today = (datetime.now().replace(hour=0, minute=1) - STARTED) / timedelta(minutes=1)
    old, new = make_run(tmp_path / "N-20261126-183000"), make_run(tmp_path / "N-20261127-000100", minutes=today)
    lines = overview_of(read_run(old), [read_run(new)]).text.splitlines()
    assert any(re.match(r"[* ] 00:01 ", line) for line in lines)
    date = next(index for index, line in enumerate(lines) if re.match(r"[* ] 26 Nov ", line))
    assert lines[date + 1].startswith("  18:30 ")


def test_a_folder_that_was_renamed_is_named(before: Path, evening: list[PastRun]) -> None:
    assert "before: a repetition" in overview_of(evening[0], [read_run(before)]).text


def test_a_fold_that_diverged_is_named(before: Path, tmp_path: Path) -> None:
    after = read_run(make_run(tmp_path / "after", [*BETTER[:4], np.nan], epochs=3))
    assert "EPOCHS 10 → 3 (fold-5 diverged)" in overview_of(read_run(before), [after]).text


def test_a_run_that_was_resumed_is_marked_as_having_taken_longer(before: Path, tmp_path: Path) -> None:
    text = overview_of(read_run(before), [read_run(make_run(tmp_path / "after", resumed=True))]).text
    assert ">42 s" in text and "> is the time since a run was resumed" in text


# The pictures


def drawn(panel: Any) -> list[tuple[list[float], float, float, float]]:
    """Return what is drawn in each row, from the top: each fold's difference, their mean, and its interval."""
    folds, intervals, means = panel.collections
    assert same_color(folds.get_facecolor()[0][:3], to_rgb(BLUE)) and same_color(means.get_edgecolor()[0], ORANGE)
    assert same_color(panel.lines[0].get_color(), "black")  # no difference
    assert len(panel.lines) == 3 and same_color(intervals.get_color()[0], ORANGE)  # with a cap at each end
    rows = []
    for place, (mean, segment) in enumerate(zip(means.get_offsets(), intervals.get_segments(), strict=True)):
        assert place - 0.5 < mean[1] == segment[0][1] == segment[1][1] < place  # above the middle of the row
        points = [x for x, y in folds.get_offsets() if place < y < place + 0.5]  # and these below it
        rows.append((points, mean[0], segment[0][0], segment[1][0]))
    assert sum(len(row[0]) for row in rows) == len(folds.get_offsets())
    return rows


def reach_of(in_folds: np.ndarray) -> float:
    """Return how far the 95 % interval of five folds' differences reaches to either side."""
    return t.isf(0.025, 4) * in_folds.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)


def test_the_picture_of_a_pair_shows_each_folds_difference_and_the_corrected_interval(
    before: Path, tmp_path: Path
) -> None:
    accuracy, loss, classes = compare(read_run(before), read_run(make_run(tmp_path / "after", BETTER))).figure().axes
    gains = BETTER - BASE
    for panel, gains_of_rows in ((accuracy, [gains]), (loss, [-gains]), (classes, [gains, 2 * gains])):
        assert len(drawn(panel)) == len(gains_of_rows)
        for (points, mean, low, high), gains_of_row in zip(drawn(panel), gains_of_rows, strict=True):
            expected, reach = gains_of_row.mean(), reach_of(gains_of_row)
            np.testing.assert_allclose(points, gains_of_row)
            np.testing.assert_allclose([low, mean, high], [expected - reach, expected, expected + reach])


def test_the_picture_of_a_pair_says_what_was_changed_and_what_it_did(before: Path, tmp_path: Path) -> None:
    after = make_run(tmp_path / "after", BETTER, mirror=True, epochs=3)
    figure = compare(read_run(before), read_run(after)).figure()
    accuracy, loss, classes = figure.axes
    assert figure.get_suptitle() == "EPOCHS 10 → 3, MIRROR False → True\nafter\nagainst before"
    assert accuracy.get_title() == "accuracy\n+0.0090 ± 0.0011: better"
    assert loss.get_title() == "loss\n−0.0090 ± 0.0011: better"
    assert classes.get_title() == "F1 of each class"
    assert [label.get_text() for label in classes.get_yticklabels()] == ["Coat", "Shirt"]
    assert [label.get_text() for panel in (accuracy, loss) for label in panel.get_yticklabels()] == ["", ""]


@pytest.mark.parametrize(
    ("accuracies", "outcome"),
    [
        (NOISE, "+0.0002 ± 0.0017: cannot tell"),
        (BASE - (BETTER - BASE), "−0.0090 ± 0.0011: worse"),
        (BASE, "the same, to the bit"),
    ],
)
def test_a_panels_title_says_what_the_folds_can_tell(
    accuracies: np.ndarray, outcome: str, before: Path, tmp_path: Path
) -> None:
    figure = compare(read_run(before), read_run(make_run(tmp_path / "after", accuracies))).figure()
    assert figure.axes[0].get_title() == f"accuracy\n{outcome}"


def test_a_long_list_of_changes_is_broken_into_lines_above_the_picture(before: Path, tmp_path: Path) -> None:
    after = make_run(tmp_path / "after", NOISE, **CHANGES[6], mirror=True)
    *changes, name, _ = compare(read_run(before), read_run(after)).figure().get_suptitle().split("\n")
    assert changes == [
        "BATCH_SIZE 64 → 16, LEARNING_RATE 0.001 → 0.003, LR_SCHEDULE constant →",
        "one_cycle, MIRROR False → True, PRECISION float32 → bfloat16, threads 1 → 2",
    ]
    assert name == "after"


def test_no_difference_is_in_the_middle_of_a_panel_and_everything_within_it(before: Path, tmp_path: Path) -> None:
    for accuracies, farthest in ((NOISE, 0.0051), (BASE, 0.0), (BASE + [0.0, 0.0, 0.0, 0.0, 0.1], 0.1)):
        panel = compare(read_run(before), read_run(make_run(tmp_path / f"{farthest}", accuracies))).figure().axes[0]
        left, right = panel.get_xlim()
        assert -left == right and farthest < right < max(1.3 * farthest, 0.01)
        assert np.asarray(panel.lines[0].get_xydata()).tolist() == [[0, 0], [0, 1]]  # from below to the top
        assert panel.get_xlabel() == "difference"


def test_a_run_that_diverged_does_not_press_the_others_onto_zero(before: Path, tmp_path: Path) -> None:
    noisy = [make_run(tmp_path / f"{number}", NOISE[[*range(number, 5), *range(number)]]) for number in range(3)]
    diverged = make_run(tmp_path / "diverged", NOISE - 0.8)
    figure = overview_of(read_run(before), [read_run(path) for path in [*noisy, diverged]]).figure()
    png_of(figure)  # which lays it out
    for panel in figure.axes:
        width = panel.get_window_extent().width
        points = np.asarray(panel.collections[0].get_offsets())
        pixels = panel.transData.transform(points)[:, 0] - panel.transData.transform((0, 0))[0]
        assert np.abs(pixels[:15]).max() > 0.05 * width and 0.4 * width < np.abs(pixels[15:]).min()
        assert np.abs(pixels).max() < 0.5 * width
        assert panel.get_xlabel() == "difference (logarithmic beyond ±0.02)"
        assert [label.get_text() for label in panel.get_xticklabels()] == ["−0.8", "−0.02", "0", "0.02", "0.8"]
        left, right = panel.get_xlim()
        assert -left == right < 1.5


def test_a_loss_that_grew_without_bounds_leaves_the_columns_of_an_overview_apart(before: Path, tmp_path: Path) -> None:
    diverged = read_run(make_run(tmp_path / "N-20261126-183100", NOISE - 0.8))
    folds = {name: replace(fold, loss=1000.0 * number) for number, (name, fold) in enumerate(diverged.folds.items())}
    text = overview_of(read_run(before), [replace(diverged, folds=folds)]).text
    assert " 2000.0 +1999.9 ± 1060.7   0.13    42 s\n" in text


def test_a_run_that_hardly_differs_does_not_bend_the_axis_of_the_others(before: Path, tmp_path: Path) -> None:
    accuracies = [BASE + (NOISE - BASE) / 1000, NOISE, BETTER]
    others = [read_run(make_run(tmp_path / str(number), each)) for number, each in enumerate(accuracies)]
    for panel in overview_of(read_run(before), others).figure().axes:
        assert (panel.get_xscale(), panel.get_xlabel()) == ("linear", "difference")


def test_rows_are_read_from_the_top_and_every_second_has_a_band(evening: list[PastRun]) -> None:
    for panel in overview_of(evening[0], evening[1:]).figure().axes:
        bottom, top = panel.get_ylim()
        assert (bottom, top) == (8.5, -0.5) and list(panel.get_yticks()) == list(range(9))
        bands = [(patch.get_y(), patch.get_height()) for patch in panel.patches]  # type: ignore[attr-defined]  # all are rectangles
        assert bands == [(0.5, 1), (2.5, 1), (4.5, 1), (6.5, 1)]


def test_a_picture_of_many_runs_is_higher_and_their_rows_as_high(before: Path) -> None:
    runs = [read_run(before)]
    heights = []
    for number in range(12):
        runs.append(read_run(make_run(before.parent / f"{number}", BASE + number / 1e4)))
        heights.append(overview_of(runs[0], runs[1:]).figure().get_size_inches()[1])
    steps = np.diff(heights)
    assert np.allclose(steps, steps[0]) and 0.3 < steps[0] < 0.6


def test_a_picture_of_a_pair_has_as_much_room_for_each_class(tmp_path: Path) -> None:
    figures = []
    for count in (0, 2, 4, 6):
        names = [f"class {number}" for number in range(count)]
        before = make_run(tmp_path / f"before-{count}", classes=names)
        after = make_run(tmp_path / f"after-{count}", BETTER, classes=names)
        figures.append(compare(read_run(before), read_run(after)).figure())
    steps = np.diff([figure.get_size_inches()[1] for figure in figures])
    assert steps[1] == pytest.approx(steps[2]) and 0.5 < steps[1] < 0.9 and 0.5 < steps[0] < 1.5
    png_of(figures[-1])  # which lays it out
    accuracy, loss, classes = (panel.get_position() for panel in figures[-1].axes)
    assert accuracy.x0 < loss.x0 and accuracy.y0 == loss.y0 > classes.y1
    assert classes.x0 == accuracy.x0 and classes.x1 == loss.x1 > 0.9
    assert classes.height > 1.2 * accuracy.height


def test_a_run_of_today_is_labelled_with_its_time_alone(before: Path, tmp_path: Path) -> None:
    today = (datetime.now().replace(hour=0, minute=1) - STARTED) / timedelta(minutes=1)
    after = make_run(tmp_path / "after", NOISE, minutes=today, epochs=3)
    (label,) = overview_of(read_run(before), [read_run(after)]).figure().axes[0].get_yticklabels()
    assert label.get_text() == "00:01 EPOCHS 10 → 3"


def test_the_legend_says_what_points_intervals_and_empty_marks_are(before: Path, tmp_path: Path) -> None:
    figure = compare(read_run(before), read_run(make_run(tmp_path / "after", BETTER))).figure()
    (legend,) = figure.legends
    said = {text.get_text(): line for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    marks = [
        (line.get_marker(), line.get_linestyle(), line.get_color(), line.get_markerfacecolor())
        for line in said.values()
    ]
    assert dict(zip(said, marks, strict=True)) == {
        "the difference in a fold": ("o", "None", BLUE, BLUE),
        "their mean and its 95 % interval": ("D", "-", ORANGE, ORANGE),
        "chance may have done it (p ≥ 0.05, corrected for the number of rows)": ("D", "-", ORANGE, "white"),
    }


def test_above_a_panel_stands_which_side_is_better(before: Path, tmp_path: Path) -> None:
    figure = compare(read_run(before), read_run(make_run(tmp_path / "after", BETTER))).figure()
    png_of(figure)  # which lays it out
    for panel in figure.axes:
        box = panel.get_window_extent()
        left, right = (text.get_window_extent() for text in panel.texts)
        assert box.x0 <= left.x0 < left.x1 < right.x0 < right.x1 <= box.x1
        assert min(left.y0, right.y0) >= box.y1


def test_runs_without_a_class_in_common_are_drawn_without_classes(tmp_path: Path) -> None:
    before, after = (make_run(tmp_path / name, gains, classes=()) for name, gains in (("a", BASE), ("b", BETTER)))
    assert len(compare(read_run(before), read_run(after)).figure().axes) == 2


def test_the_picture_of_several_has_a_row_a_run_and_says_which_side_is_better(evening: list[PastRun]) -> None:
    accuracy, loss = overview_of(evening[0], evening[1:]).figure().axes
    labels = [label.get_text() for label in accuracy.get_yticklabels()]
    assert len(labels) == 9 and labels[0] == "26 Nov 18:32 EPOCHS 10 → 3" and "26 Nov 18:37 a repetition" in labels
    assert "26 Nov 18:35 network answers otherwise (its\ncode or initialisation)" in labels
    assert [panel.get_title() for panel in (accuracy, loss)] == ["accuracy", "loss"]
    assert accuracy.get_position().y0 == loss.get_position().y0  # side by side, the rows beside each other
    for panel in (accuracy, loss):
        assert len(drawn(panel)) == 9
        assert [text.get_position() for text in panel.texts] == [(0.01, 1.01), (0.99, 1.01)]
    assert not any(label.get_visible() for label in loss.get_yticklabels())  # they stand at the left
    assert drawn(accuracy)[0][1] == pytest.approx(0.039) and drawn(loss)[0][1] == pytest.approx(-0.039)
    assert [text.get_text() for text in accuracy.texts] == ["← worse", "better →"]
    assert [text.get_text() for text in loss.texts] == ["← better", "worse →"]


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 run"), (2, "2 runs"), (40, "40 runs"), (41, "The 40 best of 41 runs")]
)
def test_the_title_of_several_says_how_many_there_are(count: int, said: str, before: Path) -> None:
    first = read_run(before)
    other = read_run(make_run(before.parent / "other", NOISE))
    figure = overview_of(first, [other] * count).figure()
    assert figure.get_suptitle() == f"{said} against before"


def test_a_mean_is_filled_where_its_corrected_p_tells_it_from_chance(evening: list[PastRun]) -> None:
    accuracy = overview_of(evening[0], evening[1:]).figure().axes[0]
    (means,) = [points for points in accuracy.collections if len(points.get_facecolor()) == 9]
    filled = [tuple(colour[:3]) != (1, 1, 1) for colour in np.asarray(means.get_facecolor())]
    assert filled == [True, *[False] * 8]


def test_a_picture_of_very_many_runs_shows_the_best(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"{number}", BASE + number / 1e4)) for number in range(45)]
    figure = overview_of(runs[0], runs[1:]).figure()
    assert len(figure.axes[0].get_yticklabels()) == 40 and "The 40 best of 44 runs" in figure.get_suptitle()


def test_a_repetition_can_be_drawn(before: Path, tmp_path: Path) -> None:
    assert png_of(compare(read_run(before), read_run(make_run(tmp_path / "after"))).figure())


# The command


Run = Callable[..., tuple[str, int | str | None]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command from beside `runs`; it returns what was printed, and the status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, int | str | None]:
        monkeypatch.setattr("sys.argv", ["compare", "--runs-dir", "runs", *arguments])
        try:
            main()
        except SystemExit as end:
            return capsys.readouterr().err, end.code
        return capsys.readouterr().out, 0

    return run


def test_without_names_all_that_are_comparable_with_the_newest_are_shown(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=2, mirror=True)
    make_run(before.parent / "other", minutes=1, images="77", dataset="KMNIST")
    output, status = command()
    assert status == 0 and output.startswith("Against runs/before\n  the oldest of these 2 in runs; FashionMNIST")
    assert len(rows_of(output)) == 2 and "MIRROR False → True" in output
    assert "1 on KMNIST" in output
    assert output.endswith("Worth opening:\n  runs/after/overview.png\n")
    with Image.open(before.parent / "after" / "overview.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_an_unfinished_run_is_a_line_of_the_overview(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=2)
    (make_run(before.parent / "cut-off") / "results.json").unlink()
    output, _ = command()
    assert "\nruns/cut-off is unfinished: it has no results.json.\n" in output


def test_of_many_runs_that_are_passed_over_only_some_are_named(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=2)
    for number in range(5):
        (make_run(before.parent / f"cut-off-{number}") / "results.json").unlink()
    output, _ = command()
    assert output.count("is unfinished: ") == 3 and "2 more runs are unfinished or cannot be compared." in output
    for number in range(2):
        shutil.rmtree(before.parent / f"cut-off-{number}")
    output, _ = command()
    assert output.count("is unfinished: ") == 3 and "more runs are unfinished" not in output


def test_a_newest_run_whose_folds_diverged_is_passed_over_with_a_line(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    make_run(before.parent / "diverged", [0.9, *[np.nan] * 4], minutes=2)
    output, status = command()
    assert status == 0 and "runs/diverged has too few folds that did not diverge." in output


def test_a_single_run_has_nothing_to_be_compared_with(command: Run, before: Path) -> None:
    message = "Bad configuration:\n  There is nothing in runs to compare runs/before with.\n"
    assert command() == (message, 2) and command("before") == (message, 2)


def test_where_there_is_no_run_the_command_says_where_it_looked(command: Run) -> None:
    assert command() == ("Bad configuration:\n  There is no finished run in runs.\n", 2)


def test_a_single_name_is_compared_with_its_nearest(command: Run, before: Path) -> None:
    make_run(before.parent / "one", NOISE, minutes=1, mirror=True)
    make_run(before.parent / "two", BETTER, minutes=2, mirror=True, epochs=3)
    output, status = command("two")
    assert status == 0 and output.startswith("runs/two\nAgainst runs/one\n  EPOCHS         10 → 3\n")
    assert (before.parent / "two" / "pair.png").exists() and not (before.parent / "two" / "compare.png").exists()


def test_two_names_are_a_pair_in_their_order(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    output, status = command("after", "bef")
    assert status == 0 and output.startswith("runs/before\nAgainst runs/after\n") and "worse" in output


def test_several_names_are_an_overview_of_these_against_the_first(command: Run, before: Path) -> None:
    make_run(before.parent / "one", NOISE, minutes=1, mirror=True)
    make_run(before.parent / "two", BETTER, minutes=2, epochs=3)
    make_run(before.parent / "three", minutes=3)
    output, status = command("one", "two", "bef")
    assert status == 0 and output.startswith("Against runs/one\n") and len(rows_of(output)) == 3
    assert "three" not in output and "corrected for 2 comparisons" in output


def test_each_reason_against_a_comparison_is_given(command: Run, before: Path) -> None:
    make_run(before.parent / "one", rng_seed=1, images="76")
    make_run(before.parent / "two", images="77")
    errors, status = command("before", "one", "two")
    one, two = (f"  runs/{name} cannot be compared with runs/before" for name in ("one", "two"))
    assert status == 2 and errors.splitlines() == [
        "Bad configuration:",
        f"{one}: other RNG_SEED (1, not 314), so other images in each fold.",
        f"{two}: other images in each fold: the data set on disk was another one.",
    ]
    assert not list(before.parent.rglob("*.png"))


def test_the_command_explains_what_it_cannot_tell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    output = capsys.readouterr().out
    assert output.startswith("usage: python -m experiment.compare [-h] [--runs-dir FOLDER] [RUN ...]\n\nDid it help?")
    assert "\n\nWhat this cannot tell. " in output and max(map(len, output.splitlines())) <= 80
    assert " ".join(output.partition("\npositional arguments:\n")[2].split()) == (
        "RUN a run's folder, or a part of its name that no other has, such as its time "
        "options: -h, --help show this help message and exit "
        "--runs-dir FOLDER where the runs lie (default: RUNS_DIR of the scripts)"
    )


def test_without_a_folder_the_command_looks_where_the_scripts_save_their_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["compare", "no run has this name"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "no run has this name" in str(end.value) + capsys.readouterr().err


def test_two_hundred_runs_are_read_and_shown_at_once(tmp_path: Path) -> None:
    for number in range(200):
        make_run(tmp_path / f"N-{number:06}", BASE + number / 1e5, minutes=number, epochs=1 + number, classes=FASHION)
    started = datetime.now()
    runs = finished_runs(tmp_path)
    assert len(rows_of(overview_of(runs[-1], runs[:-1]).text)) == 200
    assert datetime.now() - started < timedelta(seconds=3)


def test_the_command_answers_in_a_process_of_its_own(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    make_run(before.parent / "after-2", BETTER)
    command = ("-m", "experiment.compare", "--runs-dir", "runs")
    processes = [start_python(tmp_path, *command, *names) for names in (("bef", "runs/after"), ("bef", "aft"))]
    (output, _), (_, errors) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 2], errors
    assert output.startswith("runs/after\nAgainst runs/before\n") and "better" in output
    assert output.endswith("Worth opening:\n  runs/after/pair.png\n")
    assert errors.splitlines()[1:] == [
        "  aft must name one run, but in runs it is part of:",
        "      after",
        "      after-2",
    ]


def test_the_picture_is_drawn_though_nobody_reads_what_is_said(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    process = start_python(tmp_path, "-m", "experiment.compare", "--runs-dir", "runs")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert (before.parent / "after" / "overview.png").exists()


def test_a_real_run_says_in_the_terminal_and_in_its_report_how_it_compares(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    first = configure(main_tutorial, EPOCHS=1, WORKERS=1).main()
    assert "Against" not in capsys.readouterr().out + (first.run_dir / "report.md").read_text()
    second = configure(main_tutorial, EPOCHS=1, WORKERS=1, BATCH_SIZE=256).main()
    for text in (capsys.readouterr().out, (second.run_dir / "report.md").read_text()):
        assert f"Against runs/{first.run_dir.name}\n  BATCH_SIZE     64 → 256\n  accuracy  " in text
    assert (second.run_dir / "compare.png").exists()
