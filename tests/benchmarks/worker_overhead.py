"""What worker processes cost: ``python tests/benchmarks/worker_overhead.py`` (two minutes).

Measures, in one call, how long workers take to start and to load the data, how long a state takes there and back, and
how long an epoch of the final fit of main_cnn.py takes when every worker is busy; prints the first two as a share of a
full run.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import joblib

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main_cnn
from data_utils import cached_dataset, load_dataset
from models import ConvolutionalNeuralNetwork
from train_utils import PROJECT_DIR, Fit, TrainingConfig, plan_workers, resolve_precision, run_epoch


def there_and_back(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as it came."""
    return state


def seconds(function: Any, *arguments: Any) -> tuple[float, Any]:
    """Return how long a call took, and what it returned."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    """Measure and print."""
    config = TrainingConfig.from_constants(vars(main_cnn))
    precision = resolve_precision(config.precision, "cpu")
    threads, workers = plan_workers(config, "cpu")
    digest = load_dataset(config.dataset, PROJECT_DIR / config.data_dir).digest()
    fit = Fit("final", None, ConvolutionalNeuralNetwork, "cpu", precision, threads, digest)
    parallel = joblib.Parallel(n_jobs=workers, batch_size=1, pre_dispatch="n_jobs", max_nbytes=None)
    load = joblib.delayed(cached_dataset)
    start_up, _ = seconds(parallel, [load(config.dataset, PROJECT_DIR / config.data_dir, digest)] * workers)
    epoch, outcomes = seconds(parallel, [joblib.delayed(run_epoch)(config, fit, 1, None)] * workers)
    state = outcomes[0][0]
    trips = [seconds(parallel, [joblib.delayed(there_and_back)(state)] * workers)[0] for _ in range(20)]
    rounds = config.epochs * -(-(config.folds + 1) // workers)  # of `workers` epochs side by side
    full = rounds * epoch
    cost = start_up + rounds * statistics.median(trips)
    print(f"{workers} workers × {threads} threads, {config.folds} folds + 1, {config.epochs} epochs")
    print(f"start of all workers, imports and data set   {start_up:8.2f} s, once")
    print(
        f"states there and back, all workers at once   {statistics.median(trips):8.3f} s, {rounds} times (median of 20)"
    )
    print(f"an epoch of {len(outcomes)} final fits side by side       {epoch:8.2f} s, so about {full:.0f} s a full run")
    print(f"workers cost                                 {cost / full:8.2%} of a full run")


if __name__ == "__main__":
    main()
