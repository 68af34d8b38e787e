"""The pictures and the report of a run."""

import io
import re
from dataclasses import replace

import numpy as np
from conftest import FIGURES
from PIL import Image

from experiment.figures import draw_figures, report_text
from experiment.results import ExperimentResult

NETWORK = {"name": "ConvolutionalNeuralNetwork", "printed": "Network()", "weights": 893546, "answers": []}


def test_every_figure_is_a_picture_with_something_in_it(cnn_result: ExperimentResult) -> None:
    figures = draw_figures(cnn_result)
    assert tuple(figures) == FIGURES
    for content in figures.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG" and np.asarray(picture).std() > 5


def test_the_report_shows_every_figure_that_lies_beside_it(cnn_result: ExperimentResult) -> None:
    report = (cnn_result.run_dir / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", report)
    assert set(FIGURES) <= set(shown) and all((cnn_result.run_dir / name).is_file() for name in shown)


def test_a_run_whose_final_fit_failed_has_learning_curves_alone(cnn_result: ExperimentResult) -> None:
    assert list(draw_figures(replace(cnn_result, final=None, mistakes=[]))) == ["learning_curves.png"]
    assert draw_figures(replace(cnn_result, final=None, folds=[], mistakes=[])) == {}


def test_the_report_names_the_model_only_where_there_is_one(cnn_result: ExperimentResult) -> None:
    for final, named in ((cnn_result.final, True), (None, False)):
        assert ("model.pt" in report_text(replace(cnn_result, final=final), NETWORK, "", [])) == named


def test_a_network_without_a_mistake_has_all_figures(cnn_result: ExperimentResult) -> None:
    assert tuple(draw_figures(replace(cnn_result, mistakes=[]))) == FIGURES
