"""What does a trained network take a picture for? ``python -m experiment.classify picture.png … [--run NAME]``

Prints the three most likely classes of each picture, with their probabilities, as the final network of a finished run
sees it. A picture may have any size and colours; it is made a square of 28 × 28 grey pixels. The networks were trained
on light things on a dark ground: a dark thing on a light ground needs --invert.
"""

import importlib
import importlib.util
import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_utils import Batches
from experiment.console import display_name, say, warn
from experiment.errors import ConfigurationError, user_errors
from experiment.network import is_still
from experiment.past_runs import default_runs_dirs, find_run, folders_in_words, read_runs
from experiment.run_directory import path_from_here
from train_utils import EVALUATION_BATCH_SIZE, build_network, test_loop

if TYPE_CHECKING:
    from PIL import Image

SIZE = 28  # pixels, of the images that the networks take
SHOWN = 3  # classes of each picture
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainedNetwork:
    """The final network of a run, with all that it takes to ask it.

    Attributes
    ----------
    network : nn.Module
    mean, std : float
        Of the training images' pixels, scaled to 0 … 1.
    mirror : bool
        Answer with the mean over a picture and its mirror image.
    class_names : list of str
    """

    network: nn.Module
    mean: float
    std: float
    mirror: bool
    class_names: list[str]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the class probabilities, float32 (N, 10), of images, uint8 (N, 28, 28)."""
        no_labels = torch.zeros(len(images), dtype=torch.int64)
        batches = Batches(images, no_labels, EVALUATION_BATCH_SIZE, self.mean, self.std, CPU)
        _, _, probabilities = test_loop(batches, self.network, nn.CrossEntropyLoss(), mirror=self.mirror)
        return probabilities


def load_trained(run_dir: Path, network: str | None = None) -> TrainedNetwork:
    """Return the final network of a run.

    Parameters
    ----------
    run_dir : Path
    network : str, optional
        ``file.py:Class``, where its class is none of models.py.

    Raises
    ------
    ConfigurationError
        If the run has no final network, or its class is not there or another one by now.
    """
    where = path_from_here(run_dir)
    if not (run_dir / "model.pt").is_file():
        raise ConfigurationError(f"{where} has no model.pt: its final fit diverged, or the file was deleted")
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        trained, pictures, mirror = config["identity"]["network"], config["pictures"], config["mirror"]
        name, mean, std, class_names = trained["name"], pictures["mean"], pictures["std"], pictures["class_names"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigurationError(f"{where}: config.json is damaged, or of an older version of this program") from None
    model_class = _class_of_models(name) if network is None else _class_of_file(network)
    built = build_network(model_class, CPU)
    try:
        built.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True))
    except Exception as error:  # whatever a file of the user's own, or a class that was edited, makes of it
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigurationError(
            f"the weights in {where} do not fit {name} as it is now ({reason}). Name the class that was trained, as in "
            "--network file.py:Class"
        ) from None
    if not is_still(trained, model_class):
        raise ConfigurationError(
            f"{name} is another network by now than the one that was trained in {where}, though the weights fit: undo "
            "what was edited, or name the class that was trained, as in --network file.py:Class, or another run: --run"
        )
    return TrainedNetwork(built, mean, std, mirror, class_names)


def _class_of_models(name: str) -> Callable[[], nn.Module]:
    found = getattr(importlib.import_module("models"), name, None)
    if found is None:
        raise ConfigurationError(f"{name} is no network of models.py. Say where it is: --network file.py:{name}")
    return found


def _class_of_file(network: str) -> Callable[[], nn.Module]:
    """Return the class that ``file.py:Class`` names."""
    file, _, name = network.rpartition(":")
    if not Path(file).is_file():
        raise ConfigurationError(f"--network must be file.py:Class, and the file must be there, got {network!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"--network must name a file of Python, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # a dataclass looks for its own module there
    sys.path.append(os.path.dirname(os.path.abspath(file)))  # and it may import what lies beside it, as when it runs
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ConfigurationError(f"{file} has no {name}")
    return getattr(module, name)


def read_picture(path: Path, invert: bool = False) -> Tensor:
    """Return a picture as the networks take it: uint8 (28, 28), 0 is black.

    What is transparent becomes the ground: black or, with `invert`, white, which is inverted then. What is not square
    is filled up to a square with the grey of its border.

    Raises
    ------
    ConfigurationError
        If it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            grey = _grey_of(picture, ground=255 if invert else 0)
    except OSError as error:
        reason = error.strerror or "no picture, or of an unknown kind"
        raise ConfigurationError(f"{path} cannot be read: {reason}") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises of damaged files
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if invert:
        grey = ImageOps.invert(grey)
    border = _grey_of_border(np.asarray(grey))
    side = max(grey.size)
    square = ImageOps.pad(grey, (side, side), color=int(border))
    return torch.from_numpy(np.array(square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))


def _grey_of(picture: "Image.Image", ground: int) -> "Image.Image":
    """Return a picture of any kind in 256 greys, on a ground where it is transparent."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which Pillow would cut off at 255
        values = np.asarray(picture, dtype=np.float64)
        most = 65535 if values.max() > 255 else 255
        return Image.fromarray((values.clip(0, most) * (255 / most)).round().astype(np.uint8))
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, (ground, ground, ground, 255))
        picture = Image.alpha_composite(canvas, coloured)
    return picture.convert("L")


def _grey_of_border(pixels: np.ndarray) -> float:
    """Return the median of the outermost pixels of a picture (height, width)."""
    return float(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))


def looks_inverted(image: Tensor) -> bool:
    """Return whether the ground of an image, uint8 (28, 28), is light: in all data sets here it is dark."""
    return _grey_of_border(image.numpy()) > 127


def answer_text(path: str, probabilities: Tensor, class_names: list[str]) -> str:
    """Return a line: a picture's name and its most likely classes, given its class probabilities (10,)."""
    most, labels = probabilities.topk(SHOWN)
    answers = [
        f"{display_name(class_names[label])} {100 * share:.1f} %"
        for share, label in zip(most.tolist(), labels.tolist(), strict=True)
    ]
    return f"{path}: {', '.join(answers)}"


def main(arguments: list[str] | None = None) -> None:
    """Classify the pictures that the command line names."""
    parser = ArgumentParser("python -m experiment.classify", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="picture", help="PNG, JPEG or whatever else Pillow reads")
    parser.add_argument("--run", help="the run's folder, or a part of its name (default: the newest finished run)")
    parser.add_argument("--network", metavar="FILE:CLASS", help="the network's class, where it is none of models.py")
    parser.add_argument("--invert", action="store_true", help="the pictures are dark on light")
    parser.add_argument("--runs-dir", type=Path, help="where the runs lie (default: RUNS_DIR of the scripts)")
    given = parser.parse_args(arguments)
    with user_errors():
        _classify(given)


def _classify(given: Any) -> None:
    run_dir = _run_dir(given.run, given.runs_dir)
    trained = load_trained(run_dir, given.network)
    say(f"The final network of {path_from_here(run_dir)} says:")
    images = [read_picture(Path(path), given.invert) for path in given.pictures]
    for path, image in zip(given.pictures, images, strict=True):
        if looks_inverted(image):
            warn(f"{path} {_advice_on_ground(given.invert)}.")
    for path, probabilities in zip(given.pictures, trained.probabilities(torch.stack(images)), strict=True):
        say(answer_text(path, probabilities, trained.class_names))


def _advice_on_ground(inverted: bool) -> str:
    if inverted:
        return "looks light on dark already, as the network knows it: leave --invert out"
    return "looks dark on light, but the network knows light on dark: try --invert"


def _run_dir(name: str | None, runs_dir: Path | None) -> Path:
    """Return the folder of the run of that name or, without one, of the newest that is finished."""
    folders = default_runs_dirs() if runs_dir is None else [runs_dir]
    if name is not None:
        return find_run(name, *folders).path
    runs, _ = read_runs(*folders)
    if not runs:
        where = folders_in_words(folders)
        raise ConfigurationError(f"There is no finished run in {where}: run main_cnn.py first, or name --runs-dir.")
    return runs[0].path


if __name__ == "__main__":
    main()
