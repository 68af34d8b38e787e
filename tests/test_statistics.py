"""The corrected paired t-test with moderated variance, and Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import digamma, polygamma
from scipy.stats import nct, t, ttest_rel
from synthetic_runs import BASE, BETTER, NOISE

from comparison.statistics import (
    MetricDifference,
    NoisePrior,
    compare_metric,
    correct_together,
    estimate_prior,
    holm,
    paired_difference,
)


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_paired_difference_is_that_of_nadeau_and_bengio(folds: int) -> None:
    old, new = np.random.default_rng(folds).normal(0.9, 0.01, (2, folds))
    mean, error, df, p = paired_difference(old.tolist(), new.tolist(), folds)
    assert df == folds - 1
    gains = [b - a for a, b in zip(old, new, strict=True)]
    variance = sum((gain - sum(gains) / folds) ** 2 for gain in gains) / (folds - 1)
    assert mean == pytest.approx(sum(gains) / folds)
    assert error == pytest.approx((variance * (1 / folds + 1 / (folds - 1))) ** 0.5)
    corrected = ttest_rel(new, old).statistic / np.sqrt(folds * (1 / folds + 1 / (folds - 1)))
    assert mean / error == pytest.approx(corrected)
    assert p == pytest.approx(2 * t.sf(abs(corrected), folds - 1), rel=1e-6)


def test_missing_folds_do_not_change_the_ratio_of_test_set_to_training_set() -> None:
    _, error, _, _ = paired_difference(BASE[:3].tolist(), NOISE[:3].tolist(), 5)
    assert error == pytest.approx(np.std((NOISE - BASE)[:3], ddof=1) * np.sqrt(1 / 3 + 1 / 4))


def test_two_folds_need_thirteen_standard_errors() -> None:
    error = paired_difference([0.0, 0.0], [0.0, 0.01], 2)[1]
    for times, significant in ((12.5, False), (13.0, True)):
        p = paired_difference([0, 0], [times * error - 0.005, times * error + 0.005], 2)[3]
        assert (p < 0.05) == significant


def test_differences_that_are_equal_up_to_rounding_have_no_p() -> None:
    before = np.array([0.1, 0.3, 0.6, 0.9])
    assert np.ptp((before + 0.01) - before) > 0
    assert np.isnan(paired_difference(before.tolist(), (before + 0.01).tolist(), 4)[3])


def test_no_difference_in_any_fold_has_a_p_of_one() -> None:
    assert paired_difference([0.9, 0.8], [0.9, 0.8], 2) == (0, 0, 1, 1)


@pytest.mark.parametrize("folds", [2, 5, 10])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping training sets", "independent errors"])
def test_false_positive_rate_is_at_most_six_percent(folds: int, overlap: bool) -> None:
    rng = np.random.default_rng(0)
    noise = fold_noise(rng, (2000, folds), folds if overlap else None)
    significant = [paired_difference([0.0] * folds, gains, folds)[3] < 0.05 for gains in noise.tolist()]
    assert np.mean(significant) <= 0.06


def fold_noise(rng: np.random.Generator, shape: tuple[int, ...], folds: int | None = None) -> np.ndarray:
    """Return normal noise (…, folds); a share 1/`folds` of its variance is common to all folds, if that is given."""
    share = 1 / folds if folds else 0
    return rng.normal(size=shape) * (1 - share) ** 0.5 + rng.normal(size=(*shape[:-1], 1)) * share**0.5


# --- Moderated variance ---

Pair = tuple[list[float], list[float]]


def noise_pairs(standard_deviations: Sequence[float], seed: int = 0, folds: int = 5) -> list[Pair]:
    """Return the values of a baseline, which is constant, and of runs with these standard deviations."""
    rng = np.random.default_rng(seed)
    return [([0.9] * folds, (0.9 + each * rng.normal(size=folds)).tolist()) for each in standard_deviations]


def variances_of(pairs: Sequence[Pair]) -> np.ndarray:
    return np.var([np.subtract(after, before) for before, after in pairs], axis=1, ddof=1)


def test_prior_is_that_of_smyth() -> None:
    pairs = noise_pairs([0.003, 0.004, 0.006, 0.008, 0.002, 0.007], seed=2)
    variances, d = variances_of(pairs), 4
    e = np.log(variances) - digamma(d / 2) + np.log(d / 2)
    excess = np.mean((e - e.mean()) ** 2) * 6 / 5 - polygamma(1, d / 2)
    assert excess > 0
    prior_df = 2 * brentq(lambda x: polygamma(1, x) - excess, 1e-3, 1e6)
    prior_variance = math.exp(e.mean() + digamma(prior_df / 2) - math.log(prior_df / 2))
    prior = estimate_prior(pairs)
    assert prior is not None and prior.comparisons == 6 and prior.total_df == 24
    assert (prior.df, prior.variance) == pytest.approx((prior_df, prior_variance))

    _, error, df, p = paired_difference(*pairs[0], 5, prior)
    moderated = (prior_df * prior_variance + d * variances[0]) / (prior_df + d)
    statistic = np.mean(np.subtract(pairs[0][1], 0.9)) / np.sqrt(moderated * (1 / 5 + 1 / 4))
    assert df == pytest.approx(min(prior_df + d, 24))
    assert error == pytest.approx(np.sqrt(moderated * (1 / 5 + 1 / 4)))
    assert p == pytest.approx(2 * t.sf(abs(statistic), df))


def test_variances_that_differ_by_chance_only_have_their_mean_and_infinite_degrees_of_freedom() -> None:
    variances = [0.4, 0.9, 1.6, 2.5, 0.7, 1.1, 3.9, 0.5, 1.3, 2.0]
    assert (prior := estimate_prior(pairs_with(variances))) is not None
    assert math.isinf(prior.df) and prior.variance == pytest.approx(np.mean(variances))  # var(e) below trigamma(2)


def pairs_with(variances: Sequence[float]) -> list[Pair]:
    """Return pairs whose differences in five folds have exactly these variances."""
    shape = (NOISE - BASE - np.mean(NOISE - BASE)) / np.std(NOISE - BASE, ddof=1)
    return [([0.0] * 5, (shape * variance**0.5).tolist()) for variance in variances]


def test_equal_variances_are_worth_all_degrees_of_freedom_together() -> None:
    pairs = pairs_with([1.05, 1.1, 0.9, 0.95])
    prior = estimate_prior(pairs)
    _, error, df, _ = paired_difference(*pairs[2], 5, prior)
    assert df == 16 and error == pytest.approx(np.sqrt(1.0 * (1 / 5 + 1 / 4)))


@pytest.mark.parametrize(("number", "moderated"), [(1, False), (2, False), (3, True)])
def test_prior_needs_two_other_comparisons(number: int, moderated: bool) -> None:
    assert (estimate_prior(pairs_with([1.0, 1.1, 1.2][:number])) is not None) == moderated


def test_repeated_comparison_counts_once() -> None:
    first, second, third = pairs_with([1.0, 1.1, 1.2])
    assert estimate_prior([first, second, second, second]) is None
    assert estimate_prior([first, second, second, third]) == estimate_prior([first, second, third])


def test_comparison_without_any_spread_does_not_count() -> None:
    repetition, shifted = ([0.9] * 5, [0.9] * 5), ([0.9] * 5, [0.91] * 5)
    assert estimate_prior([*pairs_with([1.0, 1.0]), repetition, shifted]) is None
    assert estimate_prior([*pairs_with([1.0, 1.1, 1.2]), repetition, shifted]) == estimate_prior(
        pairs_with([1.0, 1.1, 1.2])
    )


@pytest.mark.parametrize("outliers", [[1e4], [1e4, 1e4], [100.0, 1e8], [1e-14], [1e-14, 1e4]])
def test_variances_far_from_the_others_do_not_change_the_prior(outliers: list[float]) -> None:
    regular = [1.0, 0.5, 2.0, 1.5, 0.8, 1.2, 0.7]
    with_outliers, without = estimate_prior(pairs_with([*regular, *outliers])), estimate_prior(pairs_with(regular))
    assert with_outliers == without and without is not None and without.comparisons == 7


def test_much_noisier_comparison_is_not_moderated_and_a_quieter_one_is() -> None:
    prior = estimate_prior(pairs_with([1.0, 0.5, 2.0, 1.5, 0.8, 1.2, 0.7]))
    for variance, is_moderated in ((100.0, False), (1e-10, True), (1.0, True)):
        (pair,) = pairs_with([variance])
        difference = compare_metric("loss", *pair, folds=5, prior=prior)
        assert difference.is_moderated == is_moderated
        if not is_moderated:
            assert difference == compare_metric("loss", *pair, folds=5)


def test_comparison_of_fewer_folds_has_fewer_degrees_of_freedom() -> None:
    pairs = pairs_with([1.0, 1.1, 0.9])
    fewer = [(before[:3], after[:3]) for before, after in pairs[2:]]
    prior = estimate_prior([*pairs[:2], *fewer])
    assert prior is not None and prior.total_df == 4 + 4 + 2


def find_all(runs: np.ndarray, moderated: bool) -> list[float]:
    """Return the corrected p of each metric and run, given values (metrics, 1 + runs, folds), the baseline first."""
    p_values = []
    for baseline, *others in runs.tolist():
        prior = estimate_prior([(baseline, other) for other in others]) if moderated else None
        p_values += [paired_difference(baseline, other, len(baseline), prior)[3] for other in others]
    return holm(p_values)


NOISES = {
    "two equal": [1.0] * 2,
    "three equal": [1.0] * 3,
    "nine equal": [1.0] * 9,
    "twenty equal": [1.0] * 20,
    "two of nine with three times the noise": [1.0] * 7 + [3.0] * 2,
    "one of nine with ten times the noise": [1.0] * 8 + [10.0],
    "one of nine with a thousand times the noise": [1.0] * 8 + [1000.0],
    "two of nine with a thousand times the noise": [1.0] * 7 + [1000.0] * 2,
    "half of ten with three times the noise": [1.0] * 5 + [3.0] * 5,
}


@pytest.mark.parametrize("noises", NOISES.values(), ids=NOISES)
def test_any_false_positive_in_at_most_five_percent_of_evenings(noises: list[float]) -> None:
    rng, evenings, found = np.random.default_rng(0), 250, 0
    for _ in range(evenings):
        runs = rng.normal(size=(2, 1 + len(noises), 5)) * np.array([1.0, *noises])[:, None]
        found += min(find_all(runs, moderated=True)) < 0.05
    assert found / evenings <= 0.05


@pytest.mark.parametrize(
    "noises", [NOISES["nine equal"], NOISES["two of nine with a thousand times the noise"]], ids=["equal", "outliers"]
)
def test_effect_of_three_standard_deviations_is_found_twice_as_often_as_without_moderation(noises: list[float]) -> None:
    rng, evenings = np.random.default_rng(0), 150
    found = {True: 0, False: 0}
    for _ in range(evenings):
        runs = rng.normal(size=(2, 1 + len(noises), 5)) * np.array([1.0, *noises])[:, None]
        runs[0, 1] += 3 * 2**0.5
        for moderated in found:
            found[moderated] += find_all(runs, moderated)[0] < 0.05
    assert found[True] / evenings >= 0.75 and found[True] >= 2 * found[False]


# --- Holm, intervals and verdicts ---


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
        corrected = holm([p for *_, p in results])
        with_holm += any(p < 0.05 and mean > 0 for (mean, *_), p in zip(results, corrected, strict=True))
        without += any(p < 0.05 and mean > 0 for mean, *_, p in results)
    assert with_holm / families <= 0.05 + 2 * (0.05 * 0.95 / families) ** 0.5
    assert without / families >= 0.1


def make_difference(after: np.ndarray, metric: str = "accuracy") -> MetricDifference:
    return compare_metric(metric, BASE.tolist(), after.tolist(), 5, lower_is_better=metric == "loss")


def test_confidence_interval_has_the_width_of_the_t_distribution() -> None:
    difference = make_difference(NOISE)
    assert difference.ci_half_width == pytest.approx(t.isf(0.025, 4) * difference.standard_error)
    assert difference.max_extent == pytest.approx(abs(difference.mean) + difference.ci_half_width)


def test_max_extent_includes_the_folds() -> None:
    after = BASE + [0.0, 0.0, 0.0, 0.0, 0.1]
    difference = replace(make_difference(after), standard_error=0.0)
    assert difference.max_extent == pytest.approx(0.1)


def test_equal_differences_in_all_folds_have_no_interval() -> None:
    for after in (BASE, BASE + 0.01):
        difference = make_difference(after)
        assert not difference.has_interval and difference.ci_half_width == 0 and np.isnan(difference.corrected_p)


def test_detectable_difference_is_found_in_80_percent_of_cases() -> None:
    difference = make_difference(NOISE)
    noncentrality = difference.detectable / difference.standard_error
    assert nct.sf(t.isf(0.025, 4), 4, noncentrality) == pytest.approx(0.8, abs=1e-5)
    rng, noise = np.random.default_rng(0), np.std(NOISE - BASE, ddof=1)
    found = 0
    for _ in range(1000):
        standard_error = noise * (1 / 5 + 1 / 4) ** 0.5
        mean = difference.detectable + standard_error * rng.normal()  # with the correction, the variance is this large
        found += mean / (standard_error * (rng.chisquare(4) / 4) ** 0.5) > t.isf(0.025, 4)
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_detectable_difference_shrinks_with_more_comparisons() -> None:
    prior = NoisePrior(float(np.var(NOISE - BASE, ddof=1)), math.inf, 36.0, 9, math.inf)
    moderated = compare_metric("accuracy", BASE.tolist(), NOISE.tolist(), 5, prior)
    assert moderated.detectable < 0.8 * make_difference(NOISE).detectable


def test_differences_that_are_shown_together_are_corrected_by_holm() -> None:
    differences = [make_difference(after) for after in (BETTER, NOISE, BASE, BASE + 0.01, BETTER + NOISE - BASE)]
    corrected = correct_together(differences)
    expected = holm([differences[index].p for index in (0, 1, 4)])
    assert [corrected[index].corrected_p for index in (0, 1, 4)] == expected
    assert all(np.isnan(corrected[index].corrected_p) for index in (2, 3))
    assert [each.p for each in corrected[:2]] == [each.p for each in differences[:2]]


def test_interval_contains_zero_exactly_if_the_difference_is_not_significant() -> None:
    rng, verdicts = np.random.default_rng(0), set()
    for _ in range(40):
        gains = rng.normal(0, 1, (8, 5)) + rng.choice([0, 1, 2, 4], 8)[:, None]
        differences = correct_together([make_difference(BASE + gain) for gain in gains])
        for difference in differences:
            contains_zero = abs(difference.mean) <= difference.ci_half_width
            assert contains_zero == (difference.corrected_p >= 0.05) == (difference.verdict == "not significant")
            verdicts.add(difference.verdict)
    assert {"better", "not significant"} <= verdicts


def test_rows_that_are_not_significant_have_intervals_of_the_same_level() -> None:
    gains = np.random.default_rng(1).normal(0, 1, (4, 5))
    levels = [each.level for each in correct_together([make_difference(BASE + gain) for gain in gains])]
    assert levels == pytest.approx([0.05 / 4] * 4)


def verdict_of(after: np.ndarray, corrected_p: float, metric: str = "accuracy") -> str:
    return replace(make_difference(after, metric), corrected_p=corrected_p).verdict


@pytest.mark.parametrize(("metric", "verdict"), [("accuracy", "better"), ("loss", "worse"), ("Coat", "better")])
def test_an_increase_is_better_except_for_the_loss(metric: str, verdict: str) -> None:
    assert verdict_of(BETTER, 0.01, metric) == verdict


def test_a_decrease_is_worse_except_for_the_loss() -> None:
    lower = BASE - (BETTER - BASE)
    assert verdict_of(lower, 0.01) == "worse" and verdict_of(lower, 0.01, "loss") == "better"


@pytest.mark.parametrize(("p", "verdict"), [(0.049, "better"), (0.05, "not significant"), (np.nan, "not significant")])
def test_a_difference_is_significant_below_five_percent(p: float, verdict: str) -> None:
    assert verdict_of(BETTER, p) == verdict


def test_equal_values_are_identical() -> None:
    assert verdict_of(BASE, 1.0) == "identical"
