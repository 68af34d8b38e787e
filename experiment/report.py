"""The report of a run: report.md."""

from __future__ import annotations

import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_files import PROJECT_DIR
from experiment.identity import HYPERPARAMETERS
from experiment.terminal import duration_line, folds_table, test_table

if TYPE_CHECKING:
    from experiment.prepare import Experiment
    from experiment.results import ExperimentResult

SCRIPTS = ("main_cnn.py", "main_tutorial.py")
CAPTIONS = {
    "learning_curves.png": "Loss (left) and accuracy (right) after each epoch. If the training curve still improves "
    "while the validation curve does not, the network memorises its training images (overfitting).",
    "per_class.png": "F1 score of each class, the worst at the bottom: in each fold and on the test images.",
    "confusion_matrix.png": "Rows are the true classes, columns the predicted classes.",
    "mistakes.png": "The wrong predictions on the test images in which the network was most confident.",
    "labels_to_check.png": "The training images whose label is least probable for the fold that holds them out. Look "
    "whether the label is wrong. predictions.csv has all images: sort by label_doubt.",
    "compare.png": "Differences from the nearest earlier run: in each fold, their mean, and its 95 % confidence "
    "interval. The marker of the mean is filled if the difference is significant.",
}


def report_markdown(
    result: ExperimentResult, experiment: Experiment, comparison_text: str, figure_names: list[str]
) -> str:
    """Return the content of report.md.

    Parameters
    ----------
    result : ExperimentResult
    experiment : Experiment
    comparison_text : str
        How the run compares with an earlier one; "" if there is none.
    figure_names : list of str
        The figures that were saved beside the report.
    """
    model = experiment.model
    parts = [f"# {result.run_dir.name}", _summary(result), *_how_to_repeat(result, model.name)]
    if comparison_text:
        parts += ["## Did it help?", _code_block(comparison_text)]
        parts += [_figure(name) for name in figure_names if name == "compare.png"]
    parts += ["## Results", _code_block(folds_table(result))]
    if result.final:
        parts.append(_code_block(test_table(result.final)))
    parts += [f"- {failure}" for failure in result.failures.values()]
    parts.append(duration_line(result) + ".")
    parts += ["## Epochs", _epochs_table(result)]
    parts += ["## Figures", *[_figure(name) for name in figure_names if name != "compare.png"]]
    parts += [f"## Network: {model.parameters:,} parameters", _code_block(model.printed)]
    parts += ["## Environment", _environment_table(result.environment)]
    parts += ["## Files", _list_of_files(result, model.name)]
    return "\n\n".join(parts) + "\n"


def _summary(result: ExperimentResult) -> str:
    summary = "No final fit."
    if result.final:
        summary = f"Test accuracy **{result.final.accuracy:.4f}**, loss {result.final.loss:.4f}."
    mean = result.cross_validation
    if mean:
        summary += (
            f" Over {len(result.folds)} folds: accuracy {mean['accuracy_mean']:.4f} ± {mean['accuracy_std']:.4f}, "
            f"loss {mean['loss_mean']:.4f} ± {mean['loss_std']:.4f} (± standard deviation)."
        )
    return summary


def _how_to_repeat(result: ExperimentResult, network_name: str) -> list[str]:
    """Return the command with every hyperparameter, because the script may be edited later.

    If no script of this repository trains the network, return the constants instead.
    """
    values = {name: result.config[name] for name in HYPERPARAMETERS}
    values |= {name: result.environment[name] for name in ("device", "precision")}
    values["image_shape"] = tuple(values["image_shape"])
    script = _script_name(network_name)
    if script is None:
        constants = [f"{name.upper()} = {value!r}" for name, value in values.items()]
        return [f"To repeat this run, train {network_name} with these constants:", _code_block("\n".join(constants))]
    values["image_shape"] = "x".join(map(str, values["image_shape"]))
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in values.items()]
    return ["To repeat this run:", _code_block(" ".join(["python", script, *options]))]


def _script_name(network_name: str) -> str | None:
    """Return the running script, or else the script that imports the network; None for the user's own."""
    running = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if running in SCRIPTS:
        return running
    for script in SCRIPTS:
        if _file_contains(PROJECT_DIR / script, f"import {network_name}\n"):
            return script
    return None


def _file_contains(path: Path, line: str) -> bool:
    return path.is_file() and line in path.read_text(encoding="utf-8", errors="replace")


def _epochs_table(result: ExperimentResult) -> str:
    """Return the means over the folds after each epoch, also of metrics that the user added to `run_epoch`."""
    histories = [fold.history for fold in result.folds]
    standard = {"train/loss": "training: loss", "train/accuracy": "accuracy"}
    standard |= {"validation/loss": "validation: loss", "validation/accuracy": "accuracy"}
    recorded = list(histories[0][0]) if histories else []
    own = {name: name for name in recorded if name not in {"epoch", "learning_rate", *standard}}
    columns = standard | own
    lines = [f"| epoch | {' | '.join(columns.values())} |", f"| --- |{' --- |' * len(columns)}"]
    for epochs in zip(*histories, strict=True):
        cells = [f"{epochs[0]['epoch']}"]
        for name in columns:
            cells.append(f"{statistics.fmean(epoch[name] for epoch in epochs):.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _environment_table(environment: dict[str, Any]) -> str:
    lines = ["| what | value |", "| --- | --- |"]
    for name, value in environment.items():
        if name == "seconds" or not value:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        lines.append(f"| {name.replace('_', ' ')} | {value} |")
    return "\n".join(lines)


def _list_of_files(result: ExperimentResult, network_name: str) -> str:
    lines = ["- `results.json`: every metric at full precision; `config.json`: the settings."]
    lines.append(
        "- `predictions.csv`: what is predicted for each training image, out of fold, and for each test image."
    )
    if result.failures:
        lines[-1] += f" It has no rows of {' and '.join(result.failures)}."
    if result.final:
        lines.append("- `model.pt`: the parameters of the final network, for `load_state_dict`.")
        command = _classify_command(result.run_dir, network_name)
        lines.append(f"- `{command}` prints what the final network predicts for a picture of yours.")
    if result.environment["wandb_run_ids"]:
        lines.append(f"- Weights & Biases: the runs of the group `{result.run_dir.name}`.")
    return "\n".join(lines)


def _classify_command(run_dir: Path, network_name: str) -> str:
    command = f"python classify.py picture.png --run {run_dir.name}"
    if run_dir.parent != PROJECT_DIR / "runs":
        command += f" --runs-dir {shlex.quote(str(run_dir.parent))}"
    if not _file_contains(PROJECT_DIR / "models.py", f"class {network_name}("):
        command += f" --network file.py:{network_name}"
    return command


def _figure(name: str) -> str:
    return f"![{name}]({name})\n\n{CAPTIONS[name]}"


def _code_block(text: str) -> str:
    return f"```\n{text}\n```"
