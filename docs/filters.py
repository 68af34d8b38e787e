"""Draw what the first convolution of a trained CNN looks for: ``python docs/filters.py [folder of a run]``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from data_utils import Batches, load_dataset, path_of, pixel_statistics
from experiment.errors import ConfigurationError, user_errors
from experiment.figures import new_figure, png_of
from experiment.past_runs import PastRun, default_runs_dirs, find_run, finished_runs
from experiment.run_directory import path_from_here, save_atomically
from models import ConvolutionalNeuralNetwork

IMAGE = 0  # of the test images: an ankle boot, in Fashion-MNIST
NAME = ConvolutionalNeuralNetwork.__name__


def main() -> None:
    """Draw an image, the 32 filters, and what each of them makes of the image; say where the picture lies."""
    parser = argparse.ArgumentParser(
        description="Draw what the first convolution of a trained CNN looks for: an image, the 32 filters, and what "
        "each of them makes of the image. The picture, filters.png, is written into the run's folder."
    )
    parser.add_argument(
        "run", nargs="?", help="a run's folder, or a part of its name; the newest finished run of the CNN without it"
    )
    parser.add_argument("--data-dir", default="data", help="where the data sets lie (default: %(default)s)")
    options = parser.parse_args()
    with user_errors():
        run = find_run(options.run, *default_runs_dirs()) if options.run else newest_run()
        picture = run.path / "filters.png"
        save_atomically(picture, draw(load_network(run), run.identity.dataset, options.data_dir))
        print(f"{path_from_here(picture)} shows the filters of {run.path.name}.")


def newest_run() -> PastRun:
    """Return the newest finished run of the CNN in models.py."""
    for runs_dir in default_runs_dirs():
        for run in finished_runs(runs_dir):
            if run.identity.network.name == NAME and (run.path / "model.pt").exists():
                return run
    raise ConfigurationError("no finished run of the CNN is there: run main_cnn.py first, or name a run's folder")


def load_network(run: PastRun) -> ConvolutionalNeuralNetwork:
    """Return the network that a run has trained."""
    network = ConvolutionalNeuralNetwork().eval()
    try:
        network.load_state_dict(torch.load(run.path / "model.pt", weights_only=True, map_location="cpu"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path_from_here(run.path)} has no model.pt: its final fit diverged") from None
    except RuntimeError:
        raise ConfigurationError(
            f"{path_from_here(run.path)} has another network than {NAME} as models.py has it now"
        ) from None
    return network


def draw(network: ConvolutionalNeuralNetwork, dataset_name: str, data_dir: str) -> bytes:
    """Return the picture as a PNG file."""
    image = first_test_image(dataset_name, data_dir)
    with torch.no_grad():
        maps = network.conv_stack[:3](image)[0]  # convolution, batch norm, ReLU
    filters = network.conv_stack[0].weight.detach()[:, 0]

    figure = new_figure(11, 3)
    columns = (
        ("an image", image[0], 1),
        ("32 filters of 3 × 3 weights: blue below 0, red above", filters, 4),
        ("what they make of it, after batch norm and ReLU", maps, 4),
    )
    parts = figure.subfigures(1, 3, width_ratios=[1, 2, 2])
    for part, (title, pictures, rows) in zip(parts, columns, strict=True):
        part.suptitle(title, fontsize=9)
        for plot, picture in zip(part.subplots(rows, len(pictures) // rows, squeeze=False).flat, pictures, strict=True):
            most = picture.abs().max()
            signed = {"cmap": "coolwarm", "vmin": -most, "vmax": most} if pictures is filters else {"cmap": "gray"}
            plot.imshow(picture, **signed)
            plot.set_axis_off()
    return png_of(figure)


def first_test_image(dataset_name: str, data_dir: str) -> Tensor:
    """Return a test image (1, 1, 28, 28), normalised as the network is used to."""
    dataset = load_dataset(dataset_name, path_of(data_dir))
    normal = pixel_statistics(dataset.train_images)
    batches = Batches(dataset.test_images[IMAGE][None], dataset.test_labels[:1], 1, *normal, torch.device("cpu"))
    image, _ = next(iter(batches))
    return image


if __name__ == "__main__":
    main()
