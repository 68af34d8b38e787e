"""How much the test accuracy depends on the seed: ``python tests/benchmarks/seeds.py`` (20 minutes on two cores).

Trains only the final fit of main_cnn.py, once for each of five seeds, and tests each once. Nothing is chosen by the
result: all settings are those of main_cnn.py, or of recipes (in the notation of recipes.py) that the folds chose:
``python tests/benchmarks/seeds.py cosine:0.001:mirror one_cycle:0.002:mirror``.
"""

import argparse
import statistics

from common import final_metrics, fits_of, main_cnn, workers_for
from recipes import parse_recipe

from experiment.executors import WorkerProcesses
from train_utils import train_fit

SEEDS = (314, 315, 316, 317, 318)


def main() -> None:
    """Train, test and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=main_cnn.EPOCHS)
    parser.add_argument("--precision", default="auto", help="float32 or bfloat16 (default: the faster one)")
    parser.add_argument("recipes", nargs="*", default=["main_cnn.py"], help="schedule:peak[:mirror]")
    arguments = parser.parse_args()
    shared = {"EPOCHS": arguments.epochs, "PRECISION": arguments.precision}
    with WorkerProcesses(workers_for(len(arguments.recipes) * len(SEEDS))) as pool:
        futures = {}
        for recipe in arguments.recipes:
            changes = parse_recipe(recipe) if ":" in recipe else {}
            fits = [fits_of(RNG_SEED=seed, **shared, **changes)[0] for seed in SEEDS]
            futures[recipe] = [pool.submit(train_fit, fit) for fit in fits]
        for recipe, of_seeds in futures.items():
            metrics = [final_metrics(future.result()[1]) for future in of_seeds]
            print_metrics(recipe, metrics)


def print_metrics(recipe: str, metrics: list[tuple[float, float]]) -> None:
    """Print accuracy and loss of each seed, and their means."""
    print(recipe)
    for seed, (accuracy, loss) in zip(SEEDS, metrics, strict=True):
        print(f"  seed {seed}: test accuracy {accuracy:.4f}, loss {loss:.4f}")
    for name, values in zip(("accuracy", "loss"), zip(*metrics, strict=True), strict=True):
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        print(f"  test {name}: {mean:.4f} ± {deviation:.4f} (standard deviation)", flush=True)


if __name__ == "__main__":
    main()
