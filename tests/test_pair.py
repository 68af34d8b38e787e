"""One run compared with another: the text and the figure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t
from synthetic_runs import BASE, BETTER, NOISE, PRINTED, make_identity, make_results, make_run

from comparison.pair import PairComparison, compare_runs, compare_with_nearest
from comparison.pair_page import pair_content
from comparison.run_reader import FinishedRun, read_run
from comparison.statistics import compare_metric, estimate_prior
from experiment.errors import ConfigurationError
from experiment.plots import png_bytes


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def compare(before: Path, after: Path) -> PairComparison:
    return compare_runs(read_run(before), read_run(after))


def text_of(before: Path, after: Path) -> str:
    return compare(before, after).text


def test_repetition_is_identical(before: Path, tmp_path: Path) -> None:
    lines = text_of(before, make_run(tmp_path / "after")).splitlines()
    assert lines[0].startswith("Compared with ") and lines[0].endswith("before")
    assert lines[1:] == ["  repetition", "  identical in every fold"]


def test_higher_f1_of_a_class_called_loss_is_better(before: Path, tmp_path: Path) -> None:
    classes = ("win", "loss")
    old, new = (make_run(tmp_path / name, values, classes=classes) for name, values in (("0", BASE), ("1", BETTER)))
    pair = compare(old, new)
    assert pair.f1["loss"].mean > 0 and pair.f1["loss"].verdict == "better"


def test_change_without_any_effect_is_identical(before: Path, tmp_path: Path) -> None:
    lines = text_of(before, make_run(tmp_path / "after", threads=2)).splitlines()
    assert lines[1:] == ["  threads 1 → 2", "  identical in every fold"]


def test_gain_in_all_folds_is_better(before: Path, tmp_path: Path) -> None:
    lines = text_of(before, make_run(tmp_path / "after", BETTER, mirror=True, epochs=3)).splitlines()
    assert lines[1:] == [
        "  EPOCHS 10 → 3, MIRROR False → True",
        "  accuracy  0.9232 → 0.9322   +0.0090 ± 0.0037 (95 %)",
        "            better (p = 0.0021), in 5 of 5 folds",
        "  loss      0.0768 → 0.0678   −0.0090 ± 0.0029 (95 %)",
        "            better (p = 0.0021), in 5 of 5 folds",
        "  F1, largest changes: Shirt +0.018, Coat +0.009",
        "  p and ± are corrected for 2 metrics (Holm). Noise estimated on the 2 runs of",
        "  each comparison.",
    ]


def test_the_same_runs_in_reverse_are_worse(before: Path, tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "after", BETTER), before)
    assert text.count("worse (p = ") == 2 and "better" not in text and "Shirt −0.018" in text


def test_fold_without_a_difference_is_not_counted_as_better(tmp_path: Path) -> None:
    before = make_run(tmp_path / "before", [*BASE, *BASE])
    after = make_run(tmp_path / "after", [*BETTER, *BETTER[:4], BASE[4]])
    assert text_of(before, after).count(", in 9 of 10 folds") == 2


def test_noise_is_not_significant(before: Path, tmp_path: Path) -> None:
    text = text_of(before, make_run(tmp_path / "after", NOISE))
    assert text.count("not significant (p = ") == 2 and "better" not in text and "worse" not in text


def test_one_identical_metric_is_named(before: Path, tmp_path: Path) -> None:
    after = make_run(tmp_path / "after", BASE, losses=1 - NOISE)
    assert text_of(before, after).splitlines()[3] == "            identical in every fold"


def test_equal_differences_in_all_folds_are_not_significant(before: Path, tmp_path: Path) -> None:
    text = text_of(before, make_run(tmp_path / "after", BASE + 0.01))
    line = "            not significant (the same change in every fold, so no p)"
    assert text.splitlines().count(line) == 2


@pytest.mark.parametrize(("p", "better"), [(0.049, True), (0.051, False)])
def test_better_requires_a_p_below_five_percent(p: float, better: bool, before: Path, tmp_path: Path) -> None:
    noise = NOISE - BASE - np.mean(NOISE - BASE)
    gain = t.isf(p / 2 / 2, 4) * noise.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)  # two metrics
    text = text_of(before, make_run(tmp_path / "after", BASE + noise + gain))
    assert text.count(f"better (p = {p:.2g})") == (2 if better else 0) and text.count(f"p = {p:.2g}") == 2


def test_very_small_p_is_shown_as_a_bound(before: Path, tmp_path: Path) -> None:
    gains = [0.0301, 0.0302, 0.0300, 0.0301, 0.0301]
    assert text_of(before, make_run(tmp_path / "after", BASE + gains)).count("better (p < 0.0001)") == 2


def test_only_folds_that_both_have_are_compared(before: Path, tmp_path: Path) -> None:
    text = text_of(before, make_run(tmp_path / "after", [*BETTER[:4], np.nan]))
    assert "over the 4 of 5 folds that both have" in text and "in 4 of 4 folds" in text
    assert f"{BASE[:4].mean():.4f} → {BETTER[:4].mean():.4f}" in text


def test_runs_that_are_not_comparable_are_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="folds consist of different images"):
        compare(before, make_run(tmp_path / "after", images="77"))


def test_digits_are_shown_as_classes(tmp_path: Path) -> None:
    before, after = (
        make_run(tmp_path / name, gains, classes=["0", "8"]) for name, gains in (("a", BASE), ("b", BETTER))
    )
    assert "  F1, largest changes: class 8 +0.018, class 0 +0.009" in text_of(before, after)


def test_classes_that_hardly_changed_are_not_shown(before: Path, tmp_path: Path) -> None:
    assert "F1" not in text_of(before, make_run(tmp_path / "after", BASE + 0.0002))


def test_difference_that_is_rounded_to_zero_has_no_minus(before: Path, tmp_path: Path) -> None:
    gains = np.array([1e-6, -2e-6, 0, 0, 0])
    for after in (make_run(tmp_path / "more", BASE + gains), make_run(tmp_path / "less", BASE - gains)):
        assert text_of(before, after).count("+0.0000 ± 0.0000 (95 %)") == 2


def test_lines_have_at_most_80_columns(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = PRINTED.replace("ReLU()", "Tanh()").replace("Linear", "LazyLinear")
    classes = ["Kuzushiji character number one", "Kuzushiji character number two"]
    changes: dict[str, Any] = {"mirror": True, "epochs": 3, "batch_size": 16, "device": "cuda", "threads": 2}
    before = make_run(tmp_path / "long", classes=classes)
    text = text_of(
        before, make_run(tmp_path / "after", BETTER, classes=classes, network={"printed": layers}, **changes)
    )
    assert max(map(len, text.splitlines())) <= 80 and "number one +0.009" in text


def test_folder_name_with_invalid_bytes_is_compared_and_drawn(tmp_path: Path) -> None:
    before = make_run(tmp_path / "runs" / "br\udcfcder $\\x$")
    comparison = compare(before, make_run(tmp_path / "after", BETTER))
    assert "br?der" in comparison.text.encode().decode()
    assert png_bytes(comparison.figure())


def compare_new_run(runs_dir: Path, **identity: Any) -> PairComparison | str:
    """Return the comparison of a run that is about to be saved in a folder of runs."""
    return compare_with_nearest(runs_dir / "now", make_results(BETTER, minutes=99), make_identity(**identity))


def test_new_run_is_compared_with_the_nearest(before: Path) -> None:
    make_run(before.parent / "newer", minutes=1, mirror=True)
    comparison = compare_new_run(before.parent, epochs=3)
    assert isinstance(comparison, PairComparison) and comparison.before.path == before
    assert comparison.text.splitlines()[1] == "  EPOCHS 10 → 3" and "better" in comparison.text


def test_new_run_without_a_comparable_run_has_one_line_with_the_reason(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "other-seed", rng_seed=1, images="77")
    assert compare_new_run(tmp_path / "runs") == "First run with these folds (RNG_SEED 314)."
    first = "First finished run: there is nothing to compare it with yet."
    assert compare_new_run(tmp_path / "nowhere") == first


EFFECT = 0.008  # of one run of the evening


@pytest.fixture
def evening(tmp_path: Path) -> list[FinishedRun]:
    """Return a baseline and seven runs with the same noise: the first is a little better, the others are not."""
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.003, (8, 5))
    noise[1] += EFFECT
    paths = [
        make_run(tmp_path / "evening" / f"{number}", BASE + each, minutes=number, epochs=10 + number)
        for number, each in enumerate(noise)
    ]
    return [read_run(path) for path in paths]


def test_noise_is_estimated_on_all_runs_with_the_same_folds(evening: list[FinishedRun]) -> None:
    baseline, after, *others = evening
    alone, moderated = compare_runs(baseline, after), compare_runs(baseline, after, evening)
    assert alone.metrics["accuracy"].verdict == "not significant" and alone.metrics["accuracy"].df == 4
    assert moderated.metrics["accuracy"].verdict == "better" and moderated.metrics["accuracy"].df > 4
    assert "Noise estimated on 8 runs with these folds." in joined(moderated)
    pairs = []
    for other in (after, *others):
        pairs.append(([fold.accuracy for fold in baseline.folds.values()], [f.accuracy for f in other.folds.values()]))
    expected = compare_metric("accuracy", *pairs[0], folds=5, prior=estimate_prior(pairs))
    assert moderated.metrics["accuracy"].p == expected.p
    assert all(difference.is_moderated for difference in moderated.f1.values())


def test_order_and_duplicates_of_the_history_do_not_matter(evening: list[FinishedRun]) -> None:
    baseline, after, *others = evening
    expected = compare_runs(baseline, after, others).metrics
    for history in (evening, [*evening, *evening], others[::-1]):
        metrics = compare_runs(baseline, after, history).metrics
        assert metrics["loss"].p == pytest.approx(expected["loss"].p)


def test_runs_with_other_folds_are_not_part_of_the_noise(evening: list[FinishedRun], tmp_path: Path) -> None:
    baseline, after, *_ = evening
    others = [read_run(make_run(tmp_path / f"other-{number}", NOISE, images="77")) for number in range(4)]
    assert compare_runs(baseline, after, others).metrics == compare_runs(baseline, after).metrics


def test_number_of_runs_is_named_per_metric_if_it_differs(evening: list[FinishedRun], tmp_path: Path) -> None:
    wild = read_run(make_run(tmp_path / "wild", NOISE, losses=[0, 1000, 2000, 3000, 4000], minutes=50))
    text = joined(compare_runs(evening[0], evening[1], [*evening, wild]))
    assert "Noise estimated on 9 runs (accuracy) and 8 runs (loss) with these folds." in text
    text = joined(compare_runs(evening[0], wild, evening))
    assert "Noise estimated on 9 runs (accuracy) and 2 runs (loss) with these folds." in text


def joined(comparison: PairComparison) -> str:
    return " ".join(comparison.text.split())


def test_new_run_is_compared_with_the_runs_beside_it_as_history(evening: list[FinishedRun]) -> None:
    comparison = compare_new_run(evening[0].path.parent, epochs=10)
    assert isinstance(comparison, PairComparison) and comparison.before == evening[0]
    assert "Noise estimated on 9 runs with these folds." in joined(comparison)
    assert not comparison.is_identical


def test_text_without_significance_has_the_difference_that_would_be_found(before: Path, tmp_path: Path) -> None:
    comparison = compare(before, make_run(tmp_path / "after", NOISE))
    size = comparison.metrics["accuracy"].detectable
    line = f"            A difference of {size:.4f} would be found in 80 % of cases."
    assert comparison.text.splitlines().count(line) == 2
    better = compare(before, make_run(tmp_path / "better", BETTER))
    assert "80 %" not in better.text


def test_impossible_difference_in_accuracy_is_not_called_detectable(tmp_path: Path) -> None:
    comparison = compare(make_run(tmp_path / "before", [0.9, 0.5]), make_run(tmp_path / "after", [0.5, 0.8]))
    assert comparison.metrics["accuracy"].detectable > 1
    accuracy, loss = comparison.text.split("  accuracy ")[1].split("  loss ")
    assert "would be found" not in accuracy and "would be found in 80 % of cases." in loss


def test_metric_without_a_p_is_not_counted_as_corrected(tmp_path: Path) -> None:
    unequal: dict[str, Any] = {"class_sizes": {"Coat": 90, "Shirt": 30}}
    before = make_run(tmp_path / "before", losses=[0.5] * 5, **unequal)
    comparison = compare(before, make_run(tmp_path / "after", BETTER, losses=[0.4] * 5, **unequal))
    assert not comparison.metrics["loss"].has_interval and len(comparison.metrics) == 3
    assert comparison.explanation.startswith("p and ± are corrected for 2 metrics (Holm). ")


def test_page_explains_for_how_many_classes_the_table_of_the_classes_is_corrected(tmp_path: Path) -> None:
    before, after = (make_run(tmp_path / name, gains, classes="abc") for name, gains in (("0", BASE), ("1", BETTER)))
    explanation = pair_content(compare(before, after))["explanation"]
    assert explanation.startswith("p and ± are corrected for 2 metrics (Holm). ")
    assert explanation.endswith(" In the table of the classes, p and ± are corrected for 3 classes (Holm).")


def test_classes_are_corrected_for_their_number(before: Path, tmp_path: Path) -> None:
    comparison = compare(before, make_run(tmp_path / "after", BETTER))
    for difference in comparison.f1.values():
        assert difference.corrected_p == pytest.approx(2 * difference.p)


def test_figure_shows_the_changes_and_the_verdicts(before: Path, tmp_path: Path) -> None:
    figure = compare(before, make_run(tmp_path / "after", BETTER, mirror=True, epochs=3)).figure()
    accuracy, loss, classes = figure.axes
    changes, after, compared_with = figure.get_suptitle().splitlines()
    assert changes == "EPOCHS 10 → 3, MIRROR False → True" and after.endswith("after")
    assert compared_with.startswith("compared with ") and compared_with.endswith("before")
    assert accuracy.get_title() == "accuracy\n+0.0090 ± 0.0037 (95 %): better"
    assert loss.get_title() == "loss\n−0.0090 ± 0.0029 (95 %): better"
    assert classes.get_title() == "F1 of each class"
    assert [label.get_text() for label in classes.get_yticklabels()] == ["Coat", "Shirt"]


def test_repetition_can_be_drawn(before: Path, tmp_path: Path) -> None:
    figure = compare(before, make_run(tmp_path / "after")).figure()
    assert png_bytes(figure) and figure.axes[0].get_title().endswith(": identical")
