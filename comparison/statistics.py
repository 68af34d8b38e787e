"""The corrected paired t-test for the folds of two runs, and Holm's correction for several comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class MetricDifference:
    """The difference of one metric between two runs, over the folds that both have.

    Attributes
    ----------
    metric : str
        "accuracy", "loss" or the name of a class, for its F1 score.
    before, after : list of float
        The metric in each fold.
    mean, standard_error, p : float
        As `paired_difference` returns them.
    """

    metric: str
    before: list[float]
    after: list[float]
    mean: float
    standard_error: float
    p: float

    @property
    def per_fold(self) -> list[float]:
        """The difference in each fold."""
        return [new - old for old, new in zip(self.before, self.after, strict=True)]

    @property
    def is_identical(self) -> bool:
        """Whether the metric is equal to the bit in every fold."""
        return self.before == self.after

    @property
    def ci_half_width(self) -> float:
        """Half the width of the 95 % confidence interval of the mean."""
        from scipy.special import stdtrit

        return self.standard_error * float(stdtrit(len(self.after) - 1, 0.975))

    @property
    def max_extent(self) -> float:
        """The largest distance from 0 of a fold's difference or of an end of the confidence interval."""
        return max(abs(self.mean) + self.ci_half_width, *map(abs, self.per_fold))

    def verdict(self, p: float) -> str:
        """Return "identical", "not significant", "better" or "worse", given a p value (as it is or corrected)."""
        if self.is_identical:
            return "identical"
        if not p < SIGNIFICANCE_LEVEL:  # also where p is NaN
            return "not significant"
        improved = self.mean < 0 if self.metric == "loss" else self.mean > 0
        return "better" if improved else "worse"


def compare_metric(metric: str, before: list[float], after: list[float], folds: int) -> MetricDifference:
    """Return the difference of a metric, given its values in the same folds of two runs; see `paired_difference`."""
    return MetricDifference(metric, before, after, *paired_difference(before, after, folds))


def paired_difference(before: Sequence[float], after: Sequence[float], folds: int) -> tuple[float, float, float]:
    """Return mean, standard error and two-sided p value of a metric's differences in the folds of two runs.

    This is the corrected paired t-test (Nadeau and Bengio, 2003): the squared standard error is the variance of the
    differences times 1/J + 1/(K − 1), since a fold's test set is to its training set as 1 to K − 1.

    Parameters
    ----------
    before, after : sequence of float, shape (J,)
        The metric in J ≥ 2 folds that both runs have.
    folds : int
        K, the number of folds of each run.

    Returns
    -------
    mean, standard_error, p : float
        If all folds differ by the same amount, the standard error is 0 and p is NaN; p is 1 if none differs.
    """
    from scipy.special import stdtr

    differences = np.subtract(after, before)
    mean = float(differences.mean())
    rounding = 1e-12 * np.abs([before, after]).max()
    if np.ptp(differences) <= rounding:
        return mean, 0.0, 1.0 if mean == 0 else math.nan
    standard_error = math.sqrt(differences.var(ddof=1) * (1 / len(differences) + 1 / (folds - 1)))
    p = 2 * stdtr(len(differences) - 1, -abs(mean) / standard_error)
    return mean, standard_error, float(p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm, 1979), in their order.

    If no change has an effect, the probability that any corrected value is below 0.05 is at most 5 %. NaN stays NaN and
    is not counted.
    """
    valid = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    valid.sort(key=lambda index: p_values[index])
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(valid):
        largest = max(largest, min(1.0, p_values[index] * (len(valid) - rank)))
        corrected[index] = largest
    return corrected
