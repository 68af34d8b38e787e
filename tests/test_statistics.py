"""The corrected paired t-test and Holm's correction."""

import numpy as np
import pytest
from scipy.stats import t, ttest_rel
from synthetic_runs import BASE, BETTER, NOISE

from comparison.statistics import MetricDifference, compare_metric, holm, paired_difference


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_paired_difference_is_that_of_nadeau_and_bengio(folds: int) -> None:
    old, new = np.random.default_rng(folds).normal(0.9, 0.01, (2, folds))
    mean, error, p = paired_difference(old.tolist(), new.tolist(), folds)
    gains = [b - a for a, b in zip(old, new, strict=True)]
    variance = sum((gain - sum(gains) / folds) ** 2 for gain in gains) / (folds - 1)
    assert mean == pytest.approx(sum(gains) / folds)
    assert error == pytest.approx((variance * (1 / folds + 1 / (folds - 1))) ** 0.5)
    corrected = ttest_rel(new, old).statistic / np.sqrt(folds * (1 / folds + 1 / (folds - 1)))
    assert mean / error == pytest.approx(corrected)
    assert p == pytest.approx(2 * t.sf(abs(corrected), folds - 1), rel=1e-6)


def test_missing_folds_do_not_change_the_ratio_of_test_set_to_training_set() -> None:
    _, error, _ = paired_difference(BASE[:3].tolist(), NOISE[:3].tolist(), 5)
    assert error == pytest.approx(np.std((NOISE - BASE)[:3], ddof=1) * np.sqrt(1 / 3 + 1 / 4))


def test_two_folds_need_thirteen_standard_errors() -> None:
    error = paired_difference([0.0, 0.0], [0.0, 0.01], 2)[1]
    for times, significant in ((12.5, False), (13.0, True)):
        p = paired_difference([0, 0], [times * error - 0.005, times * error + 0.005], 2)[2]
        assert (p < 0.05) == significant


def test_differences_that_are_equal_up_to_rounding_have_no_p() -> None:
    before = np.array([0.1, 0.3, 0.6, 0.9])
    assert np.ptp((before + 0.01) - before) > 0
    assert np.isnan(paired_difference(before.tolist(), (before + 0.01).tolist(), 4)[2])


def test_no_difference_in_any_fold_has_a_p_of_one() -> None:
    assert paired_difference([0.9, 0.8], [0.9, 0.8], 2) == (0, 0, 1)


@pytest.mark.parametrize("folds", [2, 5, 10])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping training sets", "independent errors"])
def test_false_positive_rate_is_at_most_six_percent(folds: int, overlap: bool) -> None:
    rng = np.random.default_rng(0)
    noise = fold_noise(rng, (2000, folds), folds if overlap else None)
    significant = [paired_difference([0.0] * folds, gains, folds)[2] < 0.05 for gains in noise.tolist()]
    assert np.mean(significant) <= 0.06


def fold_noise(rng: np.random.Generator, shape: tuple[int, ...], folds: int | None = None) -> np.ndarray:
    """Return normal noise (…, folds); a share 1/`folds` of its variance is common to all folds, if that is given."""
    share = 1 / folds if folds else 0
    return rng.normal(size=shape) * (1 - share) ** 0.5 + rng.normal(size=(*shape[:-1], 1)) * share**0.5


def test_holm_agrees_with_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_keeps_a_single_p_and_exceeds_one_nowhere() -> None:
    assert holm([0.03]) == [0.03] and holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_holm_does_not_count_nan() -> None:
    corrected = holm([np.nan, 0.02, np.nan, 0.03])
    assert np.isnan(corrected[0]) and np.isnan(corrected[2]) and corrected[1::2] == pytest.approx([0.04, 0.04])


def test_holm_keeps_the_family_wise_error_of_ten_comparisons_at_five_percent() -> None:
    rng = np.random.default_rng(1)
    families, with_holm, without = 600, 0, 0
    for _ in range(families):
        runs = fold_noise(rng, (11, 5), 5)  # the first is the baseline
        results = [paired_difference(runs[0].tolist(), run.tolist(), 5) for run in runs[1:]]
        corrected = holm([p for _, _, p in results])
        with_holm += any(p < 0.05 and mean > 0 for (mean, _, _), p in zip(results, corrected, strict=True))
        without += any(p < 0.05 and mean > 0 for mean, _, p in results)
    assert with_holm / families <= 0.05 + 2 * (0.05 * 0.95 / families) ** 0.5
    assert without / families >= 0.1


def make_difference(after: np.ndarray, metric: str = "accuracy") -> MetricDifference:
    return compare_metric(metric, BASE.tolist(), after.tolist(), 5)


def test_confidence_interval_has_the_width_of_the_t_distribution() -> None:
    difference = make_difference(NOISE)
    assert difference.ci_half_width == pytest.approx(t.isf(0.025, 4) * difference.standard_error)
    assert difference.max_extent == pytest.approx(abs(difference.mean) + difference.ci_half_width)


def test_max_extent_includes_the_folds() -> None:
    after = BASE + [0.0, 0.0, 0.0, 0.0, 0.1]
    difference = MetricDifference("accuracy", BASE.tolist(), after.tolist(), mean=0.02, standard_error=0.0, p=0.5)
    assert difference.max_extent == pytest.approx(0.1)


@pytest.mark.parametrize(("metric", "verdict"), [("accuracy", "better"), ("loss", "worse"), ("Coat", "better")])
def test_an_increase_is_better_except_for_the_loss(metric: str, verdict: str) -> None:
    assert make_difference(BETTER, metric).verdict(0.01) == verdict


def test_a_decrease_is_worse_except_for_the_loss() -> None:
    lower = BASE - (BETTER - BASE)
    assert make_difference(lower).verdict(0.01) == "worse" and make_difference(lower, "loss").verdict(0.01) == "better"


@pytest.mark.parametrize(("p", "verdict"), [(0.049, "better"), (0.05, "not significant"), (np.nan, "not significant")])
def test_a_difference_is_significant_below_five_percent(p: float, verdict: str) -> None:
    assert make_difference(BETTER).verdict(p) == verdict


def test_equal_values_are_identical() -> None:
    assert make_difference(BASE).verdict(1.0) == "identical"
