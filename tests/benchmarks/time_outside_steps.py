"""What a full run spends on anything but training steps: ``python tests/benchmarks/time_outside_steps.py``.

Runs main_cnn.py as it is, with a network that takes the time from the start of each forward pass in training to the end
of the optimizer's step. What is left of workers × wall time is start-up, reading, batches, the folds' validation, the
test, checkpoints, logging, figures, and workers waiting for each other. The results of the run are as ever and stay in
RUNS_DIR.
"""

import argparse
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from common import config_of, main_cnn, run_experiment
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import models

LOG = "TIME_OUTSIDE_STEPS_LOG"  # names the file that worker processes append the seconds of each step to


class ConvolutionalNeuralNetwork(models.ConvolutionalNeuralNetwork):
    """The network of main_cnn.py, with a clock."""

    hook: Any = None  # only the newest network's is in force

    def __init__(self) -> None:
        super().__init__()
        self.start = 0.0
        file = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def after_step(*_arguments: Any) -> None:
            os.write(file, struct.pack("d", time.perf_counter() - self.start))

        if type(self).hook is not None:
            type(self).hook.remove()
        type(self).hook = register_optimizer_step_post_hook(after_step)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        if self.training:
            self.start = time.perf_counter()
        return super().forward(images)


def main() -> None:
    """Run, measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[LOG] = f"{folder}/steps"
        start = time.perf_counter()
        result = run_experiment(ConvolutionalNeuralNetwork, config_of(main_cnn))
        wall = (time.perf_counter() - start) * result.environment["workers"]
        content = Path(os.environ[LOG]).read_bytes()
    in_steps = sum(value for (value,) in struct.iter_unpack("d", content))
    print(f"{len(content) // 8} steps took {in_steps:.0f} s of {wall:.0f} s (workers × wall time)")
    print(f"outside forward, backward and optimizer step: {1 - in_steps / wall:.1%}")


if __name__ == "__main__":
    main()
