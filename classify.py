"""Print what the final network of a finished run predicts for pictures, or for all pictures in a folder.

Each picture gets one line with its three most likely classes and their probabilities. A picture may have any size and
colours; it is converted to the size and colours of the training images. The digits and clothes are light objects on a
dark background: for a network that was trained on these, a dark object on a light background needs --invert.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from experiment.errors import ConfigurationError, user_errors
from experiment.files import relative_to_cwd, write_atomically
from experiment.formatting import display_name
from experiment.terminal import print_line, warn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from comparison.run_reader import FinishedRun
    from data_files import ImageShape

DEFAULT_RUNS_DIR = Path(__file__).resolve().parent / "runs"
DEFAULT_SHAPE = (1, 28, 28)
SIMILAR_SHARE = 0.1  # of the training images may have another background than the rest, for the advice to invert
CLASSES_SHOWN = 3


@dataclass(frozen=True)
class TrainedNetwork:
    """The final network of a run, and what it needs to predict.

    Attributes
    ----------
    network : nn.Module
    mean, std : tuple of float
        Of the pixels of the training images, per channel, scaled to 0 … 1.
    mirror : bool
        Average the probabilities of a picture and of its mirror image.
    class_names : list of str
    image_shape : tuple of int
        Channels, height and width of the images that it takes.
    light_backgrounds : float
        The share of the training images with a light background.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool
    class_names: list[str]
    image_shape: ImageShape
    light_backgrounds: float

    def predict(self, images: Tensor) -> Tensor:
        """Return the class probabilities, float32 (N, classes), of images as `read_picture` returns them."""
        import torch

        from data_utils import Batches
        from train_utils import evaluation_batch_size, test_loop

        no_labels = torch.zeros(len(images), dtype=torch.int64)
        batch_size = evaluation_batch_size(self.image_shape)
        batches = Batches(images, no_labels, None, batch_size, self.mean, self.std, torch.device("cpu"))
        _, _, probabilities = test_loop(batches, self.network, torch.nn.CrossEntropyLoss(), mirror=self.mirror)
        return probabilities[:, : len(self.class_names)]  # a network may have more outputs than there are classes


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print a line per picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="picture",
        help="PNG, JPEG or another format that Pillow reads; or a folder of them",
    )
    parser.add_argument("--run", help="a run directory, or a part of its name (default: the newest finished run)")
    parser.add_argument(
        "--network",
        metavar="FILE:NAME",
        help="the network's class, or a function that builds it, if it is not a class in models.py",
    )
    parser.add_argument("--invert", action="store_true", help="the pictures are dark on a light background")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a table with the columns of predictions.csv; the label is the picture's folder if that is a class",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=DEFAULT_RUNS_DIR,
        metavar="FOLDER",
        help="the folder with all runs (default: runs beside classify.py)",
    )
    given = parser.parse_args(arguments)
    with user_errors():
        pictures = [Path(picture) for picture in given.pictures]
        classify(pictures, given.run, given.runs_dir, given.network, given.invert, given.csv)


def classify(
    pictures: list[Path],
    run: str | None,
    runs_dir: Path,
    network: str | None = None,
    invert: bool = False,
    csv_file: Path | None = None,
) -> None:
    """Print what the final network of a run predicts for pictures and folders of pictures; write a table of it."""
    import torch

    from experiment.predictions import pictures_csv

    if csv_file is not None:
        _check_csv_path(csv_file)
    finished_run = choose_run(run, runs_dir)
    trained = load_network(finished_run, network)
    paths = [path for picture in pictures for path in find_pictures_in(picture)]
    images = [read_picture(path, trained.image_shape, invert) for path in paths]
    _warn_of_backgrounds(paths, images, trained, invert)
    probabilities = trained.predict(torch.stack(images))
    print_line(f"Predictions of the final network of {relative_to_cwd(finished_run.path)}:")
    for path, row in zip(paths, probabilities, strict=True):
        print_line(describe_prediction(str(path), row, trained.class_names))
    if csv_file is not None:
        write_atomically(csv_file, pictures_csv(paths, probabilities, trained.class_names))
        print_line(f"Table: {relative_to_cwd(csv_file)}")


def _check_csv_path(path: Path) -> None:
    """Refuse a table that cannot be written, before anything is predicted."""
    if os.path.isdir(path):
        raise ConfigurationError(f"the table must be a file, got the folder --csv {path}")
    if not os.path.isdir(path.parent):
        raise ConfigurationError(f"the table must be a file in an existing folder, got --csv {path}")


def find_pictures_in(path: Path) -> list[Path]:
    """Return a picture, or all pictures in a folder and its subfolders, in the order of their names.

    Raises
    ------
    ConfigurationError
        If a folder has no pictures, or cannot be read.
    """
    from data_files import DatasetError, pictures_below

    if not os.path.isdir(path):  # Path.is_dir raises if the name is too long
        return [path]
    try:
        found = pictures_below(path)
    except DatasetError as error:
        raise ConfigurationError(str(error)) from None
    if not found:
        raise ConfigurationError(f"there is no picture in {path}")
    return found


def _warn_of_backgrounds(paths: list[Path], images: list[Tensor], trained: TrainedNetwork, invert: bool) -> None:
    """Print each advice on backgrounds once."""
    paths_by_advice: dict[str, list[Path]] = {}
    for path, image in zip(paths, images, strict=True):
        advice = background_advice(image, trained.light_backgrounds, invert)
        if advice:
            paths_by_advice.setdefault(advice, []).append(path)
    for advice, (first, *others) in paths_by_advice.items():
        warn(f"{first} {advice}." + (f" So do {len(others)} more." if others else ""))


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

    from experiment.model_check import build_module, check_callable, is_same_network
    from train_utils import build_network

    where = relative_to_cwd(run.path)
    recorded = run.identity.network
    model_class = _class_in_models(recorded.name) if network is None else _class_in_file(network)
    image_shape = run.identity.image_shape
    check_callable(model_class)
    built = build_network(functools.partial(build_module, model_class), torch.device("cpu"), image_shape)
    try:
        built.load_state_dict(torch.load(run.path / "model.pt", weights_only=True))
    except FileNotFoundError:
        raise ConfigurationError(f"{where} has no model.pt: its final fit diverged, or the file was deleted") from None
    except Exception as error:  # a damaged file, or a class that was edited, can raise many types
        reason = str(error).splitlines()[-1].strip(" \t.") if str(error) else type(error).__name__
        raise ConfigurationError(
            f"the parameters in {where} do not fit {recorded.name} as it is now ({reason}). Name the class "
            "that was trained, or the function that built it, as in --network file.py:name"
        ) from None
    if not is_same_network(recorded.model_dump(), model_class, image_shape):
        raise ConfigurationError(
            f"{recorded.name} is not the network that was trained in {where} any more, although the parameters fit. "
            "Undo the edit, name the class that was trained (--network file.py:Class), or name another run (--run)"
        )
    normalization = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["normalization"]
    return TrainedNetwork(
        network=built,
        mean=_per_channel(normalization["mean"]),
        std=_per_channel(normalization["std"]),
        mirror=run.identity.mirror,
        class_names=normalization["class_names"],
        image_shape=image_shape,
        light_backgrounds=normalization.get("light_backgrounds", 0.0),
    )


def _per_channel(recorded: float | list[float]) -> tuple[float, ...]:
    """Return one number per channel; runs of grey images may have recorded a single number."""
    return tuple(recorded) if isinstance(recorded, list) else (recorded,)


def _class_in_models(name: str) -> Callable[[], nn.Module]:
    import models

    if not hasattr(models, name):
        raise ConfigurationError(
            f"{name} is not in models.py. Name the class, or the function that builds it: --network file.py:{name}"
        )
    return getattr(models, name)


def _class_in_file(network: str) -> Callable[[], nn.Module]:
    """Return the class that ``file.py:Class`` names."""
    file, _, name = network.rpartition(":")
    path = Path(file).resolve()
    is_module = re.fullmatch(r"\w+(\.\w+)*", file) is not None and not file.endswith(".py")
    if not path.is_file() and not is_module:
        raise ConfigurationError(f"--network must be file.py:Class with an existing file, got {network!r}")
    with _training_refused(file):
        if not path.is_file():  # package.module:Class
            sys.path.append(os.getcwd())
            namespace = _import_module(file, network)
        elif (path.parent / "__init__.py").exists():  # relative imports need the package
            root = path.parent
            while (root / "__init__.py").exists():
                root = root.parent
            sys.path.append(str(root))
            namespace = _import_module(".".join(path.relative_to(root).with_suffix("").parts), network)
        else:
            sys.path.append(str(path.parent))  # it may import its neighbours, as when it is run as a script
            namespace = runpy.run_path(file)
    if name not in namespace:
        raise ConfigurationError(f"{file} has no {name}: name the class of the network, or a function that builds it")
    return namespace[name]


def _import_module(module: str, network: str) -> dict[str, Any]:
    try:
        return vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise  # one that the module itself imports
        raise ConfigurationError(
            f"--network must be file.py:Class or package.module:Class, got {network!r}: there is no module {error.name}"
        ) from None


@contextmanager
def _training_refused(file: str) -> Iterator[None]:
    """Let a file that trains or exits when it is imported end with one line instead."""
    import experiment.run

    def refuse(*_arguments: Any, **_keywords: Any) -> NoReturn:
        raise ConfigurationError(
            f'{file} trains when it is imported. Put the call of run_experiment under if __name__ == "__main__":'
        )

    run_experiment, arguments = experiment.run.run_experiment, sys.argv
    experiment.run.run_experiment = refuse
    sys.argv = [file]  # a file that reads its arguments must not see those of this command
    try:
        yield
    except SystemExit as end:
        raise ConfigurationError(
            f"{file} ends the program when it is imported (exit status {end.code}). Put what it does, besides defining "
            'the network, under if __name__ == "__main__":'
        ) from None
    finally:
        experiment.run.run_experiment = run_experiment
        sys.argv = arguments


def read_picture(path: Path, image_shape: ImageShape = DEFAULT_SHAPE, invert: bool = False) -> Tensor:
    """Return a picture as a network takes it: uint8, (height, width) in grey or (3, height, width), 0 is black.

    It is decoded as the pictures of a folder are, and with `invert` inverted afterwards.

    Raises
    ------
    ConfigurationError
        If it is not a picture.
    """
    import torch

    from data_files import DatasetError, decode_picture

    try:
        image = decode_picture(path, image_shape)
    except DatasetError as error:
        raise ConfigurationError(str(error)) from None
    return torch.from_numpy(255 - image if invert else image.copy())  # a copy can be written to


def background_advice(image: Tensor, light_backgrounds: float, inverted: bool) -> str | None:
    """Return what to try if an image's background is unlike that of nearly all training images.

    Parameters
    ----------
    image : Tensor
        As `read_picture` returns it.
    light_backgrounds : float
        The share of training images with a light background.
    inverted : bool
        Whether the image was inverted.
    """
    from data_utils import light_background_share

    is_light = light_background_share(image[None]) > 0.5
    if SIMILAR_SHARE < light_backgrounds < 1 - SIMILAR_SHARE or is_light == (light_backgrounds > 0.5):
        return None
    looks, training = "dark on light", "light on dark"
    if not is_light:
        looks, training = training, looks
    if inverted:
        return f"looks {training} already, like the training images: leave out --invert"
    return f"looks {looks}, but the training images are {training}: try --invert"


def describe_prediction(path: str, probabilities: Tensor, class_names: list[str]) -> str:
    """Return one line: a picture's path and its most likely classes, given its class probabilities."""
    largest, labels = probabilities.topk(min(CLASSES_SHOWN, len(probabilities)))
    shown = [
        f"{display_name(class_names[label])} {100 * probability:.1f} %"
        for probability, label in zip(largest.tolist(), labels.tolist(), strict=True)
    ]
    return f"{path}: {', '.join(shown)}"


if __name__ == "__main__":
    main()
