"""What a fit and an experiment came to."""

import numpy as np
import pytest
from conftest import all_fits

from experiment.results import ExperimentResult


def test_the_cross_validation_uses_the_sample_standard_deviation(cnn_result: ExperimentResult) -> None:
    accuracies = [fold.accuracy for fold in cnn_result.folds]
    assert cnn_result.cross_validation["accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert cnn_result.cross_validation["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))


def test_the_report_has_three_figures_for_every_class(cnn_result: ExperimentResult) -> None:
    for fit in all_fits(cnn_result):
        for name in map(str, range(10)):
            assert {"precision", "recall", "f1-score"} <= fit.report[name].keys()
