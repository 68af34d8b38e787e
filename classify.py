"""Print what the final network of a finished run predicts for pictures.

Each picture gets one line with its three most likely classes and their probabilities. A picture may have any size and
colours; it is converted to a square of 28 × 28 grey pixels. The networks were trained on light objects on a dark
background: a dark object on a light background needs --invert.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.errors import ConfigurationError, user_errors
from experiment.files import relative_to_cwd
from experiment.formatting import display_name
from experiment.terminal import print_line, warn

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor, nn

    from comparison.run_reader import FinishedRun

DEFAULT_RUNS_DIR = Path(__file__).resolve().parent / "runs"
SIZE = 28  # pixels per side of the images that the networks take
CLASSES_SHOWN = 3


@dataclass(frozen=True)
class TrainedNetwork:
    """The final network of a run, and what it needs to predict.

    Attributes
    ----------
    network : nn.Module
    mean, std : float
        Of the pixels of the training images, scaled to 0 … 1.
    mirror : bool
        Average the probabilities of a picture and of its mirror image.
    class_names : list of str
    """

    network: nn.Module
    mean: float
    std: float
    mirror: bool
    class_names: list[str]

    def predict(self, images: Tensor) -> Tensor:
        """Return the class probabilities, float32 (N, 10), of images, uint8 (N, 28, 28)."""
        import torch

        from data_utils import Batches
        from train_utils import EVALUATION_BATCH_SIZE, test_loop

        no_labels = torch.zeros(len(images), dtype=torch.int64)
        batches = Batches(images, no_labels, EVALUATION_BATCH_SIZE, self.mean, self.std, torch.device("cpu"))
        _, _, probabilities = test_loop(batches, self.network, torch.nn.CrossEntropyLoss(), mirror=self.mirror)
        return probabilities


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print a line per picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="picture", help="PNG, JPEG or another format that Pillow reads")
    parser.add_argument("--run", help="a run directory, or a part of its name (default: the newest finished run)")
    parser.add_argument("--network", metavar="FILE:CLASS", help="the network's class, if it is not in models.py")
    parser.add_argument("--invert", action="store_true", help="the pictures are dark on a light background")
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=DEFAULT_RUNS_DIR,
        metavar="FOLDER",
        help="the folder with all runs (default: runs beside classify.py)",
    )
    given = parser.parse_args(arguments)
    with user_errors():
        classify([Path(picture) for picture in given.pictures], given.run, given.runs_dir, given.network, given.invert)


def classify(pictures: list[Path], run: str | None, runs_dir: Path, network: str | None, invert: bool) -> None:
    """Print what the final network of a run predicts for pictures."""
    import torch

    finished_run = choose_run(run, runs_dir)
    trained = load_network(finished_run, network)
    images = [read_picture(path, invert) for path in pictures]
    for path, image in zip(pictures, images, strict=True):
        if has_light_background(image):
            warn(f"{path} {_background_advice(invert)}.")
    print_line(f"Predictions of the final network of {relative_to_cwd(finished_run.path)}:")
    for path, probabilities in zip(pictures, trained.predict(torch.stack(images)), strict=True):
        print_line(describe_prediction(str(path), probabilities, trained.class_names))


def choose_run(name: str | None, runs_dir: Path) -> FinishedRun:
    """Return the run of that name or, without a name, the newest finished run.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    from comparison.run_reader import find_run, read_runs

    if name is not None:
        return find_run(name, runs_dir)
    runs, _ = read_runs(runs_dir)
    if not runs:
        where = relative_to_cwd(runs_dir)
        raise ConfigurationError(f"There is no finished run in {where}: run main_cnn.py first, or use --runs-dir.")
    return runs[0]


def load_network(run: FinishedRun, network: str | None = None) -> TrainedNetwork:
    """Return the final network of a run.

    Parameters
    ----------
    run : FinishedRun
    network : str, optional
        ``file.py:Class``, if its class is not in models.py.

    Raises
    ------
    ConfigurationError
        If the run has no final network, or if its class is missing or was edited since.
    """
    import torch

    from experiment.model_check import is_same_network
    from train_utils import build_network

    where = relative_to_cwd(run.path)
    recorded = run.identity.network
    model_class = _class_in_models(recorded.name) if network is None else _class_in_file(network)
    built = build_network(model_class, torch.device("cpu"))
    try:
        built.load_state_dict(torch.load(run.path / "model.pt", weights_only=True))
    except FileNotFoundError:
        raise ConfigurationError(f"{where} has no model.pt: its final fit diverged, or the file was deleted") from None
    except Exception as error:  # a damaged file, or a class that was edited, can raise many types
        reason = str(error).splitlines()[-1].strip(" \t.") if str(error) else type(error).__name__
        raise ConfigurationError(
            f"the parameters in {where} do not fit {recorded.name} as it is now ({reason}). Name the "
            "class that was trained, as in --network file.py:Class"
        ) from None
    if not is_same_network(recorded.model_dump(), model_class):
        raise ConfigurationError(
            f"{recorded.name} is not the network that was trained in {where} any more, although the parameters fit. "
            "Undo the edit, name the class that was trained (--network file.py:Class), or name another run (--run)"
        )
    normalization = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["normalization"]
    return TrainedNetwork(
        network=built,
        mean=normalization["mean"],
        std=normalization["std"],
        mirror=run.identity.mirror,
        class_names=normalization["class_names"],
    )


def _class_in_models(name: str) -> Callable[[], nn.Module]:
    import models

    if not hasattr(models, name):
        raise ConfigurationError(f"{name} is not in models.py. Name its file: --network file.py:{name}")
    return getattr(models, name)


def _class_in_file(network: str) -> Callable[[], nn.Module]:
    """Return the class that ``file.py:Class`` names."""
    file, _, name = network.rpartition(":")
    if not Path(file).is_file():
        raise ConfigurationError(f"--network must be file.py:Class with an existing file, got {network!r}")
    sys.path.append(str(Path(file).resolve().parent))  # it may import its neighbours, as when it is run as a script
    namespace = runpy.run_path(file)
    if name not in namespace:
        raise ConfigurationError(f"{file} has no {name}")
    return namespace[name]


def read_picture(path: Path, invert: bool = False) -> Tensor:
    """Return a picture as the networks take it: uint8 (28, 28), 0 is black.

    Transparent pixels become the background: black or, with `invert`, white, which is then inverted. A picture that is
    not square is padded with the grey of its border.

    Raises
    ------
    ConfigurationError
        If it is not a picture.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            grey = _to_grey(picture, background=255 if invert else 0)
    except OSError as error:
        reason = error.strerror or "it is not a picture, or of an unknown format"
        raise ConfigurationError(f"{path} cannot be read: {reason}") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if invert:
        grey = ImageOps.invert(grey)
    border = _median_of_border(np.asarray(grey))
    side = max(grey.size)
    square = ImageOps.pad(grey, (side, side), color=int(border))
    return torch.from_numpy(np.array(square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))


def _to_grey(picture: Image.Image, background: int) -> Image.Image:
    """Return a picture of any mode in 256 greys, with that background where it is transparent."""
    import numpy as np
    from PIL import Image

    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, which Pillow would clip at 255
        values = np.asarray(picture, dtype=np.float64)
        largest = 65535 if values.max() > 255 else 255
        if picture.mode.startswith("F") and values.max() <= 1:  # floating-point TIFFs from 0 to 1
            largest = 1
        return Image.fromarray((values.clip(0, largest) * (255 / largest)).round().astype(np.uint8))
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, (background, background, background, 255))
        picture = Image.alpha_composite(canvas, coloured)
    return picture.convert("L")


def _median_of_border(pixels: np.ndarray) -> float:
    """Return the median of the outermost pixels of a picture (height, width)."""
    import numpy as np

    return float(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))


def has_light_background(image: Tensor) -> bool:
    """Return whether the background of an image, uint8 (28, 28), is light: in all data sets here it is dark."""
    return _median_of_border(image.numpy()) > 127


def _background_advice(inverted: bool) -> str:
    if inverted:
        return "looks light on dark already, like the training images: leave out --invert"
    return "looks dark on light, but the training images are light on dark: try --invert"


def describe_prediction(path: str, probabilities: Tensor, class_names: list[str]) -> str:
    """Return one line: a picture's path and its most likely classes, given its class probabilities (10,)."""
    largest, labels = probabilities.topk(CLASSES_SHOWN)
    shown = [
        f"{display_name(class_names[label])} {100 * probability:.1f} %"
        for probability, label in zip(largest.tolist(), labels.tolist(), strict=True)
    ]
    return f"{path}: {', '.join(shown)}"


if __name__ == "__main__":
    main()
