"""Draw what the first convolution of a trained CNN looks for: ``python docs/filters.py [folder of a run]``.

Without a folder it takes the newest run of main_cnn.py on Fashion-MNIST. Writes images/filters.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_utils import PROJECT_DIR, Batches, load_dataset, pixel_statistics
from experiment.figures import new_figure, png_of
from models import ConvolutionalNeuralNetwork

IMAGE = 0  # of the test images: an ankle boot


def main() -> None:
    """Draw an image, the 32 filters, and what each of them makes of the image."""
    given = [Path(folder) / "model.pt" for folder in sys.argv[1:]]
    weights = given or sorted(PROJECT_DIR.glob("runs/Conv*-FashionMNIST-*/model.pt"))
    if not weights or not weights[-1].exists():
        sys.exit("No model.pt is there: run main_cnn.py first, or name the folder of a run.")
    network = ConvolutionalNeuralNetwork().eval()
    network.load_state_dict(torch.load(weights[-1], weights_only=True))
    dataset = load_dataset("FashionMNIST", PROJECT_DIR / "data")
    normal = pixel_statistics(dataset.train_images)
    ((image, _),) = Batches(dataset.test_images[IMAGE][None], dataset.test_labels[:1], 1, *normal, torch.device("cpu"))
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
    (PROJECT_DIR / "images" / "filters.png").write_bytes(png_of(figure))


if __name__ == "__main__":
    main()
