"""What the networks predict for each image: predictions.csv and the doubtful labels."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from conftest import Configure
from hand_made import make_dataset, make_hand_made_result

import main_tutorial
from data_files import load_dataset
from data_utils import Dataset
from experiment.predictions import MAX_DOUBTFUL_LABELS, Predictions, find_doubtful_labels, pictures_csv, predictions_csv
from experiment.results import ExperimentResult

DATASET = make_dataset(torch.zeros(10))
NAMES = DATASET.class_names


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return make_hand_made_result()


def read(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))


def with_first_class(name: str) -> Dataset:
    return DATASET._replace(class_names=[name, *NAMES[1:]])


def test_rows_are_the_training_images_in_their_order_then_the_test_images(result: ExperimentResult) -> None:
    rows = read(predictions_csv(result.predictions, DATASET))
    expected = [(str(index), f"fold-{fold}") for index, fold in zip((0, 1, 2, 3, 4, 5, 7, 8), "11212212", strict=True)]
    expected += [(str(index), "test") for index in range(10)]
    assert [(row["index"], row["split"]) for row in rows] == expected


def test_row_has_label_prediction_doubt_and_the_probability_of_each_class(result: ExperimentResult) -> None:
    row = read(predictions_csv(result.predictions, DATASET))[1]
    assert (row["label"], row["prediction"]) == ("Coat", "Shirt")
    assert float(row["p(Shirt)"]) == pytest.approx(0.9) and float(row["p(Coat)"]) == pytest.approx(0.1 / 3)
    assert float(row["label_doubt"]) == pytest.approx(1 - 0.1 / 3)
    assert list(row)[5:] == [f"p({name})" for name in NAMES]


def test_probabilities_are_read_back_as_the_same_float32() -> None:
    probabilities = torch.randn(50, 4).mul(9).softmax(1)
    part = Predictions("test", torch.arange(50), torch.zeros(50, dtype=torch.int64), probabilities)
    table = pandas.read_csv(io.BytesIO(predictions_csv([part], DATASET)))
    assert torch.equal(torch.tensor(table.iloc[:, 5:].to_numpy(), dtype=torch.float32), probabilities)


@pytest.mark.parametrize("name", ['a "quoted", name', "two\nlines", "Mütze 🧢"])
def test_any_class_name_is_read_back(name: str, result: ExperimentResult) -> None:
    table = pandas.read_csv(io.BytesIO(predictions_csv(result.predictions, with_first_class(name))))
    assert table["label"][0] == name and f"p({name})" in table.columns


@pytest.mark.parametrize(("name", "marked"), [("Mütze", True), ("Hat", False)])
def test_only_a_file_that_is_not_ascii_has_a_byte_order_mark(name: str, marked: bool, result: ExperimentResult) -> None:
    content = predictions_csv(result.predictions, with_first_class(name))
    assert content.startswith("\ufeff".encode()) == marked


@pytest.mark.parametrize("name", ["=1+1", "+49", "-x", "@home"])
def test_class_name_that_begins_like_a_formula_gets_an_apostrophe(name: str, result: ExperimentResult) -> None:
    assert read(predictions_csv(result.predictions, with_first_class(name)))[0]["label"] == f"'{name}"


def test_prediction_of_a_logit_without_a_class_is_named() -> None:
    part = Predictions("test", torch.arange(1), torch.tensor([0]), torch.tensor([[0.1, 0.2, 0.7]]))
    row = read(predictions_csv([part], DATASET._replace(class_names=["cat", "dog"])))[0]
    assert row["prediction"] == "no class (logit 2)" and list(row)[5:] == ["p(cat)", "p(dog)"]


def test_fit_that_diverged_has_no_rows() -> None:
    result = make_hand_made_result(failures={"fold-1": "fold-1 diverged.", "final": "final diverged."})
    assert {row["split"] for row in read(predictions_csv(result.predictions, DATASET))} == {"fold-2"}


def test_pictures_of_a_folder_have_their_file_in_the_first_column(result: ExperimentResult) -> None:
    files = [f"train/{number}.jpg" for number in range(10)] + [f"=test, {number}.jpg" for number in range(10)]
    dataset = DATASET._replace(files=tuple(files))
    rows = read(predictions_csv(result.predictions, dataset))
    assert [row["file"] for row in (rows[0], rows[6], rows[8])] == ["train/0.jpg", "train/7.jpg", "'=test, 0.jpg"]
    assert find_doubtful_labels(result.predictions, dataset)[0].name == "train/1.jpg"


@pytest.mark.parametrize(
    ("folder", "path", "label"),
    [
        ("Äpfel", "0.png", "Äpfel"),
        (".", "A\u0308pfel/0.png", "Äpfel"),
        ("Äpfel/new", "../0.png", "Äpfel"),
        (".", "0.png", ""),
    ],
)
def test_label_of_a_picture_is_its_folder_whatever_the_path_is_relative_to(
    folder: str, path: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    row = read(pictures_csv([Path(path)], torch.tensor([[0.75, 0.25]]), ["Äpfel", "dog"]))[0]
    assert (row["file"], row["label"], row["label_doubt"]) == (path, label, "0.25" if label else "")


def test_run_without_any_result_has_only_the_header() -> None:
    assert (
        predictions_csv([], DATASET._replace(class_names=["cat"]))
        == b"index,split,label,prediction,label_doubt,p(cat)\n"
    )


def test_doubtful_labels_are_the_wrongly_predicted_training_images_the_least_probable_label_first(
    result: ExperimentResult,
) -> None:
    part = result.predictions[0]
    part = replace(part, probabilities=part.probabilities.clone())
    part.probabilities[2] = torch.tensor([0.97, 0.01, 0.01, 0.01])  # image 3, a shirt
    doubtful = find_doubtful_labels([part, *result.predictions[1:]], DATASET)
    assert [(item.name, item.label, item.predicted) for item in doubtful] == [
        ("3", "Shirt", "Coat"),
        ("1", "Coat", "Shirt"),
        ("2", "Coat", "Shirt"),
        ("5", "Shirt", "Coat"),
    ]
    assert doubtful[0].probability == pytest.approx(0.01)


def test_at_most_24_labels_are_listed() -> None:
    images = 30
    part = Predictions(
        "fold-1",
        torch.zeros(images, dtype=torch.int64),
        torch.zeros(images, dtype=torch.int64),
        torch.tensor([[0.1, 0.9]] * images),
    )
    assert len(find_doubtful_labels([part], DATASET)) == MAX_DOUBTFUL_LABELS == 24


def test_csv_of_a_run_agrees_with_its_results(configure: Configure) -> None:
    result = configure(main_tutorial, EPOCHS=1).main()
    table = pandas.read_csv(result.run_dir / "predictions.csv", dtype={"label": str, "prediction": str})
    dataset = load_dataset("Digits", main_tutorial.DATA_DIR)
    assert table["split"].value_counts()["test"] == len(dataset.test_labels)
    train = table[table["split"] != "test"]
    assert train["index"].tolist() == list(range(len(dataset.train_labels)))
    assert train["label"].tolist() == [dataset.class_names[label] for label in dataset.train_labels]
    for fit, split in [*((fold, fold.name) for fold in result.folds), (result.final, "test")]:
        rows = table[table["split"] == split]
        assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(fit.accuracy)
        cross_entropy = -torch.tensor(1 - rows["label_doubt"].to_numpy()).log().mean().item()
        assert cross_entropy == pytest.approx(fit.loss, rel=1e-4)
