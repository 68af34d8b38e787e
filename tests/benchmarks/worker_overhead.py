"""What worker processes cost: ``python tests/benchmarks/worker_overhead.py [--against COMMIT]`` (two minutes).

Measures how long fresh workers take to answer with the data set in memory, how long a state takes there and back, and
how long an epoch of the final fit of main_cnn.py takes when every worker is busy; prints the first two as a share of a
full run. With a commit, the first is measured five times in turn with that version of the repository, whose packages
are those installed here.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import WorkerProcesses, fits_of, path_of, run_epoch, workers_for

from data_utils import PROJECT_DIR, cached_dataset

START_UP = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
workers, name, data_dir, digest = int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5]
try:
    from experiment.workers import WorkerProcesses
except ImportError:  # the versions before there were any of our own
    import joblib, train_utils
    start = time.perf_counter()
    calls = [joblib.delayed(train_utils.cached_dataset)(name, data_dir, digest)] * workers
    joblib.Parallel(n_jobs=workers, batch_size=1, pre_dispatch="n_jobs", max_nbytes=None)(calls)
else:
    import train_utils
    start = time.perf_counter()
    with WorkerProcesses(workers) as pool:
        list(pool.map(train_utils.cached_dataset, [name] * workers, [data_dir] * workers, [digest] * workers))
print(time.perf_counter() - start)
"""


def there_and_back(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as it came."""
    return state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="a version to compare the start of the workers with")
    commit = parser.parse_args().against
    fit = fits_of()[0]
    folds = len(fits_of()) - 1
    workers = workers_for(folds + 1)
    arguments = [str(workers), fit.dataset, str(path_of(fit.data_dir)), fit.data_digest]

    def start_up(folder: str) -> float:
        """Return the seconds from nothing to the data set in every worker, in a process of its own."""
        return float(subprocess.check_output([sys.executable, "-c", START_UP, folder, *arguments]))

    if commit:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "worktree", "add", "--detach", folder, commit], cwd=PROJECT_DIR, check=True)
            pairs = [(start_up(str(PROJECT_DIR)), start_up(folder)) for _ in range(5)]
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=PROJECT_DIR, check=True)
        here, there = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        print(f"start of {workers} workers: {here:.2f} s here, {there:.2f} s at {commit}; median ratio {ratio:.2f}")

    start = start_up(str(PROJECT_DIR))
    with WorkerProcesses(workers) as pool:
        load = [fit.dataset], [path_of(fit.data_dir)], [fit.data_digest]
        list(pool.map(cached_dataset, *(argument * workers for argument in load)))
        began = time.perf_counter()
        outcomes = list(pool.map(run_epoch, [fit] * workers, [1] * workers, [None] * workers))
        epoch = time.perf_counter() - began
        trips = []
        for _ in range(20):
            began = time.perf_counter()
            list(pool.map(there_and_back, [outcomes[0][0]] * workers))
            trips.append(time.perf_counter() - began)
    rounds = fit.epochs * -(-(folds + 1) // workers)  # of `workers` epochs side by side
    full, trip = rounds * epoch, statistics.median(trips)
    print(f"{workers} workers × {fit.threads} threads, {folds} folds + 1, {fit.epochs} epochs")
    print(f"start of all workers, imports and data set   {start:8.2f} s, once")
    print(f"states there and back, all workers at once   {trip:8.3f} s, {rounds} times (median of 20)")
    print(f"an epoch of {workers} final fits side by side       {epoch:8.2f} s, so about {full:.0f} s a full run")
    print(f"workers cost                                 {(start + rounds * trip) / full:8.2%} of a full run")


if __name__ == "__main__":
    main()
