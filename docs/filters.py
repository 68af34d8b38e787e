"""Draw what the first convolution of a trained CNN looks for: ``python docs/filters.py [folder of a run]``.

Without a folder it takes the newest run of main_cnn.py on Fashion-MNIST. Writes images/filters.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_utils import PROJECT_DIR, load_dataset, pixel_statistics
from experiment.figures import new_figure, png_of
from models import ConvolutionalNeuralNetwork

IMAGE = 0  # of the test images: an ankle boot


def main() -> None:
    """Draw an image, the 32 filters, and what each of them makes of the image."""
    runs = [Path(folder) for folder in sys.argv[1:]] or sorted(PROJECT_DIR.glob("runs/Conv*-FashionMNIST-*/model.pt"))
    weights = runs[-1] / "model.pt" if runs[-1].is_dir() else runs[-1]
    network = ConvolutionalNeuralNetwork().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    dataset = load_dataset("FashionMNIST", PROJECT_DIR / "data")
    mean, std = pixel_statistics(dataset.train_images)
    image = (dataset.test_images[IMAGE].float() / 255 - mean) / std
    with torch.no_grad():
        maps = network.conv_stack[:3](image[None, None])[0]  # convolution, batch norm, ReLU
    filters = network.conv_stack[0].weight.detach()[:, 0]

    figure = new_figure(11, 3)
    columns = (
        ("an image", image[None], 1),
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
    (PROJECT_DIR / "images" / "filters.png").write_bytes(png_of(figure))


if __name__ == "__main__":
    main()
