"""Train, cross-validate and test a convolutional neural network on Fashion-MNIST: ``python main_cnn.py``.

Change the constants below; the network itself is in models.py.
"""

from concurrent.futures import Executor

from experiment.errors import user_errors
from experiment.results import ExperimentResult
from experiment.run import run_experiment
from experiment.settings import TrainingConfig, read_command_line
from models import ConvolutionalNeuralNetwork

# What is computed
DATASET = "FashionMNIST"  # or "MNIST", "KMNIST", "CIFAR10", "Digits" (small, no download), or a folder of pictures
IMAGE_SHAPE = (1, 28, 28)  # channels (1: grey, 3: colour), height and width; every image is resized to it
FOLDS = 5  # parts of the cross-validation: 2 or more
EPOCHS = 10  # passes over the training images: 1 or more
BATCH_SIZE = 64  # images per step of the optimizer: 2 or more
LEARNING_RATE = 0.001  # step size of Adam, the peak if the schedule changes it: above 0
LR_SCHEDULE = "cosine"  # the learning rate falls along a cosine; or "one_cycle": rises, then falls; or "constant"
MIRROR = True  # mirror half of the training images; average the probabilities of each and its mirror image; or False
RNG_SEED = 314  # seed of everything random: 0 … 4294967295

# How it is computed
DEVICE = "cpu"  # or "cuda", "cuda:1", "mps" (Apple), "auto": the fastest one available
PRECISION = "auto"  # bfloat16 if the processor is faster in it; or "float32", "bfloat16"
WORKERS = "auto"  # fits trained at the same time: one per core, or a number; does not change the results
RESUME = True  # resume an unfinished run with the same settings; or False: start a new one

# Where it is logged
WANDB_MODE = "auto"  # online if there is a key, else offline; or "online", "offline", "disabled"
WANDB_PROJECT_NAME = "cnn-fun"  # the project on wandb.ai that the runs belong to
WANDB_API_KEY_PATH = "wandb_api_key.txt"  # the file with your key; paths are relative to this script's folder

# Where it is stored
DATA_DIR = "data"  # the data sets
RUNS_DIR = "runs"  # the results, one folder per run


def main(executor: Executor | None = None) -> ExperimentResult:
    """Build the configuration, run all fits, and return the result."""
    with user_errors():
        config = TrainingConfig.from_constants(globals())
        return run_experiment(ConvolutionalNeuralNetwork, config, executor)


if __name__ == "__main__":
    globals().update(read_command_line(globals(), __doc__))
    main()
