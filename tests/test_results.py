"""The metrics of a run that can be computed by hand."""

import json
import math
from dataclasses import replace

import pytest
from hand_made import (
    BAG,
    COAT,
    CONFIG,
    ENVIRONMENT,
    HAT,
    HISTORIES,
    RUN_DIR,
    SECONDS,
    SHIRT,
    TEST_PREDICTIONS,
    make_hand_made_result,
)

from experiment.results import ExperimentResult, FitResult

CLASSES = ["Coat", "Shirt", "Bag"]


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


@pytest.fixture
def final(result: ExperimentResult) -> FitResult:
    assert result.final is not None
    return result.final


def test_confusion_matrix_has_true_classes_in_rows_and_predicted_classes_in_columns(final: FitResult) -> None:
    coats, shirts, bags = final.confusion
    assert coats == [2, 2, 0]  # two coats are predicted as shirts
    assert shirts == [1, 3, 0]  # one shirt is predicted as a coat
    assert bags == [0, 0, 2]


def test_confusion_matrix_has_the_order_of_the_classes(final: FitResult) -> None:
    assert final.classes == CLASSES
    assert [sum(row) for row in final.confusion] == [final.report[name]["support"] for name in CLASSES]


@pytest.mark.parametrize(
    ("name", "precision", "recall", "f1", "support"),
    [
        ("Coat", 2 / 3, 2 / 4, 4 / 7, 4),
        ("Shirt", 3 / 5, 3 / 4, 6 / 9, 4),
        ("Bag", 1.0, 1.0, 1.0, 2),
        ("macro avg", (2 / 3 + 3 / 5 + 1) / 3, 0.75, (4 / 7 + 6 / 9 + 1) / 3, 10),
        ("weighted avg", (4 * 2 / 3 + 4 * 3 / 5 + 2) / 10, 0.7, (4 * 4 / 7 + 4 * 6 / 9 + 2) / 10, 10),
    ],
)
def test_report_has_precision_recall_and_f1_of_each_class_and_their_averages(
    final: FitResult, name: str, precision: float, recall: float, f1: float, support: int
) -> None:
    row = {"precision": precision, "recall": recall, "f1-score": f1, "support": support}
    assert final.report[name] == pytest.approx(row)


def test_each_fit_has_its_own_loss_accuracy_and_history(result: ExperimentResult, final: FitResult) -> None:
    fits = [*result.folds, final]
    assert [(fit.name, fit.loss, fit.accuracy, fit.report["accuracy"]) for fit in fits] == [
        ("fold-1", 0.5, 0.75, 0.75),
        ("fold-2", 0.7, 0.5, 0.5),
        ("final", 0.9, 0.7, 0.7),
    ]
    assert {fit.name: fit.history for fit in fits} == HISTORIES


def test_class_without_images_has_no_row(final: FitResult) -> None:
    assert final.report.keys() == {*CLASSES, "macro avg", "weighted avg", "accuracy"}


def test_class_without_test_images_keeps_its_row() -> None:
    final = make_hand_made_result([(COAT, COAT, 0.9), (BAG, BAG, 0.9)]).final
    assert final is not None
    assert final.classes == CLASSES and final.confusion[CLASSES.index("Shirt")] == [0, 0, 0]


@pytest.mark.parametrize(("shape", "expected"), [((28, 28), True), ((3, 28, 28), False)])
def test_only_grey_images_are_drawn_dark_on_light(shape: tuple[int, ...], expected: bool) -> None:
    assert make_hand_made_result(black_images=shape).is_light_on_dark == expected


def test_class_that_is_never_predicted_has_zeros_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    final = make_hand_made_result([(COAT, COAT, 0.9), (SHIRT, COAT, 0.9), (BAG, COAT, 0.9)]).final
    assert final is not None
    assert final.report["Bag"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 1}
    assert not recwarn.list


def test_prediction_of_a_class_without_images_counts_as_wrong() -> None:
    result = make_hand_made_result([(COAT, HAT, 0.9), (SHIRT, SHIRT, 0.9), (BAG, BAG, 0.8)])
    assert result.final is not None
    assert result.final.accuracy == result.final.report["accuracy"] == pytest.approx(2 / 3)
    assert list(result.final.report) == [*CLASSES, "macro avg", "weighted avg", "accuracy"]
    assert result.mistakes[0].predicted == "Hat"


def test_mistakes_are_sorted_by_confidence_and_have_their_images(result: ExperimentResult) -> None:
    found = [
        (mistake.true, mistake.predicted, round(mistake.probability, 6), int(mistake.image[0, 1]))
        for mistake in result.mistakes
    ]
    # The last number is the position in TEST_PREDICTIONS, from 1.
    assert found == [("Coat", "Shirt", 0.95, 4), ("Coat", "Shirt", 0.6, 3), ("Shirt", "Coat", 0.5, 7)]


def test_first_24_mistakes_are_kept_and_equal_confidence_keeps_the_order_of_the_images() -> None:
    result = make_hand_made_result([*TEST_PREDICTIONS, *[(SHIRT, BAG, 0.75)] * 30])
    assert [int(mistake.image[0, 1]) for mistake in result.mistakes] == [4, *range(11, 34)]


def test_cross_validation_has_mean_and_sample_standard_deviation_over_the_folds(result: ExperimentResult) -> None:
    # F1 scores in fold-1: Coat 2/3, Shirt 2/3, Bag 1 (2, 1, 1 images); in fold-2: 0, 1/2, 1 (1, 2, 1 images).
    # The sample standard deviation of two numbers is their difference divided by the square root of 2.
    expected = {
        "accuracy_mean": (0.75 + 0.5) / 2,
        "loss_mean": (0.5 + 0.7) / 2,
        "macro_f1_mean": (7 / 9 + 1 / 2) / 2,
        "weighted_f1_mean": (3 / 4 + 1 / 2) / 2,
        "accuracy_std": 0.25 / math.sqrt(2),
        "loss_std": 0.2 / math.sqrt(2),
        "macro_f1_std": (7 / 9 - 1 / 2) / math.sqrt(2),
        "weighted_f1_std": 0.25 / math.sqrt(2),
    }
    assert result.cross_validation == pytest.approx(expected)


def test_fewer_than_two_folds_have_no_mean(result: ExperimentResult) -> None:
    assert replace(result, folds=result.folds[:1]).cross_validation == {}
    assert replace(result, folds=[]).cross_validation == {}


def test_diverged_fold_is_a_failure_and_not_among_the_folds() -> None:
    failures = {"fold-1": "fold-1 diverged in epoch 2."}
    result = make_hand_made_result(failures=failures)
    assert result.failures == failures
    assert [fold.name for fold in result.folds] == ["fold-2"]
    assert result.final is not None and result.mistakes


def test_diverged_final_fit_leaves_the_folds_and_no_mistakes() -> None:
    result = make_hand_made_result(failures={"final": "final diverged in epoch 1."})
    assert (result.final, result.mistakes, len(result.folds)) == (None, [], 2)
    assert result.to_dict()["final"] is None


def test_results_json_has_config_folds_final_failures_cross_validation_and_environment(
    result: ExperimentResult, final: FitResult
) -> None:
    content = json.loads(json.dumps(result.to_dict()))
    assert list(content) == ["config", "folds", "final", "failures", "cross_validation", "environment"]
    assert (content["config"], content["failures"]) == (CONFIG, {})
    assert content["cross_validation"] == result.cross_validation
    assert list(content["final"]) == ["name", "loss", "accuracy", "report", "history"]
    assert content["final"]["report"] == final.report and content["final"]["name"] == "final"
    assert [fold["accuracy"] for fold in content["folds"]] == [0.75, 0.5]


def test_environment_records_duration_and_whether_the_run_was_resumed(result: ExperimentResult) -> None:
    seconds = result.environment.pop("seconds")
    assert seconds == pytest.approx(SECONDS, abs=30)
    assert result.environment == ENVIRONMENT | {"resumed": False, "wandb_run_ids": {}}
    assert "seconds" not in ENVIRONMENT  # the experiment is not modified


def test_repr_has_three_lines(result: ExperimentResult) -> None:
    assert repr(result).splitlines() == [
        f"ExperimentResult in {RUN_DIR}",
        "  test accuracy 0.7000, loss 0.9000",
        "  2 folds: accuracy 0.6250 ± 0.1768 (standard deviation)",
    ]
    diverged = replace(result, final=None, folds=result.folds[:1])
    assert repr(diverged).splitlines()[1:] == ["  no final fit: it diverged", "  1 folds"]
