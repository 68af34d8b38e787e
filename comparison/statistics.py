"""The corrected paired t-test with moderated variance, and Holm's correction for several comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SIGNIFICANCE_LEVEL = 0.05
POWER = 0.8  # the probability with which `detectable` is found
MIN_COMPARISONS = 3  # for an estimate of their common noise: the tested one and two more
OUTLIER_LEVEL = 0.001  # of the F test for a variance that is far from the others: it is left out of the estimate
UNMODERATED_LEVEL = 0.05  # of the F test for a variance that is too large to be moderated


@dataclass(frozen=True)
class NoisePrior:
    """What the comparisons with one baseline have in common: the noise of a difference per fold.

    Attributes
    ----------
    variance : float
        s₀², the common variance.
    df : float
        d₀, its degrees of freedom; infinite if all comparisons have the same variance.
    total_df : float
        The degrees of freedom of all comparisons together.
    comparisons : int
        On how many comparisons it was estimated.
    max_variance : float
        The prior does not apply to a comparison with a larger variance.
    """

    variance: float
    df: float
    total_df: float
    comparisons: int
    max_variance: float


@dataclass(frozen=True)
class MetricDifference:
    """The difference of one metric between two runs, over the folds that both have.

    Attributes
    ----------
    metric : str
        "accuracy", "loss", "macro F1" or the name of a class, for its F1 score.
    before, after : list of float
        The metric in each fold.
    mean, standard_error, df, p : float
        As `paired_difference` returns them.
    corrected_p : float
        `p`, corrected for everything that is shown with it; NaN if there is no interval.
    level : float
        The level at which this difference alone has to be significant, so that it is significant after the correction.
    lower_is_better : bool
    """

    metric: str
    before: list[float]
    after: list[float]
    mean: float
    standard_error: float
    df: float
    p: float
    corrected_p: float
    level: float = SIGNIFICANCE_LEVEL
    lower_is_better: bool = False

    @property
    def per_fold(self) -> list[float]:
        """The difference in each fold."""
        return [new - old for old, new in zip(self.before, self.after, strict=True)]

    @property
    def is_identical(self) -> bool:
        """Whether the metric is equal to the bit in every fold."""
        return self.before == self.after

    @property
    def has_interval(self) -> bool:
        """Whether the folds differ by different amounts, so that there is an interval and a p value."""
        return not math.isnan(self.p) and self.standard_error > 0

    @property
    def is_moderated(self) -> bool:
        """Whether the noise was estimated on other comparisons, too."""
        return self.has_interval and self.df > len(self.after) - 1

    @property
    def ci_half_width(self) -> float:
        """Half the width of the 95 % confidence interval of the mean, corrected as `p` is; 0 if there is no interval.

        The interval contains 0 exactly if the difference is not significant.
        """
        return self.standard_error * self._critical_t if self.has_interval else 0.0

    @property
    def detectable(self) -> float:
        """The size of a difference that would have been significant in 80 % of cases (noncentral t distribution)."""
        from scipy.special import nctdtrinc

        return self.standard_error * float(nctdtrinc(self.df, 1 - POWER, self._critical_t))

    @property
    def _critical_t(self) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.df, 1 - self.level / 2))

    @property
    def max_extent(self) -> float:
        """The largest distance from 0 of a fold's difference or of an end of the confidence interval."""
        return max(abs(self.mean) + self.ci_half_width, *map(abs, self.per_fold))

    @property
    def verdict(self) -> str:
        """The difference in words: "identical", "not significant", "better" or "worse"."""
        if self.is_identical:
            return "identical"
        if not self.corrected_p < SIGNIFICANCE_LEVEL:  # also if it is NaN
            return "not significant"
        improved = self.mean < 0 if self.lower_is_better else self.mean > 0
        return "better" if improved else "worse"


def compare_metric(
    metric: str,
    before: list[float],
    after: list[float],
    folds: int,
    prior: NoisePrior | None = None,
    lower_is_better: bool = False,
) -> MetricDifference:
    """Return the difference of a metric, given its values in the same folds of two runs; see `paired_difference`."""
    mean, standard_error, df, p = paired_difference(before, after, folds, prior)
    corrected_p = p if standard_error > 0 else math.nan
    return MetricDifference(
        metric, before, after, mean, standard_error, df, p, corrected_p, lower_is_better=lower_is_better
    )


def paired_difference(
    before: Sequence[float], after: Sequence[float], folds: int, prior: NoisePrior | None = None
) -> tuple[float, float, float, float]:
    """Return mean, standard error, degrees of freedom and p of a metric's differences in the folds of two runs.

    This is the corrected paired t-test (Nadeau and Bengio 2003): the squared standard error is the variance of the
    differences times 1/J + 1/(K − 1), since a fold's test set is to its training set as 1 to K − 1. With a prior, the
    variance is moderated (Smyth 2004): s̃² = (d₀ s₀² + d s²) / (d₀ + d), with d₀ + d degrees of freedom, but never more
    than all comparisons have together.

    Parameters
    ----------
    before, after : sequence of float, shape (J,)
        The metric in J ≥ 2 folds that both runs have.
    folds : int
        K, the number of folds of each run.
    prior : NoisePrior, optional

    Returns
    -------
    mean, standard_error, df, p : float
        If all folds differ by the same amount, the standard error is 0 and p is NaN; p is 1 if none differs.
    """
    from scipy.special import stdtr

    mean, variance = _mean_and_variance(before, after)
    df = float(len(after) - 1)
    if variance == 0:
        return mean, 0.0, df, 1.0 if mean == 0 else math.nan
    if prior is not None and variance <= prior.max_variance:
        if math.isinf(prior.df):
            variance, df = prior.variance, prior.total_df
        else:
            variance = (prior.df * prior.variance + df * variance) / (prior.df + df)
            df = min(prior.df + df, prior.total_df)
    standard_error = math.sqrt(variance * (1 / len(after) + 1 / (folds - 1)))
    p = 2 * stdtr(df, -abs(mean) / standard_error)
    return mean, standard_error, df, float(p)


def _mean_and_variance(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample variance of the differences; the variance is 0 if they differ by rounding errors only."""
    differences = np.subtract(after, before)
    mean = float(differences.mean())
    rounding = 1e-12 * np.abs([before, after]).max()
    if np.ptp(differences) <= rounding:
        return mean, 0.0
    return mean, float(differences.var(ddof=1))


def estimate_prior(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> NoisePrior | None:
    """Estimate the common noise of several comparisons with the same baseline.

    This is the method of moments on the logarithms of their variances (Smyth 2004, section 6.2). Comparisons whose
    variance is far from those of the others are left out, such as one with a run that diverged or one with a run that
    differs from the baseline in the last bits only: as in Phipson et al. (2016), but by an F test of each variance
    against the median of the others. A comparison that is much noisier than the common noise is not moderated.

    Parameters
    ----------
    pairs : sequence of (before, after)
        The metric in the folds that the baseline and another run have in common.

    Returns
    -------
    NoisePrior or None
        None if fewer than three comparisons are left. Equal comparisons count once: those of a run and its repetitions.
        A comparison without any spread does not count: that of a repetition of the baseline.

    References
    ----------
    G. Smyth, "Linear models and empirical Bayes methods for assessing differential expression in microarray
    experiments", Statistical Applications in Genetics and Molecular Biology 3 (2004).
    B. Phipson et al., "Robust hyperparameter estimation protects against hypervariable genes and improves power to
    detect differential expression", Annals of Applied Statistics 10 (2016).
    """
    from scipy.special import digamma, polygamma

    distinct = dict.fromkeys((tuple(before), tuple(after)) for before, after in pairs)
    found = [(_mean_and_variance(before, after)[1], len(after) - 1) for before, after in distinct]
    variances, df = np.array([each for each in found if each[0] > 0], dtype=float).reshape(-1, 2).T
    if len(variances) < MIN_COMPARISONS:
        return None
    regular = []
    for index, variance in enumerate(variances):
        rest, rest_df = np.delete(variances, index), np.delete(df, index)
        low, high = (_variance_quantile(rest, rest_df, level) for level in (OUTLIER_LEVEL, 1 - OUTLIER_LEVEL))
        regular.append(low <= variance <= high)
    variances, df = variances[regular], df[regular]
    if len(variances) < MIN_COMPARISONS:
        return None
    logs = np.log(variances) - digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, df / 2).mean())
    if excess <= 0:
        prior_variance, prior_df = float(np.average(variances, weights=df)), math.inf
    else:
        prior_df = 2 * _inverse_trigamma(excess)
        prior_variance = math.exp(logs.mean() + digamma(prior_df / 2) - math.log(prior_df / 2))
    max_variance = _variance_quantile(variances, df, 1 - UNMODERATED_LEVEL)
    return NoisePrior(prior_variance, prior_df, float(df.sum()), len(variances), max_variance)


def _variance_quantile(variances: np.ndarray, df: np.ndarray, level: float) -> float:
    """Return below which value a further variance is with this probability, given the median of these (F test)."""
    from scipy.special import chdtri, fdtri

    typical_df = float(np.median(df))
    median_of_chi_square = float(chdtri(typical_df, 0.5))
    typical = float(np.median(variances)) * typical_df / median_of_chi_square
    return typical * float(fdtri(typical_df, float(df.sum()), level))


def _inverse_trigamma(value: float) -> float:
    """Return x with trigamma(x) = value, by Newton's method on 1 / trigamma (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def correct_together(differences: Sequence[MetricDifference]) -> list[MetricDifference]:
    """Return differences with p values and intervals corrected for being shown together (Holm).

    The level of a significant one is that of its step in Holm's procedure. All others have the level of the first step
    that fails.
    """
    p_values = [difference.p if difference.has_interval else math.nan for difference in differences]
    corrected = holm(p_values)
    significant = sum(p < SIGNIFICANCE_LEVEL for p in corrected)
    smallest_first = _smallest_first(p_values)
    result = [replace(difference, corrected_p=math.nan) for difference in differences]
    for rank, index in enumerate(smallest_first):
        level = SIGNIFICANCE_LEVEL / (len(smallest_first) - min(rank, significant))
        result[index] = replace(differences[index], corrected_p=corrected[index], level=level)
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979), in their order.

    If no change has an effect, the probability that any corrected value is below 0.05 is at most 5 %. NaN stays NaN and
    is not counted.
    """
    smallest_first = _smallest_first(p_values)
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(smallest_first):
        largest = max(largest, min(1.0, p_values[index] * (len(smallest_first) - rank)))
        corrected[index] = largest
    return corrected


def _smallest_first(p_values: Sequence[float]) -> list[int]:
    """Return the indices of the p values that are not NaN, the smallest p value first."""
    valid = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    return sorted(valid, key=lambda index: p_values[index])
