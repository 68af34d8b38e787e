"""Draw the filters of the first convolution of a trained CNN: ``python docs/filters.py [run directory]``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from comparison.run_reader import FinishedRun, find_run, read_runs
from data_files import PROJECT_DIR, load_dataset, resolve_path
from data_utils import Batches, pixel_statistics
from experiment.errors import ConfigurationError, user_errors
from experiment.files import relative_to_cwd, write_atomically
from experiment.plots import new_figure, png_bytes
from models import ConvolutionalNeuralNetwork

IMAGE = 0  # of the test images: an ankle boot, in Fashion-MNIST
NAME = ConvolutionalNeuralNetwork.__name__


def main() -> None:
    """Draw an image, the 32 filters and their outputs for the image; print where the figure is saved."""
    parser = argparse.ArgumentParser(
        description="Draw the first convolution of a trained CNN: an image, the 32 filters, and their outputs for the "
        "image. The figure, filters.png, is saved in the run directory."
    )
    parser.add_argument(
        "run", nargs="?", help="a run directory, or a part of its name (default: the newest finished run of the CNN)"
    )
    parser.add_argument("--runs-dir", type=Path, default=PROJECT_DIR / "runs", help="the folder with all runs")
    parser.add_argument("--data-dir", default="data", help="the folder with the data sets (default: %(default)s)")
    options = parser.parse_args()
    with user_errors():
        run = find_run(options.run, options.runs_dir) if options.run else newest_run(options.runs_dir)
        picture = run.path / "filters.png"
        write_atomically(picture, draw(load_network(run), run.identity.dataset, options.data_dir))
        print(f"{relative_to_cwd(picture)} shows the filters of {run.path.name}.")


def newest_run(runs_dir: Path) -> FinishedRun:
    """Return the newest finished run of the CNN in models.py."""
    runs, _ = read_runs(runs_dir)
    for run in runs:
        if run.identity.network.name == NAME and (run.path / "model.pt").exists():
            return run
    where = relative_to_cwd(runs_dir)
    raise ConfigurationError(f"there is no finished run of the CNN in {where}: run main_cnn.py first, or name a run")


def load_network(run: FinishedRun) -> ConvolutionalNeuralNetwork:
    """Return the final network of a run."""
    network = ConvolutionalNeuralNetwork().eval()
    try:
        network.load_state_dict(torch.load(run.path / "model.pt", weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise ConfigurationError(f"{relative_to_cwd(run.path)} has no model.pt: its final fit diverged") from None
    except RuntimeError:
        raise ConfigurationError(
            f"{relative_to_cwd(run.path)} has another network than the {NAME} in models.py"
        ) from None
    return network


def draw(network: ConvolutionalNeuralNetwork, dataset_name: str, data_dir: str) -> bytes:
    """Return the figure as a PNG file."""
    image = first_test_image(dataset_name, data_dir)
    with torch.no_grad():
        maps = network.conv_stack[:3](image)[0]  # convolution, batch norm, ReLU
    filters = network.conv_stack[0].weight.detach()[:, 0]

    figure = new_figure(11, 3)
    columns = (
        ("an image", image[0], 1),
        ("32 filters of 3 × 3 weights: blue below 0, red above", filters, 4),
        ("their outputs for the image, after batch norm and ReLU", maps, 4),
    )
    parts = figure.subfigures(1, 3, width_ratios=[1, 2, 2])
    for part, (title, pictures, rows) in zip(parts, columns, strict=True):
        part.suptitle(title, fontsize=9)
        for plot, picture in zip(part.subplots(rows, len(pictures) // rows, squeeze=False).flat, pictures, strict=True):
            largest = picture.abs().max()
            if pictures is filters:
                plot.imshow(picture, cmap="coolwarm", vmin=-largest, vmax=largest)
            else:
                plot.imshow(picture, cmap="gray")
            plot.set_axis_off()
    return png_bytes(figure)


def first_test_image(dataset_name: str, data_dir: str) -> Tensor:
    """Return a test image (1, 1, 28, 28), normalized as in training."""
    dataset = load_dataset(dataset_name, resolve_path(data_dir))
    normal = pixel_statistics(dataset.train_images)
    batches = Batches(dataset.test_images[IMAGE][None], dataset.test_labels[:1], 1, *normal, torch.device("cpu"))
    image, _ = next(iter(batches))
    return image


if __name__ == "__main__":
    main()
