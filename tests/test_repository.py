"""The repository: its configuration files, and the code in its tutorial."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image
from torchvision import datasets

from data_files import DatasetError, load_dataset
from data_utils import Batches, pixel_statistics
from models import ConvolutionalNeuralNetwork
from train_utils import test_loop


def test_conda_installs_the_requirements_file() -> None:
    environment = yaml.safe_load((REPOSITORY / "cnn_environment.yml").read_text())
    assert environment["name"] == "cnn"
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert {"pip": [index, "-r requirements.txt"]} in environment["dependencies"]


def test_the_snippet_for_model_pt_classifies_a_picture(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    snippet = re.search(r"```python\n(import torch\nfrom PIL.*?)```", page, re.DOTALL)
    assert snippet is not None
    torch.manual_seed(0)
    network = ConvolutionalNeuralNetwork()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    pixels = torch.randint(256, (28, 28), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    (batch,) = Batches(pixels[None], torch.zeros(1).long(), None, 1, (0.2860,), (0.3530,), torch.device("cpu"))
    _, _, probabilities = test_loop([batch], network, torch.nn.CrossEntropyLoss(), mirror=True)
    run = subprocess.run(
        [sys.executable, "-c", snippet[1]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    name, _, probability = run.stdout.strip().rpartition(" ")
    assert name == datasets.FashionMNIST.classes[probabilities.argmax()]
    assert float(probability) == pytest.approx(probabilities.max().item(), rel=1e-4)


def test_the_snippets_statistics_are_those_of_the_training_images() -> None:
    try:
        dataset = load_dataset("FashionMNIST", REPOSITORY / "data")
    except DatasetError as error:
        pytest.skip(f"Fashion-MNIST is not available: {error}")
    (mean,), (std,) = pixel_statistics(dataset.train_images)
    assert (mean, std) == pytest.approx((0.2860, 0.3530), abs=5e-5)


def test_plots_need_neither_a_display_nor_pyplot() -> None:
    code = "import sys, experiment.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
