"""The pictures and the report of a run: what they hold."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import FIGURES
from hand_made import ENVIRONMENT, HISTORIES, NETWORK, RUN_NAME, SHIRT, make_checkpoints, make_hand_made_result
from PIL import Image

from experiment import figures as figures_room
from experiment.figures import (
    BLUE,
    CAPTIONS,
    ORANGE,
    GrowingCurves,
    draw_figures,
    draw_learning_curves,
    make_figures,
    png_of,
    report_text,
)
from experiment.results import ExperimentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@pytest.fixture
def result() -> ExperimentResult:
    return make_hand_made_result()


@pytest.fixture
def figures(result: ExperimentResult) -> dict[str, "Figure"]:
    return make_figures(result)


def test_every_figure_is_a_picture_with_something_in_it(result: ExperimentResult) -> None:
    pictures = draw_figures(result)
    assert tuple(pictures) == FIGURES
    for content in pictures.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG" and np.asarray(picture).std() > 5


def test_a_run_whose_final_fit_failed_has_learning_curves_alone(result: ExperimentResult) -> None:
    assert list(make_figures(replace(result, final=None, mistakes=[]))) == ["learning_curves.png"]
    assert make_figures(replace(result, final=None, folds=[], mistakes=[])) == {}


def test_a_run_whose_folds_all_failed_has_all_figures_but_the_learning_curves(result: ExperimentResult) -> None:
    assert tuple(make_figures(replace(result, folds=[]))) == FIGURES[1:]


# The learning curves


def points_of(line: "Line2D") -> list[tuple[float, float]]:
    """Return a line's points, rounded."""
    points = np.round(np.asarray(line.get_xydata(), dtype=float), 4)
    return [(float(x), float(y)) for x, y in points]


def drawn(panel: "Axes") -> list[tuple[str, bool, list[tuple[float, float]]]]:
    """Return each line's colour, whether it is thick, and its points."""
    return [(str(line.get_color()), line.get_linewidth() > 2, points_of(line)) for line in panel.lines]


@pytest.mark.parametrize(
    ("place", "quantity", "means", "final"),
    [
        (0, "loss", {"train": [1.1, 0.7], "validation": [0.9, 0.6]}, [0.9, 0.5]),
        (1, "accuracy", {"train": [0.45, 0.65], "validation": [0.375, 0.625]}, [0.625, 0.8125]),
    ],
)
def test_the_learning_curves_are_each_fold_their_mean_and_the_final_fit_after_each_epoch(
    figures: dict[str, "Figure"], place: int, quantity: str, means: dict[str, list[float]], final: list[float]
) -> None:
    panel = figures["learning_curves.png"].axes[place]
    expected = []
    for part, colour in (("train", BLUE), ("validation", ORANGE)):
        for fold in ("fold-1", "fold-2"):
            first, second = (row[f"{part}/{quantity}"] for row in HISTORIES[fold])
            expected.append((colour, False, [(1, first), (2, second)]))
        expected.append((colour, True, list(enumerate(means[part], start=1))))
    expected.append(("black", False, list(enumerate(final, start=1))))
    assert drawn(panel) == expected
    unit = {"loss": "mean cross-entropy an image", "accuracy": "share right"}[quantity]
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == (quantity, "epoch", f"{quantity} ({unit})")


def test_loss_and_accuracy_stand_side_by_side(figures: dict[str, "Figure"]) -> None:
    loss, accuracy = (panel.get_position() for panel in figures["learning_curves.png"].axes)
    assert loss.x1 <= accuracy.x0 and loss.y0 == accuracy.y0


def test_losses_that_became_very_small_are_drawn_on_a_logarithmic_scale() -> None:
    scales = {}
    for last in (0.05, 0.04):
        losses = {"train/loss": 0.5, "validation/loss": last, "train/accuracy": 0.5, "validation/accuracy": 0.5}
        panels = draw_learning_curves({"fold-1": [losses | {"train/loss": 1.0}, losses]}).axes
        scales[last] = [panel.get_yscale() for panel in panels]
    assert scales == {0.05: ["linear", "linear"], 0.04: ["log", "linear"]}
    assert panels[0].yaxis.get_major_formatter()(0.04) == "0.04"  # and no power of ten


@pytest.mark.parametrize("folds", [1, 3])
def test_the_legend_says_once_what_each_kind_of_curve_is(folds: int) -> None:
    histories = {f"fold-{number}": HISTORIES["fold-1"] for number in range(1, folds + 1)}
    (legend,) = draw_learning_curves(histories | {"final": HISTORIES["final"]}).legends
    said = [(text.get_text(), line.get_color()) for text, line in zip(legend.texts, legend.get_lines(), strict=True)]
    assert said == [
        ("each fold", BLUE),
        ("mean: training (while it learns)", BLUE),
        ("mean: validation (the part held out)", ORANGE),
        ("final fit: training, on all images", "black"),
    ]


def test_while_fits_learn_the_mean_goes_as_far_as_every_fold_does() -> None:
    histories = {"final": [], "fold-1": HISTORIES["fold-1"], "fold-2": HISTORIES["fold-2"][:1]}
    panel = draw_learning_curves(histories).axes[0]
    assert [points for _, is_thick, points in drawn(panel) if is_thick] == [[(1, 1.1)], [(1, 0.9)]]
    assert "black" not in {colour for colour, *_ in drawn(panel)}  # of the final fit there is nothing to show


def test_a_single_epoch_stands_in_the_middle() -> None:
    panels = draw_learning_curves({name: history[:1] for name, history in HISTORIES.items()}).axes
    assert [list(panel.get_xticks()) for panel in panels] == [[1], [1]]
    assert [panel.get_xlim() for panel in panels] == [(0.5, 1.5), (0.5, 1.5)]


def test_two_epochs_have_no_epoch_and_a_half(figures: dict[str, "Figure"]) -> None:
    for panel in figures["learning_curves.png"].axes:
        assert all(float(tick).is_integer() for tick in panel.get_xticks())


# F1 by class


def test_the_classes_stand_by_their_f1_in_the_test_the_worst_at_the_bottom(figures: dict[str, "Figure"]) -> None:
    (plot,) = figures["per_class.png"].axes
    assert [label.get_text() for label in plot.get_yticklabels()] == ["Coat", "Shirt", "Bag"]
    assert list(plot.get_yticks()) == [0, 1, 2]
    bottom, top = plot.get_ylim()
    assert bottom < 0 and top > 2


def test_each_class_has_a_dot_for_each_fold_and_a_diamond_for_the_test_at_its_height(
    figures: dict[str, "Figure"],
) -> None:
    (plot,) = figures["per_class.png"].axes
    dots = [line for line in plot.lines if line.get_marker() == "o"]
    diamonds = [line for line in plot.lines if line.get_marker() == "D"]
    assert [points_of(line) for line in dots] == [
        [(0.6667, 0), (0.0, 0)],  # Coat in fold-1 and fold-2
        [(0.6667, 1), (0.5, 1)],
        [(1.0, 2), (1.0, 2)],
    ]
    assert [points_of(line) for line in diamonds] == [[(0.5714, 0)], [(0.6667, 1)], [(1.0, 2)]]
    assert [text.get_text() for text in plot.texts] == ["0.571", "0.667", "1.000"]
    assert {line.get_color() for line in dots} == {BLUE} and {line.get_color() for line in diamonds} == {ORANGE}


def test_the_figure_of_the_classes_says_what_its_marks_are(figures: dict[str, "Figure"]) -> None:
    (plot,) = figures["per_class.png"].axes
    (legend,) = figures["per_class.png"].legends  # beside the plot: over it, it would hide folds
    assert [text.get_text() for text in legend.texts] == ["each fold, on its own part", "final, on the test images"]
    assert (plot.get_title(), plot.get_xlabel(), plot.get_ylabel()) == (
        "How well each class is recognised",
        "F1 score (1 is best)",
        "class",
    )


# The confusion matrix


def test_the_confusion_matrix_is_drawn_with_true_classes_downwards_in_shares_of_each(
    figures: dict[str, "Figure"],
) -> None:
    plot = figures["confusion_matrix.png"].axes[0]
    (picture,) = plot.images
    assert np.asarray(picture.get_array()).tolist() == [[50, 50, 0], [25, 75, 0], [0, 0, 100]]
    assert picture.origin == "upper" and picture.get_clim() == (0, 100)
    assert (plot.get_ylabel(), plot.get_xlabel()) == ("true class", "predicted class")
    for labels in (plot.get_yticklabels(), plot.get_xticklabels()):
        assert [label.get_text() for label in labels] == ["Coat", "Shirt", "Bag"]
    assert plot.get_title() == "What is taken for what: test images, and their share of the true class"
    assert figures["confusion_matrix.png"].axes[1].get_ylabel() == "share of the true class (%)"


def test_each_row_is_divided_by_its_own_class_and_a_shade_means_the_same_in_every_matrix(
    result: ExperimentResult,
) -> None:
    assert result.final is not None
    final = replace(result.final, confusion=[[3, 1, 1], [2, 6, 2], [1, 0, 0]])
    (picture,) = make_figures(replace(result, final=final))["confusion_matrix.png"].axes[0].images
    np.testing.assert_allclose(np.asarray(picture.get_array()), [[60, 20, 20], [20, 60, 20], [100, 0, 0]])
    final = replace(result.final, confusion=[[3, 1, 1], [2, 6, 2], [3, 3, 4]])
    (picture,) = make_figures(replace(result, final=final))["confusion_matrix.png"].axes[0].images
    assert picture.get_clim() == (0, 100) and sum(picture.cmap(0.0)) > sum(picture.cmap(1.0))  # much is dark


def test_each_cell_that_is_not_empty_says_how_many_images_it_has_and_their_share(figures: dict[str, "Figure"]) -> None:
    plot = figures["confusion_matrix.png"].axes[0]
    cells = {text.get_position()[::-1]: text.get_text() for text in plot.texts}  # row, column
    assert cells == {
        (0, 0): "2\n50.0 %",
        (0, 1): "2\n50.0 %",  # coats that are taken for shirts
        (1, 0): "1\n25.0 %",
        (1, 1): "3\n75.0 %",
        (2, 2): "2\n100.0 %",
    }


def test_a_cell_that_is_dark_is_written_on_in_white(figures: dict[str, "Figure"]) -> None:
    plot = figures["confusion_matrix.png"].axes[0]
    colours = {text.get_text(): text.get_color() for text in plot.texts}
    assert colours == {"2\n50.0 %": "black", "1\n25.0 %": "black", "3\n75.0 %": "white", "2\n100.0 %": "white"}


def test_a_class_that_no_test_image_shows_has_an_empty_row(result: ExperimentResult) -> None:
    assert result.final is not None
    final = replace(result.final, confusion=[[2, 2, 0], [0, 0, 0], [0, 0, 2]])
    (picture,) = make_figures(replace(result, final=final))["confusion_matrix.png"].axes[0].images
    assert np.asarray(picture.get_array())[1].tolist() == [0, 0, 0]


# The mistakes


def test_the_mistakes_are_shown_the_surest_first_with_their_images(figures: dict[str, "Figure"]) -> None:
    plots = [plot for plot in figures["mistakes.png"].axes if plot.images]
    assert [plot.get_title() for plot in plots] == [
        "is: Coat\ntaken for: Shirt (95.0 %)",
        "is: Coat\ntaken for: Shirt (60.0 %)",
        "is: Shirt\ntaken for: Coat (50.0 %)",
    ]
    for plot, brightness in zip(plots, (4, 3, 7), strict=True):
        pixels = np.asarray(plot.images[0].get_array())
        assert pixels.shape == (28, 28) and pixels[0, 1] == brightness == pixels.sum()
        assert plot.images[0].get_clim() == (0, 255)
        assert plot.images[0].origin == "upper"
        assert sum(plot.images[0].cmap(0.0)) > sum(plot.images[0].cmap(1.0))  # ink is dark
    assert figures["mistakes.png"].get_suptitle() == "The surest mistakes on the test images"


def test_mistakes_stand_six_in_a_row_and_none_is_left_out() -> None:
    result = make_hand_made_result(make_checkpoints([(SHIRT, 3, 0.75)] * 7))
    axes = make_figures(result)["mistakes.png"].axes
    assert [bool(plot.images) for plot in axes] == [True] * 7 + [False] * 5
    assert not any(plot.axison for plot in axes)
    assert axes[6].get_subplotspec().rowspan.start == 1  # type: ignore[union-attr]  # all have one


def test_a_picture_of_more_rows_of_mistakes_is_higher_and_each_row_as_high() -> None:
    heights = []
    for count in (1, 6, 7, 13):
        mistakes = make_figures(make_hand_made_result(make_checkpoints([(SHIRT, 3, 0.75)] * count)))["mistakes.png"]
        heights.append(mistakes.get_size_inches()[1])
    assert heights[0] == heights[1] < heights[2] < heights[3]
    assert heights[3] - heights[2] == pytest.approx(heights[2] - heights[1])


def test_an_image_without_white_is_shown_as_grey_as_it_is(result: ExperimentResult) -> None:
    grey = replace(result.mistakes[0], image=result.mistakes[0].image + 100)
    plot = make_figures(replace(result, mistakes=[grey]))["mistakes.png"].axes[0]
    assert plot.images[0].get_clim() == (0, 255)


def test_a_network_without_a_mistake_has_a_figure_that_says_so(result: ExperimentResult) -> None:
    figures = make_figures(replace(result, mistakes=[]))
    assert tuple(figures) == FIGURES
    assert figures["mistakes.png"].get_suptitle() == "No mistake on the test images"


# The curves that grow


class Clock:
    """Stands for the time: it goes on by hand, and by `step` whenever something is drawn."""

    now = 1000.0  # its zero is anywhere

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, GrowingCurves, list[str]]:
    """Return a clock, curves that take two seconds each time, and the names of the files that were saved."""
    clock, saved = Clock(), []
    monkeypatch.setattr(figures_room, "time", clock)

    def save(name: str, content: bytes) -> None:
        assert content.startswith(b"\x89PNG")
        saved.append(name)
        clock.now += 2

    return clock, GrowingCurves(save), saved


def test_the_curves_are_drawn_while_the_fits_learn_in_a_hundredth_of_the_time_at_most(
    growing: tuple[Clock, GrowingCurves, list[str]],
) -> None:
    clock, curves, saved = growing
    # 2 s were spent when it is 400, and 2 more would be 4
    for now, drawn_by_then in ((99, 0), (101, 1), (399, 1), (401, 2), (599, 2), (601, 3)):
        clock.now = 1000 + now
        curves.draw(HISTORIES)
        assert len(saved) == drawn_by_then, now
    assert set(saved) == {"learning_curves.png"}


def test_curves_that_cannot_be_saved_are_a_line_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    clock = Clock()
    monkeypatch.setattr(figures_room, "time", clock)
    curves = GrowingCurves(refuse)
    clock.now = 2000
    curves.draw(HISTORIES)
    assert capsys.readouterr().err.startswith("Without learning_curves.png for now: OSError: ")


# The report


def report_of(result: ExperimentResult, comparison: str = "", figures: tuple[str, ...] = FIGURES) -> str:
    return report_text(result, NETWORK, comparison, list(figures))


def section(report: str, heading: str) -> str:
    """Return what stands below a heading of the report, until the next."""
    return report.split(f"\n## {heading}\n\n")[1].split("\n\n## ")[0].rstrip("\n")


def test_the_report_begins_with_the_runs_name_and_its_result_in_a_line(result: ExperimentResult) -> None:
    assert report_of(result).split("\n\n")[:2] == [
        f"# {RUN_NAME}",
        "Test accuracy **0.7000**, loss 0.9000. Over 2 folds: accuracy 0.6250 ± 0.1768, loss 0.6000 ± 0.1414 "
        "(± standard deviation).",
    ]


def test_a_report_without_a_final_fit_or_a_spread_says_so(result: ExperimentResult) -> None:
    assert report_of(replace(result, final=None, folds=result.folds[:1])).split("\n\n")[1] == "No final fit."


def test_the_report_has_the_command_that_repeats_the_run_with_every_setting_that_matters(
    result: ExperimentResult,
) -> None:
    command = (
        "python main_tutorial.py --dataset FashionMNIST --folds 2 --epochs 2 --batch-size 64 --learning-rate 0.001 "
        "--lr-schedule cosine --mirror True --rng-seed 314 --device cpu --precision bfloat16"
    )
    assert f"The same again:\n\n```\n{command}\n```\n" in report_of(result)


@pytest.mark.parametrize(
    ("running", "network", "script"),
    [
        ("/elsewhere/main_cnn.py", "NeuralNetwork", "main_cnn.py"),  # the one that is running, whatever it trains
        ("/elsewhere/main_tutorial.py", "ConvolutionalNeuralNetwork", "main_tutorial.py"),
        ("/usr/bin/pytest", "NeuralNetwork", "main_tutorial.py"),
        (None, "ConvolutionalNeuralNetwork", "main_cnn.py"),
    ],
)
def test_the_command_names_the_script_that_trains_this_network(
    running: str | None, network: str, script: str, result: ExperimentResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=running))
    report = report_text(result, NETWORK | {"name": network}, "", [])
    assert re.findall(r"^python (\S+)", report, re.MULTILINE)[0] == script


def test_a_network_of_the_users_own_is_repeated_with_constants(
    result: ExperimentResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__="/elsewhere/own.py"))
    report = report_text(result, NETWORK | {"name": "Own"}, "", [])
    said, constants = report.split("\n\n")[2:4]
    assert said == "The same again: Own, with these constants:"
    assert constants.splitlines()[1:-1] == [
        "DATASET = 'FashionMNIST'",
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


def test_the_report_has_the_tables_of_the_terminal_and_the_time(result: ExperimentResult) -> None:
    results = section(report_of(result), "Results")
    assert "```\nCross-validation\n  fold      accuracy     loss\n  fold-1      0.7500   0.5000\n" in results
    assert "```\nTest set, 10 images\n" in results
    assert results.endswith("\n\nTime taken: 1:02:03.")


def test_the_report_says_which_fit_diverged(result: ExperimentResult) -> None:
    report = report_of(replace(result, final=None, failures={"final": "final diverged in epoch 1."}))
    assert "\n\n- final diverged in epoch 1.\n\n" in report and "Test set" not in report


def test_the_table_of_epochs_has_the_means_over_the_folds(result: ExperimentResult) -> None:
    assert section(report_of(result), "Epochs").splitlines() == [
        "| epoch | training: loss | accuracy | validation: loss | accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 1.1000 | 0.4500 | 0.9000 | 0.3750 |",
        "| 2 | 0.7000 | 0.6500 | 0.6000 | 0.6250 |",
    ]


def test_the_report_shows_every_figure_with_what_it_is(result: ExperimentResult) -> None:
    pictures = section(report_of(result), "Pictures").split("\n\n")
    assert pictures[::2] == [f"![{name}]({name})" for name in FIGURES]
    assert pictures[1::2] == [CAPTIONS[name] for name in FIGURES]


def test_the_comparison_stands_before_the_results_with_its_picture(result: ExperimentResult) -> None:
    report = report_of(result, "Against runs/before", (*FIGURES, "compare.png"))
    assert section(report, "Did it help?") == (
        f"```\nAgainst runs/before\n```\n\n![compare.png](compare.png)\n\n{CAPTIONS['compare.png']}"
    )
    assert report.index("## Did it help?") < report.index("## Results")
    assert report.count("compare.png)") == 1


def test_a_first_run_has_nothing_to_be_compared_with(result: ExperimentResult) -> None:
    assert "Did it help?" not in report_of(result)


def test_the_report_shows_the_network_and_its_weights(result: ExperimentResult) -> None:
    assert section(report_of(result), "Network: 669,706 weights") == "```\nNeuralNetwork()\n```"


def test_the_report_names_machine_and_versions_and_nothing_that_is_empty(result: ExperimentResult) -> None:
    described = replace(result, environment={"resumed": False} | ENVIRONMENT)
    assert section(report_of(described), "Machine").splitlines() == [
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


def test_the_report_says_what_else_there_is_and_the_model_only_where_there_is_one(result: ExperimentResult) -> None:
    logged = replace(result, environment=ENVIRONMENT | {"wandb_run_ids": {"final": "abc"}})
    lines = section(report_of(logged), "More").splitlines()
    assert lines == [
        "- `results.json`: every figure at full precision; `config.json`: what was asked.",
        "- `model.pt`: the weights of the final network, for `load_state_dict`.",
        f"- `python -m experiment.classify picture.png --run {RUN_NAME}` asks the final network about a picture of "
        "yours.",
        f"- In Weights & Biases: the runs of the group `{RUN_NAME}`.",
    ]
    without = section(report_of(replace(logged, final=None)), "More")
    assert "model.pt" not in without and "classify" not in without and RUN_NAME in without


def test_where_nothing_was_logged_weights_and_biases_is_not_named(result: ExperimentResult) -> None:
    assert "Weights & Biases" not in report_of(result)


def test_the_command_that_classifies_says_where_the_run_and_its_network_are(
    result: ExperimentResult, tmp_path: Path
) -> None:
    elsewhere = replace(result, run_dir=tmp_path / "with a blank" / RUN_NAME)
    report = report_text(elsewhere, NETWORK | {"name": "Own"}, "", [])
    assert f"--run {RUN_NAME} --runs-dir '{tmp_path}/with a blank' --network file.py:Own` asks" in report


def test_a_models_file_in_another_encoding_is_read_all_the_same(
    result: ExperimentResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_bytes("# für mich\nclass Own(nn.Module):\n".encode("latin-1"))
    monkeypatch.setattr(figures_room, "PROJECT_DIR", tmp_path)
    report = report_text(result, NETWORK | {"name": "Own"}, "", [])
    assert "experiment.classify picture.png" in report and "--network" not in report


@pytest.mark.parametrize("name", ["learning_curves.png", "per_class.png"])
def test_a_legend_stands_below_what_it_explains(name: str, figures: dict[str, "Figure"]) -> None:
    png_of(figures[name])  # which lays it out
    (legend,) = figures[name].legends
    top = legend.get_window_extent().y1
    assert all(top <= panel.get_window_extent().y0 for panel in figures[name].axes)
