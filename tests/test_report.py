"""The report of a run: what report.html contains, and when it is written."""

import html
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hand_made import FIGURES, HISTORIES, RUN_DIR, Clock, make_experiment, make_hand_made_result
from synthetic_runs import BETTER, make_run
from torch import nn

from comparison.pair import PairComparison, compare_runs
from comparison.run_reader import read_run
from experiment import report as report_module
from experiment.errors import RunError
from experiment.report import MIN_SILENCE, Report, report_page, unfinished_page
from experiment.results import ExperimentResult
from experiment.terminal import duration_line
from models import NeuralNetwork

PNG = b"\x89PNG"


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


@pytest.fixture
def pair(tmp_path: Path) -> PairComparison:
    before, after = make_run(tmp_path / "before"), make_run(tmp_path / "after", BETTER, mirror=True, minutes=1)
    return compare_runs(read_run(before), read_run(after))


def make_report(
    result: ExperimentResult,
    network: str = "NeuralNetwork",
    comparison: PairComparison | str = "",
    figures: tuple[str, ...] = FIGURES,
    model_class: Callable[[], nn.Module] = NeuralNetwork,
) -> str:
    pngs = dict.fromkeys(figures, PNG)
    return report_page(result, make_experiment(network), model_class, comparison, pngs).decode()


def section(report: str, heading_id: str) -> str:
    """Return the part of a report from the heading with this id to the next."""
    return report.split(f'<h2 id="{heading_id}">')[1].split("<h2")[0]


def text_of(markup: str) -> str:
    """Return a part of a report as text, each cell and paragraph on a line."""
    markup = re.sub(r"</(p|tr|li|dd|dt|pre|h\d|caption)>|<br>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]*>", " ", markup))
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def test_report_begins_with_the_metrics(result: ExperimentResult) -> None:
    report = make_report(result, comparison="First finished run.")
    assert "<h1>NeuralNetwork on FashionMNIST</h1>" in report
    metrics = text_of(report.split('<dl class="metrics">')[1].split("</dl>")[0]).splitlines()
    assert metrics == [
        "Test set",
        "0.7000 accuracy",
        "0.9000 loss, 10 images",
        "Cross-validation",
        "0.6250 ± 0.1768 accuracy",
        "0.6000 ± 0.1414 loss, 2 folds, mean ± standard deviation",
        "Did it help?",
        "First finished run.",
    ]
    assert f"{duration_line(result).lower()}</p>" in report


def test_report_has_the_command_that_repeats_the_run_with_every_hyperparameter(result: ExperimentResult) -> None:
    command = (
        "python main_tutorial.py --dataset FashionMNIST --image-shape 1x28x28 --folds 2 --epochs 2 --batch-size 64 "
        "--learning-rate 0.001 --lr-schedule cosine --mirror True --rng-seed 314 --device cpu --precision bfloat16"
    )
    assert f"<pre>{command}</pre>" in section(make_report(result), "repeat")


def test_command_names_other_folders_and_quotes_them(result: ExperimentResult, tmp_path: Path) -> None:
    experiment = make_experiment()
    config = experiment.config.to_dict() | {"dataset": "my pictures", "runs_dir": str(tmp_path / "a b")}
    experiment.config = SimpleNamespace(to_dict=lambda: config | {"data_dir": "data"})
    report = html.unescape(report_page(result, experiment, NeuralNetwork, "", {}).decode())
    assert "--dataset 'my pictures' " in report and f"--runs-dir '{tmp_path}/a b'</pre>" in report
    assert "--data-dir" not in report


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
    assert re.findall(r"<pre>python (\S+)", make_report(result, network))[0] == script


def test_run_of_a_users_own_network_is_repeated_with_constants(result: ExperimentResult) -> None:
    sentence, *constants = text_of("<h2>" + section(make_report(result, "Own"), "repeat")).splitlines()[1:]
    assert sentence == "Train Own with these constants:"
    assert constants == [
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


def test_report_has_the_scores_of_folds_and_classes(result: ExperimentResult) -> None:
    scores = text_of(section(make_report(result), "scores")).splitlines()
    assert "fold-1 0.7500 0.5000" in scores and "class precision recall F1 images" in scores
    assert any(re.fullmatch(r"Coat 0\.\d{4} 0\.5000 0\.\d{4} 4", line) for line in scores)


def test_report_says_which_fits_diverged() -> None:
    failures = {"final": "final diverged in epoch 1.", "fold-1": "fold-1 diverged in epoch 2."}
    report = make_report(make_hand_made_result(failures=failures))
    for sentence in ("Finished, but not every network has a result.", *failures.values(), "The final fit diverged."):
        assert sentence in report
    assert "model.pt" not in report and "classify.py" not in report


def test_report_of_a_run_whose_folds_all_diverged_has_the_test(result: ExperimentResult) -> None:
    report = make_report(replace(result, folds=[]))
    assert "All folds diverged." in report and "10 images" in report


def test_epochs_table_has_the_means_over_the_folds(result: ExperimentResult) -> None:
    assert text_of(section(make_report(result), "epochs")).splitlines()[1:] == [
        "Means over the folds after each epoch",
        "epoch training loss training accuracy validation loss validation accuracy",
        "1 1.1000 0.4500 0.9000 0.3750",
        "2 0.7000 0.6500 0.6000 0.6250",
    ]


def test_metric_that_some_epochs_lack_has_a_dash_there_in_the_epochs_table(result: ExperimentResult) -> None:
    folds = []
    for number, fold in enumerate(result.folds):
        first, last = fold.history
        folds.append(replace(fold, history=[first, last | {"own/error": 0.25 + number / 2}]))
    rows = text_of(section(make_report(replace(result, folds=folds)), "epochs")).splitlines()[2:]
    assert rows[0].endswith(" validation accuracy own/error")
    assert [row.split()[-1] for row in rows[1:]] == ["–", "0.5000"]


def test_figures_are_inside_the_page_with_a_description(result: ExperimentResult) -> None:
    report = make_report(result)
    images = re.findall(r'<img src="(.*?)" alt="(.*?)"></div>', report)
    assert [source for source, _ in images] == ["data:image/png;base64,iVBORw=="] * 3
    per_class, confusion, mistakes = (alt for _, alt in images)
    assert "Best on the test images: Bag 1.000; worst: " in per_class
    assert "Most frequent confusion: 2 images of Coat predicted as Shirt." in confusion
    assert "3 images; the first: Coat predicted as Shirt (95.0 %)" in mistakes
    curves = re.findall(r'<svg class="chart" .*? aria-label="(.*?)">', report)
    assert curves[0].startswith("Loss after each epoch: mean training loss 1.1 after epoch 1, 0.7 after epoch 2; ")
    assert "learning_curves.png" in section(report, "files")


def test_labels_to_check_have_their_image_name_label_and_prediction(result: ExperimentResult) -> None:
    result.doubtful_labels[0].name = "cats/<1>.jpg"
    labels = text_of("<h2>" + section(make_report(result), "labels"))
    assert "cats/<1>.jpg\nlabel: Coat (3.3 %)\npredicted: Shirt" in labels
    assert make_report(result).count('<li><img src="data:image/png;base64,iVBORw0K') == 3


@pytest.mark.parametrize("is_light_on_dark", [True, False])
def test_caption_of_the_mistakes_says_that_they_are_inverted(result: ExperimentResult, is_light_on_dark: bool) -> None:
    result.is_light_on_dark = is_light_on_dark
    assert ("they are drawn dark on light" in section(make_report(result), "mistakes")) == is_light_on_dark


def test_tiny_probability_of_a_label_is_shown_without_an_exponent(result: ExperimentResult) -> None:
    result.doubtful_labels[0].probability = 2.3e-8
    assert "label: Coat (< 0.01 %)" in text_of("<h2>" + section(make_report(result), "labels"))


def test_report_says_which_folds_have_no_predictions() -> None:
    report = make_report(make_hand_made_result(failures={"fold-1": "fold-1 diverged in epoch 1."}))
    assert "for each test image; it has no rows of fold-1" in text_of("<h2>" + section(report, "files"))


def test_report_requests_nothing_from_elsewhere(result: ExperimentResult, pair: PairComparison) -> None:
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"' )>]+)""", make_report(result, comparison=pair))
    assert {address for address in addresses if not address.startswith("data:")} == {"../index.html"}


def test_comparison_and_the_settings_that_differ_are_shown(result: ExperimentResult, pair: PairComparison) -> None:
    report = make_report(result, comparison=pair)
    comparison = section(report, "comparison")
    assert "Compared with <strong>before</strong>" in comparison and "<li>MIRROR False → True</li>" in comparison
    assert comparison.count('<svg class="plot"') == 4 and '<span class="good">better' in comparison
    marked = re.findall(r"<code>(\w+)</code></th><td class=\"text\"><mark>(.*?)</mark>", section(report, "settings"))
    assert ("MIRROR", "True") in marked and ("BATCH_SIZE", "64") not in marked
    assert "Marked: what differs from before" in report


@pytest.mark.parametrize("comparison", ["", "First finished run."])
def test_report_without_comparison_says_why(comparison: str, result: ExperimentResult) -> None:
    report = make_report(result, comparison=comparison)
    assert (comparison or "Not compared.") in report and 'id="comparison"' not in report


def test_report_shows_the_network_and_the_number_of_its_parameters(result: ExperimentResult) -> None:
    assert section(make_report(result), "network").startswith(
        "Network: 669,706 trainable parameters</h2>\n<pre>NeuralNetwork()"
    )


def test_environment_table_leaves_out_what_is_empty(result: ExperimentResult) -> None:
    assert text_of(section(make_report(result), "machine")).splitlines()[1:] == [
        "what value",
        "machine Linux x86_64, 2 cores",
        "versions python 3.11.7, torch 2.14.1",
        "device cpu",
        "precision bfloat16",
        "threads per fit 1",
        "workers 2",
    ]


def test_list_of_files_and_of_the_runs_in_wandb(result: ExperimentResult) -> None:
    assert "Weights &amp; Biases" not in make_report(result)
    result.environment["wandb_run_ids"] = {"final": "abc"}
    files = section(make_report(result), "files")
    assert "results.json" in files and "model.pt" in files
    assert f"Weights &amp; Biases: the runs of the group <code>{RUN_DIR.name}</code>" in files


def test_classify_command_says_where_the_run_and_its_network_are(result: ExperimentResult, tmp_path: Path) -> None:
    elsewhere = replace(result, run_dir=tmp_path / "with a blank" / RUN_DIR.name)
    command = f"--run {RUN_DIR.name} --runs-dir '{tmp_path}/with a blank' --network file.py:Own</pre>"
    assert command in html.unescape(make_report(elsewhere, "Own", model_class=lambda: NeuralNetwork()))


def make_small_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class Small(NeuralNetwork):
    """A network in this file."""


@pytest.mark.parametrize(
    ("network", "model_class", "name"),
    [
        ("Sequential", make_small_network, "make_small_network"),
        ("NeuralNetwork", make_small_network, "make_small_network"),  # the function may give the class arguments
        ("Small", Small, "Small"),
    ],
)
def test_classify_command_names_the_file_of_the_class_or_function_that_was_trained(
    network: str, model_class: Callable[[], nn.Module], name: str, result: ExperimentResult
) -> None:
    report = make_report(result, network, model_class=model_class)
    assert f"--run {RUN_DIR.name} --network tests/test_report.py:{name}</pre>" in report


def test_models_file_in_another_encoding_is_searched_for_the_network(
    result: ExperimentResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_bytes("# für mich\nclass Own(nn.Module):\n".encode("latin-1"))
    monkeypatch.setattr(report_module, "PROJECT_DIR", tmp_path)
    report = make_report(result, "Own")
    assert "classify.py picture.png" in report and "--network" not in report


def test_names_are_text_never_markup(result: ExperimentResult) -> None:
    name = """<b>&"'🐈\a</b>"""
    assert result.final is not None
    report = {name if each == "Coat" else each: row for each, row in result.final.report.items()}
    page = make_report(replace(result, final=replace(result.final, report=report)), network=name)
    assert "<b>" not in page and html.unescape(page).count(name.replace("\a", "\N{REPLACEMENT CHARACTER}")) >= 4


# While the run is on


def checkpoints_of(histories: dict[str, Any], failure: str | None = None) -> dict[str, Any]:
    return {name: {"history": history, "failure": failure} for name, history in histories.items()}


def test_page_of_a_running_run_shows_the_progress_and_reloads() -> None:
    histories = {"final": HISTORIES["final"][:1], "fold-1": HISTORIES["fold-1"], "fold-2": HISTORIES["fold-2"]}
    page = unfinished_page(make_experiment(), RUN_DIR, checkpoints_of(histories), "running", seconds_left=65).decode()
    assert 'data-state="running"' in page and "location.reload()" in page
    assert "5 of 6 epochs are done, about 1:05 left" in page
    rows = text_of(section(page, "progress")).splitlines()
    assert rows[2:5] == ["fold-1 2 2 of 2 0.7500", "fold-2 2 2 of 2 0.5000", "final 1 1 of 2 0.6250"]
    assert page.count('<svg class="chart"') == 2 and "model.pt" not in page


def test_page_of_a_running_run_names_the_fits_that_diverged() -> None:
    checkpoints = checkpoints_of(HISTORIES)
    checkpoints["fold-1"] = {"history": HISTORIES["fold-1"][:1], "failure": "fold-1 diverged in epoch 1."}
    page = unfinished_page(make_experiment(), RUN_DIR, checkpoints, "running").decode()
    assert "5 of 5 epochs are done" in page and "fold-1 diverged in epoch 1." in page.split("<h2")[0]
    assert "fold-1 1 1 of 2 diverged" in text_of(section(page, "progress"))


def test_page_at_the_start_has_no_curves() -> None:
    page = unfinished_page(make_experiment(), RUN_DIR, {}, "running").decode()
    assert "0 of 6 epochs are done." in page and "<svg" not in page and "left" not in text_of(section(page, "progress"))


@pytest.mark.parametrize(
    ("state", "reason", "sentence"),
    [("interrupted", "SIGINT", "Stopped by SIGINT"), ("failed", "The disk is full.", "after 6 of 6 epochs: The disk")],
)
def test_page_of_a_run_that_ended_says_how_to_resume_it(state: str, reason: str, sentence: str) -> None:
    page = unfinished_page(make_experiment(), RUN_DIR, checkpoints_of(HISTORIES), state, reason).decode()
    assert sentence in text_of(page) and "location.reload()" not in page and "<noscript>" not in page
    assert "To resume:</p>\n<pre>python main_tutorial.py --dataset FashionMNIST" in page


def test_resume_command_of_a_run_without_resume_has_it() -> None:
    experiment = make_experiment()
    config = experiment.config.to_dict() | {"resume": False}
    experiment.config = SimpleNamespace(to_dict=lambda: config)
    page = unfinished_page(experiment, RUN_DIR, checkpoints_of(HISTORIES), "running").decode()
    to_resume, to_repeat = re.findall(r"<pre>(python .*?)</pre>", page)
    assert to_resume == f"{to_repeat} --resume True" and "--resume" not in to_repeat


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report_module, "time", clock)
    return clock


def make_folder(path: Path, save: Callable[[str, bytes], None]) -> Any:
    path.mkdir(exist_ok=True)
    return SimpleNamespace(path=path, save=save)


def test_report_is_rewritten_in_at_most_a_hundredth_of_the_time(clock: Clock, tmp_path: Path) -> None:
    saved = []

    def save(name: str, content: bytes) -> None:
        saved.append(name)
        clock.now += 2  # seconds per page

    report = Report(make_experiment(), make_folder(tmp_path / "run", save), NeuralNetwork)
    # At second 500, 2 seconds have been spent, and 2 more make 4, which is 0.8 %.
    for second, pages in ((5, 0), (7, 1), (499, 1), (501, 2), (749, 2), (751, 3)):
        clock.now = 1000 + second
        report.update(checkpoints_of(HISTORIES), 1.0)
        assert saved == ["report.html"] * pages, second


def test_page_of_all_runs_is_rewritten_in_at_most_a_fifth_of_that_time(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_index(runs_dir: Path) -> None:
        written.append(runs_dir)
        clock.now += 1

    monkeypatch.setattr(report_module, "write_index", write_index)
    report = Report(make_experiment(), make_folder(tmp_path / "run", lambda *_: None), NeuralNetwork)
    report.__enter__()
    for second, pages in ((499, 1), (502, 2), (999, 2), (1003, 3)):
        clock.now = 1000 + second
        report.update(checkpoints_of(HISTORIES), 1.0)
        assert written == [tmp_path] * pages, second


def test_report_that_cannot_be_written_is_not_named(
    result: ExperimentResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> bytes:
        raise KeyError("own/error")

    report = Report(make_experiment(), make_folder(tmp_path / "run", lambda *_: None), NeuralNetwork)
    assert report.finish(result, "", {})
    monkeypatch.setattr(report_module, "report_page", fail)
    monkeypatch.setattr(report_module, "unfinished_page", fail)
    report.__enter__()
    assert not report.finish(result, "", {})
    assert capsys.readouterr() == ("", "Without report.html: KeyError: 'own/error'\n" * 2)


def test_report_is_kept_alive_once_a_minute(clock: Clock, tmp_path: Path) -> None:
    pages: list[bytes] = []
    report = Report(make_experiment(), make_folder(tmp_path / "run", lambda _, page: pages.append(page)), NeuralNetwork)
    for second, count in ((59, 0), (61, 1), (119, 1), (122, 2)):
        clock.now = 1000 + second
        report.keep_alive()
        assert len(pages) == count, second
    assert f'data-silence="{MIN_SILENCE}"'.encode() in pages[0]


def test_report_that_cannot_be_saved_costs_one_line(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    report = Report(make_experiment(), make_folder(tmp_path / "run", refuse), NeuralNetwork)
    for _ in range(3):
        clock.now += 1000
        report.update(checkpoints_of(HISTORIES), None)
    assert capsys.readouterr().err == "Without report.html: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyboardInterrupt(), "Stopped by SIGINT"),
        (RunError("The disk is full."), "The disk is full."),
        (ValueError("a secret"), "ValueError. The terminal shows the details."),
    ],
)
def test_error_is_shown_at_the_end_unless_it_may_contain_a_secret(
    error: BaseException, shown: str, tmp_path: Path
) -> None:
    pages: list[bytes] = []
    report = Report(make_experiment(), make_folder(tmp_path / "run", lambda _, page: pages.append(page)), NeuralNetwork)
    with pytest.raises(type(error)), report:
        raise error
    assert len(pages) == 2 and shown in text_of(pages[1].decode()) and b"a secret" not in pages[1]


def test_page_of_a_run_without_a_finished_epoch_says_so() -> None:
    text = text_of(unfinished_page(make_experiment(), RUN_DIR, {}, "failed", "The disk is full.").decode())
    assert "No epoch was finished. To start again:\npython main_tutorial.py" in text and "saved" not in text


def test_report_of_a_finished_run_is_not_replaced_by_a_later_error(tmp_path: Path) -> None:
    pages: list[bytes] = []
    report = Report(make_experiment(), make_folder(tmp_path / "run", lambda _, page: pages.append(page)), NeuralNetwork)
    (tmp_path / "run" / "results.json").touch()
    with pytest.raises(KeyboardInterrupt), report:
        raise KeyboardInterrupt
    assert len(pages) == 1
