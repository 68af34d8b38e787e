"""How the time of a run grows: ``python tests/benchmarks/cost_growth.py`` (seven minutes on two cores).

Runs main_cnn.py's experiment on 10,000 images, 5 folds, 2 epochs and all cores, and varies workers, folds, epochs and
training images one at a time. Prints the wall time of each, start-up included, the straight line that fits them best
and how far from it the farthest is, and the most memory a worker took.
"""

import argparse
import contextlib
import threading
import time

import joblib
import numpy as np
import psutil
from common import seconds_of_a_run

IMAGES = 10_000


class WorkerMemory(threading.Thread):
    """Watches the resident memory of this process's workers; `most` is the most that one of them took, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        """Look twice a second."""
        while True:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "experiment.workers" in " ".join(child.cmdline()):
                        self.most = max(self.most, child.memory_info().rss)
            time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    memory, cores = WorkerMemory(), joblib.cpu_count()
    print(f"{cores} cores; unless varied: {IMAGES} training images, 5 folds, 2 epochs, {cores} workers")
    for name, values in {
        "WORKERS": sorted({1, max(1, cores // 2), cores}),
        "FOLDS": [2, 5, 8, 11],
        "EPOCHS": [1, 2, 3, 4],
        "training images": [5_000, 10_000, 15_000, 20_000],
    }.items():
        runs = []
        for value in values:
            images = value if name == "training images" else IMAGES
            varied = {} if name == "training images" else {name: value}
            runs.append(seconds_of_a_run(images, **{"EPOCHS": 2, "WANDB_MODE": "disabled"} | varied))
            print(f"{name:<16}{value:>7}{runs[-1]:>9.1f} s", flush=True)
        if name != "WORKERS":
            slope, start = np.polyfit(values, runs, 1)
            farthest = max(abs(start + slope * value - run) / run for value, run in zip(values, runs, strict=True))
            print(f"  = {start:.1f} s + {slope:.3g} s × {name}, off by {farthest:.1%} at most")
    print(f"a worker takes up to {memory.most / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
