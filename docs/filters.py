"""Draw the filters of the first convolution of a trained CNN: ``python docs/filters.py [run directory]``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from classify import DEFAULT_RUNS_DIR, TrainedNetwork, choose_run, load_network
from data_files import load_dataset, resolve_path
from data_utils import Batches
from experiment.errors import ConfigurationError, user_errors
from experiment.files import relative_to_cwd, write_atomically
from experiment.plots import new_figure, png_bytes
from models import ConvolutionalNeuralNetwork

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

IMAGE = 0  # of the test images: an ankle boot, in Fashion-MNIST


def main() -> None:
    """Draw an image, the 32 filters and their outputs for the image; print where the figure is saved."""
    parser = argparse.ArgumentParser(
        description="Draw the first convolution of a trained CNN: an image, the 32 filters, and their outputs for the "
        "image. The figure, filters.png, is saved in the run directory."
    )
    parser.add_argument(
        "run", nargs="?", help="a run directory, or a part of its name (default: the newest finished run)"
    )
    parser.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="the folder with all runs")
    parser.add_argument("--data-dir", default="data", help="the folder with the data sets (default: %(default)s)")
    options = parser.parse_args()
    with user_errors():
        run = choose_run(options.run, options.runs_dir)
        trained = load_network(run)
        if not isinstance(trained.network, ConvolutionalNeuralNetwork):
            raise ConfigurationError(f"{relative_to_cwd(run.path)} did not train the CNN: name a run that did")
        figure_path = run.path / "filters.png"
        image = load_test_image(run.identity.dataset, options.data_dir, trained)
        write_atomically(figure_path, draw(trained.network.eval(), image))
        print(f"{relative_to_cwd(figure_path)} shows the filters of {run.path.name}.")


def load_test_image(dataset_name: str, data_dir: str, trained: TrainedNetwork) -> Tensor:
    """Return a test image (1, 1, 28, 28), normalized as in training."""
    dataset = load_dataset(dataset_name, resolve_path(data_dir), trained.image_shape)
    one_image, one_label = dataset.test_images[IMAGE][None], dataset.test_labels[IMAGE][None]
    batches = Batches(one_image, one_label, None, 1, trained.mean, trained.std, torch.device("cpu"))
    image, _ = next(iter(batches))
    return image


def draw(network: ConvolutionalNeuralNetwork, image: Tensor) -> bytes:
    """Return the figure as a PNG file."""
    with torch.no_grad():
        outputs = network.conv_stack[:3](image)[0]  # convolution, batch norm, ReLU
    filters = network.conv_stack[0].weight.detach()[:, 0]

    figure = new_figure(11, 3)
    parts = figure.subfigures(1, 3, width_ratios=[1, 2, 2])
    draw_pictures(parts[0], "an image", image[0], rows=1)
    draw_pictures(parts[1], "32 filters of 3 × 3 weights: blue below 0, red above", filters, rows=4, signed=True)
    draw_pictures(parts[2], "their outputs for the image, after batch norm and ReLU", outputs, rows=4)
    return png_bytes(figure)


def draw_pictures(part: "SubFigure", title: str, pictures: Tensor, rows: int, signed: bool = False) -> None:
    """Draw pictures (N, height, width) in rows, in greys or, if they are signed, in blue and red."""
    part.suptitle(title, fontsize=9)
    panels = part.subplots(rows, len(pictures) // rows, squeeze=False)
    for panel, picture in zip(panels.flat, pictures, strict=True):
        if signed:
            largest = picture.abs().max()
            panel.imshow(picture, cmap="coolwarm", vmin=-largest, vmax=largest)
        else:
            panel.imshow(picture, cmap="gray")
        panel.set_axis_off()


if __name__ == "__main__":
    main()
