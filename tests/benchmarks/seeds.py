"""How much the seed alone moves the test accuracy: ``python tests/benchmarks/seeds.py`` (12 minutes on two cores).

Trains the final fit of main_cnn.py, and nothing else, once for each of five seeds, and tests each once. Nothing is
chosen by what comes out: all settings are those of main_cnn.py.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import joblib

import main_cnn
from data_utils import load_dataset
from models import ConvolutionalNeuralNetwork
from train_utils import PROJECT_DIR, Fit, TrainingConfig, plan_workers, resolve_precision, run_epoch

SEEDS = (314, 315, 316, 317, 318)


def test_accuracy(seed: int, epochs: int, fit: Fit) -> tuple[float, float]:
    """Return test accuracy and loss of the final fit with a seed."""
    config, state = TrainingConfig.from_constants(vars(main_cnn) | {"RNG_SEED": seed, "EPOCHS": epochs}), None
    for epoch in range(1, config.epochs + 1):
        state, metrics = run_epoch(config, fit, epoch, state)
    loss, labels, probabilities = metrics["evaluation"]
    return (probabilities.argmax(1) == labels).double().mean().item(), loss


def main() -> None:
    """Train, test and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=main_cnn.EPOCHS)
    epochs = parser.parse_args().epochs
    config = TrainingConfig.from_constants(vars(main_cnn))
    threads, workers = plan_workers(config, "cpu")
    digest = load_dataset(config.dataset, PROJECT_DIR / config.data_dir).digest()
    fit = Fit("final", None, ConvolutionalNeuralNetwork, "cpu", resolve_precision("auto", "cpu"), threads, digest)
    calls = (joblib.delayed(test_accuracy)(seed, epochs, fit) for seed in SEEDS)
    outcomes = joblib.Parallel(n_jobs=workers, batch_size=1, pre_dispatch="n_jobs")(calls)
    for seed, (accuracy, loss) in zip(SEEDS, outcomes, strict=True):
        print(f"seed {seed}: test accuracy {accuracy:.4f}, loss {loss:.4f}")
    for name, values in zip(("accuracy", "loss"), zip(*outcomes, strict=True), strict=True):
        print(f"test {name}: {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} (standard deviation)")


if __name__ == "__main__":
    main()
