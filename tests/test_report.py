"""The report of a run: what report.md holds."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hand_made import FIGURES, RUN_DIR, make_experiment, make_hand_made_result

from experiment import report as report_module
from experiment.report import CAPTIONS, report_markdown
from experiment.results import ExperimentResult


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


def make_report(
    result: ExperimentResult, network: str = "NeuralNetwork", comparison: str = "", figures: tuple[str, ...] = FIGURES
) -> str:
    return report_markdown(result, make_experiment(network), comparison, list(figures))


def section(report: str, heading: str) -> str:
    """Return the report's text from a heading to the next."""
    return report.split(f"\n## {heading}\n\n")[1].split("\n\n## ")[0].rstrip("\n")


def test_report_begins_with_name_and_summary(result: ExperimentResult) -> None:
    assert make_report(result).split("\n\n")[:2] == [
        f"# {RUN_DIR.name}",
        "Test accuracy **0.7000**, loss 0.9000. Over 2 folds: accuracy 0.6250 ± 0.1768, loss 0.6000 ± 0.1414 "
        "(± standard deviation).",
    ]


def test_report_has_the_command_that_repeats_the_run_with_every_hyperparameter(result: ExperimentResult) -> None:
    command = (
        "python main_tutorial.py --dataset FashionMNIST --image-shape 1x28x28 --folds 2 --epochs 2 --batch-size 64 "
        "--learning-rate 0.001 --lr-schedule cosine --mirror True --rng-seed 314 --device cpu --precision bfloat16"
    )
    assert f"To repeat this run:\n\n```\n{command}\n```\n" in make_report(result)


@pytest.mark.parametrize(
    ("running", "network", "script"),
    [
        ("/elsewhere/main_cnn.py", "NeuralNetwork", "main_cnn.py"),  # the running script, whatever it trains
        ("/usr/bin/pytest", "NeuralNetwork", "main_tutorial.py"),
        (None, "ConvolutionalNeuralNetwork", "main_cnn.py"),
    ],
)
def test_command_names_the_script_that_trains_the_network(
    running: str | None, network: str, script: str, result: ExperimentResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=running))
    assert re.findall(r"^python (\S+)", make_report(result, network), re.MULTILINE)[0] == script


def test_run_of_a_users_own_network_is_repeated_with_constants(result: ExperimentResult) -> None:
    sentence, constants = make_report(result, "Own").split("\n\n")[2:4]
    assert sentence == "To repeat this run, train Own with these constants:"
    assert constants.splitlines()[1:-1] == [
        "DATASET = 'FashionMNIST'",
        "IMAGE_SHAPE = (1, 28, 28)",
        "FOLDS = 2",
        "EPOCHS = 2",
        "BATCH_SIZE = 64",
        "LEARNING_RATE = 0.001",
        "LR_SCHEDULE = 'cosine'",
        "MIRROR = True",
        "RNG_SEED = 314",
        "DEVICE = 'cpu'",
        "PRECISION = 'bfloat16'",
    ]


def test_report_has_the_tables_of_the_terminal_and_the_duration(result: ExperimentResult) -> None:
    results = section(make_report(result), "Results")
    assert "```\nCross-validation\n  fold      accuracy     loss\n  fold-1      0.7500   0.5000\n" in results
    assert "```\nTest set, 10 images\n" in results
    assert results.endswith("\n\nTime taken: 1:02:03.")


def test_report_says_which_fits_diverged() -> None:
    failures = {"final": "final diverged in epoch 1.", "fold-1": "fold-1 diverged in epoch 2."}
    report = make_report(make_hand_made_result(failures=failures))
    assert report.split("\n\n")[1] == "No final fit."
    assert "\n\n- final diverged in epoch 1.\n\n- fold-1 diverged in epoch 2.\n\n" in report
    assert "Test set" not in report and "model.pt" not in report and "classify.py" not in report


def test_report_of_a_run_whose_folds_all_diverged_has_the_test(result: ExperimentResult) -> None:
    report = make_report(replace(result, folds=[]))
    assert "Cross-validation: all folds diverged" in report and "Test set, 10 images" in report


def test_epochs_table_has_the_means_over_the_folds(result: ExperimentResult) -> None:
    assert section(make_report(result), "Epochs").splitlines() == [
        "| epoch | training: loss | accuracy | validation: loss | accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 1.1000 | 0.4500 | 0.9000 | 0.3750 |",
        "| 2 | 0.7000 | 0.6500 | 0.6000 | 0.6250 |",
    ]


def test_report_shows_every_figure_with_its_caption(result: ExperimentResult) -> None:
    figures = section(make_report(result), "Figures").split("\n\n")
    assert figures[::2] == [f"![{name}]({name})" for name in FIGURES]
    assert figures[1::2] == [CAPTIONS[name] for name in FIGURES]


def test_comparison_is_shown_with_its_figure_before_the_results(result: ExperimentResult) -> None:
    report = make_report(result, comparison="Compared with runs/before", figures=(*FIGURES, "compare.png"))
    assert section(report, "Did it help?") == (
        f"```\nCompared with runs/before\n```\n\n![compare.png](compare.png)\n\n{CAPTIONS['compare.png']}"
    )
    assert report.index("## Did it help?") < report.index("## Results")
    assert report.count("compare.png)") == 1
    assert "Did it help?" not in make_report(result)


def test_report_shows_the_network_and_the_number_of_its_parameters(result: ExperimentResult) -> None:
    assert section(make_report(result), "Network: 669,706 parameters") == "```\nNeuralNetwork()\n```"


def test_environment_table_leaves_out_what_is_empty(result: ExperimentResult) -> None:
    assert section(make_report(result), "Environment").splitlines() == [
        "| what | value |",
        "| --- | --- |",
        "| started | 2026-11-26T18:30:00+00:00 |",
        "| machine | Linux x86_64, 2 cores |",
        "| versions | python 3.11.7, torch 2.14.1 |",
        "| device | cpu |",
        "| precision | bfloat16 |",
        "| threads per fit | 1 |",
        "| workers | 2 |",
    ]


def test_list_of_files_and_of_the_runs_in_wandb(result: ExperimentResult) -> None:
    assert "Weights & Biases" not in make_report(result)
    result.environment["wandb_run_ids"] = {"final": "abc"}
    assert section(make_report(result), "Files").splitlines() == [
        "- `results.json`: every metric at full precision; `config.json`: the settings.",
        "- `predictions.csv`: what is predicted for each training image, out of fold, and for each test image.",
        "- `model.pt`: the parameters of the final network, for `load_state_dict`.",
        f"- `python classify.py picture.png --run {RUN_DIR.name}` prints what the final network predicts for a picture "
        "of yours.",
        f"- Weights & Biases: the runs of the group `{RUN_DIR.name}`.",
    ]


def test_classify_command_says_where_the_run_and_its_network_are(result: ExperimentResult, tmp_path: Path) -> None:
    elsewhere = replace(result, run_dir=tmp_path / "with a blank" / RUN_DIR.name)
    command = f"--run {RUN_DIR.name} --runs-dir '{tmp_path}/with a blank' --network file.py:Own` prints"
    assert command in make_report(elsewhere, "Own")


def test_models_file_in_another_encoding_is_searched_for_the_network(
    result: ExperimentResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_bytes("# für mich\nclass Own(nn.Module):\n".encode("latin-1"))
    monkeypatch.setattr(report_module, "PROJECT_DIR", tmp_path)
    report = make_report(result, "Own")
    assert "classify.py picture.png" in report and "--network" not in report
