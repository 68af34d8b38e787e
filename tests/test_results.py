"""What a fit and an experiment came to: the figures of a run that can be worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
from hand_made import (
    BAG,
    CLASS_NAMES,
    COAT,
    CONFIG,
    ENVIRONMENT,
    HAT,
    HISTORIES,
    RUN_NAME,
    SHIRT,
    TEST_ANSWERS,
    make_checkpoints,
    make_hand_made_result,
)

from data_utils import PROJECT_DIR
from experiment.results import ExperimentResult, FitResult

CLASSES = ["Coat", "Shirt", "Bag"]


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


@pytest.fixture
def final(result: ExperimentResult) -> FitResult:
    assert result.final is not None
    return result.final


def test_the_confusion_matrix_has_true_classes_in_rows_and_predicted_ones_in_columns(final: FitResult) -> None:
    of_coats, of_shirts, of_bags = final.confusion
    assert of_coats == [2, 2, 0]  # two coats are taken for shirts
    assert of_shirts == [1, 3, 0]  # one shirt for a coat
    assert of_bags == [0, 0, 2]


def test_the_confusion_matrix_has_the_order_of_the_classes(final: FitResult) -> None:
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
def test_the_report_has_precision_recall_and_f1_of_each_class_and_their_averages(
    final: FitResult, name: str, precision: float, recall: float, f1: float, support: int
) -> None:
    row = {"precision": precision, "recall": recall, "f1-score": f1, "support": support}
    assert final.report[name] == pytest.approx(row)


def test_loss_and_accuracy_are_those_of_the_images_evaluated_on(result: ExperimentResult, final: FitResult) -> None:
    assert (final.loss, final.accuracy, final.report["accuracy"]) == (0.9, 0.7, 0.7)
    assert [(fold.name, fold.loss, fold.accuracy) for fold in result.folds] == [
        ("fold-1", 0.5, 0.75),
        ("fold-2", 0.7, 0.5),
    ]


def test_each_fit_keeps_its_own_history(result: ExperimentResult, final: FitResult) -> None:
    assert {fit.name: fit.history for fit in (*result.folds, final)} == HISTORIES


def test_a_class_without_any_image_has_no_row(final: FitResult) -> None:
    assert final.report.keys() == {*CLASSES, "macro avg", "weighted avg", "accuracy"}


def test_a_class_that_is_never_predicted_has_zeros_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    answers = [(COAT, COAT, 0.9), (SHIRT, COAT, 0.9), (BAG, COAT, 0.9)]
    result = make_hand_made_result(make_checkpoints(answers))
    assert result.final is not None
    assert result.final.report["Bag"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 1}
    assert not recwarn.list


def test_an_image_taken_for_a_class_without_images_counts_against_the_accuracy() -> None:
    result = make_hand_made_result(make_checkpoints([(COAT, HAT, 0.9), (SHIRT, SHIRT, 0.9), (BAG, BAG, 0.8)]))
    assert result.final is not None
    assert result.final.accuracy == result.final.report["accuracy"] == pytest.approx(2 / 3)
    assert list(result.final.report) == [*CLASSES, "macro avg", "weighted avg", "accuracy"]
    assert result.mistakes[0].predicted == "Hat"


def test_the_mistakes_come_the_surest_first_with_how_sure_the_network_was(result: ExperimentResult) -> None:
    found = [(mistake.true, mistake.predicted, round(mistake.probability, 6)) for mistake in result.mistakes]
    assert found == [("Coat", "Shirt", 0.95), ("Coat", "Shirt", 0.6), ("Shirt", "Coat", 0.5)]


def test_each_mistake_has_its_own_image(result: ExperimentResult) -> None:
    assert [int(mistake.image[0, 1]) for mistake in result.mistakes] == [4, 3, 7]  # the places in TEST_ANSWERS


def test_mistakes_of_the_same_sureness_keep_the_order_of_the_images() -> None:
    answers = [*TEST_ANSWERS, *[(SHIRT, BAG, 0.75)] * 30]
    result = make_hand_made_result(make_checkpoints(answers))
    alike = [int(mistake.image[0, 1]) for mistake in result.mistakes if mistake.probability == 0.75]
    assert alike == list(range(11, 11 + len(alike)))


def test_no_more_than_24_mistakes_are_kept() -> None:
    result = make_hand_made_result(make_checkpoints([(SHIRT, BAG, 0.75)] * 30))
    assert len(result.mistakes) == 24


def test_the_cross_validation_has_mean_and_sample_standard_deviation_over_the_folds(result: ExperimentResult) -> None:
    # The F1 of fold-1: Coat 2/3, Shirt 2/3, Bag 1, of 2, 1 and 1 images; of fold-2: 0, 1/2, 1, of 1, 2 and 1.
    expected = {
        "accuracy_mean": (0.75 + 0.5) / 2,
        "loss_mean": (0.5 + 0.7) / 2,
        "macro_f1_mean": (7 / 9 + 1 / 2) / 2,
        "weighted_f1_mean": (3 / 4 + 1 / 2) / 2,
        "accuracy_std": 0.25 / math.sqrt(2),  # of two numbers: their difference by the root of 2
        "loss_std": 0.2 / math.sqrt(2),
        "macro_f1_std": (7 / 9 - 1 / 2) / math.sqrt(2),
        "weighted_f1_std": 0.25 / math.sqrt(2),
    }
    assert result.cross_validation == pytest.approx(expected)


def test_two_folds_have_a_spread_and_one_has_none(result: ExperimentResult) -> None:
    assert result.cross_validation
    assert replace(result, folds=result.folds[:1]).cross_validation == {}
    assert replace(result, folds=[]).cross_validation == {}


def test_a_fold_that_diverged_is_told_and_takes_no_part() -> None:
    checkpoints = make_checkpoints()
    checkpoints["fold-1"] |= {"failure": "fold-1 diverged in epoch 2.", "evaluation": None}
    result = make_hand_made_result(checkpoints)
    assert result.failures == {"fold-1": "fold-1 diverged in epoch 2."}
    assert [fold.name for fold in result.folds] == ["fold-2"]
    assert result.final is not None and result.mistakes


def test_without_the_final_fit_there_are_folds_and_no_mistakes() -> None:
    checkpoints = make_checkpoints()
    checkpoints["final"] |= {"failure": "final diverged in epoch 1.", "evaluation": None}
    result = make_hand_made_result(checkpoints)
    assert (result.final, result.mistakes, len(result.folds)) == (None, [], 2)
    assert result.to_dict()["final"] is None


def test_results_json_holds_config_folds_final_failures_cross_validation_and_environment(
    result: ExperimentResult, final: FitResult
) -> None:
    content = json.loads(json.dumps(result.to_dict()))
    assert list(content) == ["config", "folds", "final", "failures", "cross_validation", "environment"]
    assert (content["config"], content["environment"], content["failures"]) == (CONFIG, ENVIRONMENT, {})
    assert content["cross_validation"] == result.cross_validation
    assert list(content["final"]) == ["name", "loss", "accuracy", "report", "history"]
    assert content["final"]["report"] == final.report and content["final"]["name"] == "final"
    assert [fold["accuracy"] for fold in content["folds"]] == [0.75, 0.5]


def test_a_result_shows_itself_in_three_lines(result: ExperimentResult) -> None:
    assert repr(result).splitlines() == [
        f"ExperimentResult in {PROJECT_DIR / 'runs' / RUN_NAME}",
        "  test accuracy 0.7000, loss 0.9000",
        "  2 folds: accuracy 0.6250 ± 0.1768 (standard deviation)",
    ]


def test_a_result_without_a_final_fit_or_a_spread_says_so(result: ExperimentResult) -> None:
    lines = repr(replace(result, final=None, folds=result.folds[:1])).splitlines()
    assert lines[1:] == ["  no final fit: it diverged", "  1 folds"]


def test_a_class_that_no_test_image_shows_keeps_its_row() -> None:
    result = make_hand_made_result(make_checkpoints([(COAT, COAT, 0.9), (BAG, BAG, 0.9)]))
    assert result.final is not None
    assert result.final.classes == CLASSES and result.final.confusion[CLASSES.index("Shirt")] == [0, 0, 0]
    assert CLASS_NAMES[HAT] not in result.final.report
