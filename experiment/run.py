"""A whole experiment: K-fold cross-validation, then a final fit and its test; prepared, trained, saved and logged."""

from collections.abc import Callable
from concurrent.futures import Executor

from torch import nn

from comparison.pair import PairComparison, compare_with_nearest
from experiment.errors import RunError, nonfatal
from experiment.executors import make_executor
from experiment.files import relative_to_cwd
from experiment.plots import draw_figures, png_bytes
from experiment.predictions import predictions_csv
from experiment.prepare import Experiment, prepare
from experiment.report import Report, index_at_end
from experiment.results import ExperimentResult, make_result
from experiment.run_directory import RunDirectory
from experiment.settings import TrainingConfig
from experiment.terminal import duration_line, folds_table, print_line, test_table
from experiment.training import train_all
from experiment.wandb_logging import WandbRuns


def run_experiment(
    model_class: Callable[[], nn.Module], config: TrainingConfig, executor: Executor | None = None
) -> ExperimentResult:
    """Cross-validate a network, train it on all training images, test it once; save and log everything.

    Parameters
    ----------
    model_class : callable
        Returns the network, without arguments: its class, a function, a `functools.partial`. The network takes images
        (N, *image_shape) and returns logits (N, C), C at least the number of classes.
    config : TrainingConfig
        A second experiment in another thread of this process waits until the first one has ended.
    executor : concurrent.futures.Executor, optional
        Computes the epochs, for example on a Dask cluster; by default, WORKERS processes of this machine do.

    Returns
    -------
    ExperimentResult

    Raises
    ------
    ConfigurationError
        If the network or a setting cannot be used.
    data_files.DatasetError
        If the data set cannot be loaded.
    RunError
        If a loss is no longer finite (all other fits are finished and saved), worker processes are killed repeatedly,
        or a file cannot be written.
    Exception
        Whatever the network raises.
    """
    with make_executor(config, executor) as pool:
        experiment = prepare(model_class, config, pool)
        with (
            index_at_end(experiment),
            RunDirectory(experiment) as folder,
            Report(experiment, folder, model_class) as report,
            WandbRuns(experiment, folder) as runs,
        ):
            checkpoints = train_all(experiment, pool, folder, runs, report)
            result = make_result(experiment, checkpoints, folder)
            publish(result, experiment, folder, runs, report)
    raise_for_failures(result)
    return result


def publish(
    result: ExperimentResult, experiment: Experiment, folder: RunDirectory, runs: WandbRuns, report: Report
) -> None:
    """Save the figures, the report and results.json, print the tables, and log all of it to W&B."""
    result.environment["wandb_run_ids"] = runs.ids
    figures: dict[str, bytes] = {}
    with nonfatal("the figures"):
        figures = draw_figures(result)
    comparison: PairComparison | str = ""
    with nonfatal("a comparison"):
        comparison = compare_with_nearest(folder.path, result.to_dict(), experiment.identity)
        if not isinstance(comparison, str):
            figures["compare.png"] = png_bytes(comparison.figure())
    for name, content in figures.items():
        folder.save(name, content)
    folder.save("predictions.csv", predictions_csv(result.predictions, experiment.dataset))
    has_report = report.finish(result, comparison, figures)

    print_line(f"\n{folds_table(result)}")
    if result.final:
        print_line(f"\n{test_table(result.final)}")
    print_line(f"\n{duration_line(result)}")
    folder.finish(result.to_dict())  # before W&B, so that a slow upload costs no result
    runs.log_results(result)
    command = runs.upload_command()
    if command:
        print_line(f"\nW&B: upload the runs with\n  {command}")
    if has_report:
        print_line(f"\nReport, with pictures: {relative_to_cwd(folder.path / 'report.html')}")
    if comparison:
        print_line(f"\n{comparison if isinstance(comparison, str) else comparison.text}")


def raise_for_failures(result: ExperimentResult) -> None:
    """Raise a RunError if a fit diverged."""
    if result.failures:
        advice = (
            f"Most likely LEARNING_RATE is too high (it is {result.config['learning_rate']}); otherwise look for a "
            "logarithm, a root or a division in the network."
        )
        raise RunError("\n".join([*result.failures.values(), advice]))
