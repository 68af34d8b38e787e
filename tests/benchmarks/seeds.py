"""How much the seed alone moves the test accuracy: ``python tests/benchmarks/seeds.py`` (20 minutes, two cores).

Trains the final fit of main_cnn.py, and nothing else, once for each of five seeds, and tests each once. Nothing is
chosen by what comes out: all settings are those of main_cnn.py, or of the recipes (as recipes.py has them) that the
folds chose: ``python tests/benchmarks/seeds.py cosine:0.001:mirror one_cycle:0.002:mirror``.
"""

import argparse
import statistics

from common import fits_of, main_cnn, test_figures, train_side_by_side, workers_for
from recipes import changes_of

SEEDS = (314, 315, 316, 317, 318)


def main() -> None:
    """Train, test and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=main_cnn.EPOCHS)
    parser.add_argument("--precision", default="auto", help="float32 or bfloat16, instead of the faster one")
    parser.add_argument("recipes", nargs="*", default=["as main_cnn.py is"], help="schedule:peak[:mirror]")
    arguments = parser.parse_args()
    changes = [changes_of(recipe) if ":" in recipe else {} for recipe in arguments.recipes]
    given = {"EPOCHS": arguments.epochs, "PRECISION": arguments.precision}
    fits = [fits_of(RNG_SEED=seed, **given, **each)[0] for each in changes for seed in SEEDS]
    outcomes = [test_figures(history) for history in train_side_by_side(fits, workers_for(len(fits)))]
    for recipe in arguments.recipes:
        print(recipe)
        own, outcomes = outcomes[: len(SEEDS)], outcomes[len(SEEDS) :]
        for seed, (accuracy, loss) in zip(SEEDS, own, strict=True):
            print(f"  seed {seed}: test accuracy {accuracy:.4f}, loss {loss:.4f}")
        for name, values in zip(("accuracy", "loss"), zip(*own, strict=True), strict=True):
            print(
                f"  test {name}: {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} (standard deviation)"
            )


if __name__ == "__main__":
    main()
