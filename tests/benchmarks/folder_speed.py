"""A folder of JPEG files: ``python tests/benchmarks/folder_speed.py`` (about half an hour).

Writes JPEGs of 640 × 480 pixels, cut from scikit-learn's two photographs, in four classes. Then, in turn and repeated:
the time of (a) the loop of PyTorch's tutorials over ``ImageFolder`` and ``DataLoader(num_workers=2)``, which decodes,
resizes and normalizes each picture in every epoch, and (b) this project's ``run_experiment``, which decodes each
picture once; (c) is (b) once more, with the pictures decoded. All train the same small CNN on 64 × 64 pixels in colour:
3 folds and a final fit of 3 epochs, each epoch evaluated. Everything counts but the imports. Prints medians
with minimum and maximum, and the paired ratios.

With ``--memory N``: the memory of the whole process tree of a run on N pictures brought to (3, 96, 96), and of the same
run on 100 pictures, against the size of the images. It is the largest sum of proportional set sizes (PSS), which count
a page that several processes map once; resident set sizes would count the images once per process.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import main_cnn, make_config, run_experiment
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from train_utils import test_loop, train_loop

CLASSES, FOLDS, EPOCHS, SIDE, MEMORY_SIDE = 4, 3, 3, 64, 96
SETTINGS: dict[str, Any] = {"FOLDS": FOLDS, "EPOCHS": EPOCHS, "WANDB_MODE": "disabled", "MIRROR": False}


class SmallNetwork(nn.Module):
    """Two convolutions and one fully connected layer, for pictures in colour of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, CLASSES),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, 4)."""
        return self.stack(images)


def write_pictures(folder: Path, number: int, size: tuple[int, int]) -> None:
    """Write JPEGs: parts of the left and the right half of each photograph, enlarged."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    for index in range(number):
        label = index % CLASSES
        path = folder / f"class-{label}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        left = 320 * (label % 2) + int(generator.integers(0, 120))
        top = int(generator.integers(0, 270))
        tile = Image.fromarray(photographs[label // 2][top : top + 150, left : left + 200])
        tile.resize(size).save(path, quality=90)


def tutorial_run(folder: str) -> float:
    """Return the time of three folds and a final fit by the loop of PyTorch's tutorials."""
    start = time.perf_counter()
    steps = [transforms.Resize((SIDE, SIDE)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    dataset = datasets.ImageFolder(folder, transforms.Compose(steps))
    labels = np.array(dataset.targets)
    training, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    parts = [(training[rest], training[held_out]) for rest, held_out in splitter.split(training, labels[training])]
    for trained_on, evaluated_on in [*parts, (training, test)]:
        train_loader = DataLoader(Subset(dataset, trained_on.tolist()), batch_size=64, shuffle=True, num_workers=2)
        test_loader = DataLoader(Subset(dataset, evaluated_on.tolist()), batch_size=256, num_workers=2)
        model, loss_fn = SmallNetwork(), nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=main_cnn.LEARNING_RATE)
        for _ in range(EPOCHS):
            train_loop(train_loader, model, loss_fn, optimizer)
            if evaluated_on is not test:
                test_loop(test_loader, model, loss_fn)
        if evaluated_on is test:
            test_loop(test_loader, model, loss_fn)
    return time.perf_counter() - start


def project_run(folder: str, data_dir: str, side: int = SIDE) -> float:
    """Return the time of a whole run, from preparation to the last file."""
    with tempfile.TemporaryDirectory() as runs_dir, contextlib.redirect_stdout(io.StringIO()):
        places = {"DATASET": folder, "DATA_DIR": data_dir, "RUNS_DIR": runs_dir, "IMAGE_SHAPE": (3, side, side)}
        config = make_config(main_cnn, **SETTINGS | places)
        start = time.perf_counter()
        run_experiment(SmallNetwork, config)
        return time.perf_counter() - start


def largest_memory(folder: Path, data_dir: Path) -> float:
    """Return the largest memory in MB that a run and its workers take together, pages that they share counted once."""
    code = f"import folder_speed; folder_speed.project_run({str(folder)!r}, {str(data_dir)!r}, {MEMORY_SIDE})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    largest = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            for each in [parent := psutil.Process(process.pid), *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += each.memory_full_info().pss
        largest = max(largest, total)
        time.sleep(0.2)
    assert process.returncode == 0
    return largest / 1e6


def measure_speed(pictures: int, repeats: int) -> None:
    """Print the times and the ratios."""
    seconds: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "pictures", pictures, (640, 480))
        for repeat in range(repeats):
            path, data_dir = f"{folder}/pictures", f"{folder}/data-{repeat}"
            runs = {
                "a": f"tutorial_run({path!r})",
                "b": f"project_run({path!r}, {data_dir!r})",
                "c": f"project_run({path!r}, {data_dir!r})",
            }
            for name, call in runs.items():
                # A program of its own: in a process that multiprocessing starts, DataLoader's workers hang.
                code = f"import folder_speed; print(folder_speed.{call})"
                output = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True)
                seconds[name].append(float(output))
                print(f"({name}) {seconds[name][-1]:.1f} s", flush=True)
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["a"], values, strict=True)]
        print(
            f"({name}) {statistics.median(values):.1f} s ({min(values):.1f} … {max(values):.1f}); (a) takes "
            f"{statistics.median(ratios):.2f} times as long ({min(ratios):.2f} … {max(ratios):.2f})"
        )


def measure_memory(pictures: int) -> None:
    """Print the memory of a run on many pictures, and what it may be."""
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in (100, pictures):
            write_pictures(Path(folder) / f"{number}", number, (160, 120))
            memory[number] = largest_memory(Path(folder) / f"{number}", Path(folder) / "data")
            print(f"{number:,} pictures: {memory[number]:,.0f} MB", flush=True)
    images = pictures * 3 * MEMORY_SIDE**2 / 1e6
    share = (memory[pictures] - memory[100]) / images
    print(f"The images are {images:,.0f} MB; the run on all of them takes {share:.2f} times that more than on 100.")


def main() -> None:
    """Measure speed or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="N")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
    else:
        measure_speed(arguments.pictures, arguments.repeats)


if __name__ == "__main__":
    main()
