"""The experiment: K-fold cross-validation, then a final fit and its test; tried, trained, judged and published."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from torch import nn

from data_utils import load_dataset, path_of, pixel_statistics
from experiment.compare import against_nearest
from experiment.console import final_text, folds_text, say, show_pictures, time_text, wrap
from experiment.errors import RunError, beside_the_run
from experiment.figures import draw_figures, png_of, report_text
from experiment.network import Network, check_trial, start_trial, try_network
from experiment.plan import describe_machine, identity_of, make_fits, make_plan, sentence_on
from experiment.results import ExperimentResult, make_result
from experiment.run_directory import RunDirectory, path_from_here, tensors_as_bytes
from experiment.settings import TrainingConfig
from experiment.training import open_pool, train_all
from experiment.wandb_key import choose_mode
from experiment.wandb_runs import WandbRuns
from experiment.wandb_sweep import take_sweep


def run_experiment(
    model_class: Callable[[], nn.Module], config: TrainingConfig, executor: Executor | None = None
) -> ExperimentResult:
    """Cross-validate a network, train it on all the training images, test it once; log and save all of it.

    Parameters
    ----------
    model_class : callable
        Returns the network, without arguments: its class, a function, a `functools.partial`. The network takes images
        (N, 1, 28, 28) and returns logits (N, 10).
    config : TrainingConfig
    executor : concurrent.futures.Executor, optional
        Where the epochs are computed, such as a Dask cluster's; by default by WORKERS processes of this machine.

    Returns
    -------
    ExperimentResult

    Raises
    ------
    ConfigurationError
        If the network returns no logits, cannot be sent or is another one where it would be trained, a class has too
        few images for that many folds, or the W&B key is wrong.
    data_utils.DatasetError
        If the data set cannot be had or is damaged.
    RunError
        If a loss is no longer finite (all other fits are done and saved), workers keep dying, or the disk is full.
    """
    started = time.monotonic()
    sweep = take_sweep()
    plan = make_plan(config, executor)
    network = try_network(model_class, plan)
    say(wrap(sentence_on(plan, config, network.name, network.weights)))

    with open_pool(plan, executor) as pool:
        trial = start_trial(network, plan, pool)  # which goes on while this process reads and imports
        mode, key = choose_mode(config.wandb_mode, path_of(config.wandb_api_key_path), sweep is not None)
        dataset = load_dataset(config.dataset, path_of(config.data_dir))
        fits = make_fits(plan, network.model_class, config, dataset)
        check_trial(network, trial)

        environment = describe_machine(plan)
        identity = identity_of(plan, config, fits) | {"network": network.to_dict()}
        mean, std = pixel_statistics(dataset.train_images)
        pictures = {"mean": mean, "std": std, "class_names": dataset.class_names}  # what `experiment.classify` needs
        asked = config.to_dict() | {"pictures": pictures}
        logged = config.to_dict() | {"model": network.printed, "environment": environment}
        name = f"{network.name}-{config.dataset}"
        with (
            RunDirectory(path_of(config.runs_dir), name, asked, identity, config.resume) as folder,
            WandbRuns(mode, key, logged, [fit.name for fit in fits], folder, sweep) as runs,
        ):
            checkpoints = train_all(fits, plan, pool, folder, runs)
            environment |= {
                "seconds": time.monotonic() - started,
                "resumed": folder.resumed,
                "wandb_run_ids": runs.ids,
            }
            result = make_result(config.to_dict(), dataset, checkpoints, environment, folder.path)
            if result.final:
                folder.save("model.pt", tensors_as_bytes(checkpoints["final"]["state"]["model"]))
            publish(result, network, identity, folder, runs)
            folder.finish(result.to_dict())
    if result.failures:
        likely = (
            f"Most likely LEARNING_RATE is too high (it is {config.learning_rate}); else look for a logarithm, a root "
            "or a division in the network."
        )
        raise RunError("\n".join([*result.failures.values(), likely]))
    if sweep and runs.mode != "online":
        raise RunError("The sweep did not get this trial, since W&B's server failed.")
    return result


def publish(
    result: ExperimentResult,
    network: Network,
    identity: dict[str, Any],
    folder: RunDirectory,
    runs: WandbRuns,
) -> None:
    """Tell what came out: tables in the terminal, pictures and report.md in the run's folder, all of it in W&B."""
    figures: dict[str, bytes] = {}
    with beside_the_run("the figures"):
        figures = draw_figures(result)
    comparison = ""
    with beside_the_run("a comparison"):
        nearest = against_nearest(folder.path, result.to_dict(), identity)
        if nearest:
            comparison = nearest.text
            figures["compare.png"] = png_of(nearest.figure())
    for file, content in figures.items():
        folder.save(file, content)
    report = ""
    with beside_the_run("report.md"):
        report = report_text(result, network.to_dict(), comparison, list(figures))
    if report:
        folder.save("report.md", report.encode(errors="replace"))

    say(f"\n{folds_text(result)}")
    if result.final:
        say(f"\n{final_text(result.final)}")
    say(f"\n{time_text(result)}")
    runs.log_results(result)
    command = runs.upload_command()
    if command:
        say(f"\nW&B: upload the runs with\n  {command}")
    say(f"\nReport, with pictures: {path_from_here(folder.path / 'report.md')}")
    if comparison:
        say(f"\n{comparison}")
    with beside_the_run("the pictures under the cell"):
        show_pictures(folder.path / file for file in figures)
