"""How much the seed alone moves the test accuracy: ``python tests/benchmarks/seeds.py`` (12 minutes on two cores).

Trains the final fit of main_cnn.py, and nothing else, once for each of five seeds, and tests each once. Nothing is
chosen by what comes out: all settings are those of main_cnn.py.
"""

import argparse
import statistics

from common import config_of, fits_of, main_cnn, test_figures, train_side_by_side

from experiment.machine import plan_workers

SEEDS = (314, 315, 316, 317, 318)


def main() -> None:
    """Train, test and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=main_cnn.EPOCHS)
    epochs = parser.parse_args().epochs
    fits = [fits_of(RNG_SEED=seed, EPOCHS=epochs)[0] for seed in SEEDS]
    workers = plan_workers("auto", config_of(main_cnn).folds + 1, fits[0].device)[1]
    outcomes = [test_figures(history) for history in train_side_by_side(fits, workers)]
    for seed, (accuracy, loss) in zip(SEEDS, outcomes, strict=True):
        print(f"seed {seed}: test accuracy {accuracy:.4f}, loss {loss:.4f}")
    for name, values in zip(("accuracy", "loss"), zip(*outcomes, strict=True), strict=True):
        print(f"test {name}: {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} (standard deviation)")


if __name__ == "__main__":
    main()
