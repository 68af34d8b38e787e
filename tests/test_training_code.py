"""Edits of the training code: each is another run, and all processes of a run train with the same code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, REPOSITORY, SMALL, Configure, make_fit, run_dirs, slow, wait_for, workers_of
from torch import Tensor, nn

import main_tutorial
import train_utils
from experiment.errors import ConfigurationError
from experiment.executors import WorkerProcesses
from experiment.prepare import prepare
from experiment.resources import Resources
from experiment.settings import TrainingConfig
from experiment.training import _to_number
from models import NeuralNetwork
from train_utils import CodeChangedError, code_digest, code_digests, run_epoch

SMOOTHING = 0.1


def changed_names(before: dict[str, str]) -> list[str]:
    after = code_digests()
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def smooth_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def test_a_replaced_function_changes_its_digest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digests()
    monkeypatch.setattr(train_utils, "make_optimizer", lambda model, rate: torch.optim.SGD(model.parameters(), rate))
    assert changed_names(before) == ["train_utils.make_optimizer"]


def test_a_constant_that_a_replaced_function_uses_changes_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_utils, "compute_accuracy", smooth_loss)
    before = code_digests()
    monkeypatch.setattr(sys.modules[__name__], "SMOOTHING", 0.2)
    assert changed_names(before) == ["train_utils.compute_accuracy"]


@pytest.mark.parametrize("value", [0.9, None, (0.9, 0.999), [1, 2], {"beta": 0.9}, {"a", "b"}])
def test_a_constant_of_any_type_has_a_digest(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digests()
    monkeypatch.setattr(train_utils, "BETAS", value, raising=False)
    assert code_digests().keys() - before.keys() == {"train_utils.BETAS"}


def test_digests_are_the_same_in_every_process() -> None:
    code = "import train_utils; train_utils.NAMES = {'a', 'b', 'c', 'd'}; print(train_utils.code_digest())"
    digests = set()
    for seed in "12":
        command = [sys.executable, "-c", code]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        digests.add(subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=True).stdout)
    assert len(digests) == 1


def test_a_replaced_method_changes_the_digest_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digests()
    monkeypatch.setattr(train_utils.Batches, "__len__", lambda self: 1)
    assert changed_names(before) == ["data_utils.Batches", "train_utils.Batches"]


def digests_of_edited_copy(folder: Path, edit: Callable[[Path], None]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of a copy of the files that workers import, before and after an edit."""
    for name in ("train_utils.py", "data_utils.py", "data_files.py"):
        shutil.copy(REPOSITORY / name, folder)
    code = "import json, train_utils; print(json.dumps(train_utils.code_digests()))"
    command = [sys.executable, "-c", code]
    before = json.loads(subprocess.check_output(command, cwd=folder))
    edit(folder)
    return before, json.loads(subprocess.check_output(command, cwd=folder))


def replace_in(file: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / file).read_text()
        assert old in content
        (folder / file).write_text(content.replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (
            replace_in("train_utils.py", "loss_fn = nn.CrossEntropyLoss()", "loss_fn = nn.NLLLoss()"),
            "run_epoch",
        ),
        (
            replace_in("train_utils.py", "lr=learning_rate,", "lr=learning_rate, weight_decay=0.01,"),
            "make_optimizer",
        ),
        *slow(
            (replace_in("data_utils.py", "< 0.5", "< 0.4"), "Batches"),
            (
                replace_in("train_utils.py", "EVALUATION_BATCH_SIZE = 256", "EVALUATION_BATCH_SIZE = 128"),
                "EVALUATION_BATCH_SIZE",
            ),
        ),
    ],
)
def test_an_edited_file_changes_the_digest_of_what_was_edited(
    edit: Callable[[Path], None], changed: str, tmp_path: Path
) -> None:
    before, after = digests_of_edited_copy(tmp_path, edit)
    assert {name.partition(".")[2] for name in before if before[name] != after[name]} == {changed}


LOSSES = """
import torch

def smooth(logits, labels, reduction="mean", reduce=torch.mean):
    return reduce(add(logits)) if reduction in {"mean", "average", "sum"} else logits

def add(logits):
    return logits + 1
"""


@pytest.mark.parametrize(
    ("line", "old", "new"),
    [
        ("LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)", "0.1", "0.2"),
        ("WEIGHTS: Tensor = torch.tensor([1.0, 2.0])", "2.0", "3.0"),
        ("import losses", "+ 1", "+ 2"),
        ("from losses import smooth", "+ 1", "+ 2"),
        ("from losses import smooth", "=torch.mean", "=torch.sum"),
    ],
)
def test_an_object_or_a_module_of_the_users_has_a_digest(line: str, old: str, new: str, tmp_path: Path) -> None:
    def write(content: str, losses: str) -> None:
        (tmp_path / "train_utils.py").write_text(f"{(REPOSITORY / 'train_utils.py').read_text()}\n{content}\n")
        (tmp_path / "losses.py").write_text(losses)

    write(line, LOSSES)
    shutil.copy(REPOSITORY / "data_utils.py", tmp_path)
    shutil.copy(REPOSITORY / "data_files.py", tmp_path)
    digests = []
    for seed in "123":  # in the third process, the line or the module is another
        if seed == "3":
            write(line.replace(old, new), LOSSES.replace(old, new))
        command = [sys.executable, "-B", "-c", "import train_utils; print(train_utils.code_digest())"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        digests.append(subprocess.check_output(command, cwd=tmp_path, env=environment))
    assert digests[0] == digests[1] != digests[2]


def reformat(folder: Path) -> None:
    content = (folder / "train_utils.py").read_text()
    content = content.replace("# averaged at the end", "# summed later").replace(
        '"""Train a model for one epoch.', '"""Learn.'
    )
    content = content.replace("    model.train()\n", "\n\n    model.train(\n    )  # a comment\n")
    (folder / "train_utils.py").write_text(f"# a line\n\n{content}")


def test_comments_docstrings_and_formatting_change_no_digest(tmp_path: Path) -> None:
    before, after = digests_of_edited_copy(tmp_path, reformat)
    assert before == after


def test_run_epoch_refuses_to_train_with_other_code() -> None:
    with pytest.raises(CodeChangedError, match=r"^train_utils\.py was edited during the run"):
        run_epoch(replace(make_fit(), code_digest=code_digest() + "0"), 1, None)


def small_config(**constants: Any) -> TrainingConfig:
    return TrainingConfig.from_constants(vars(main_tutorial) | SMALL | {"DATA_DIR": DATA_DIR} | constants)


def test_a_function_that_the_workers_do_not_have_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_utils, "make_optimizer", lambda model, rate: torch.optim.SGD(model.parameters(), rate))
    with WorkerProcesses(1) as pool, pytest.raises(ConfigurationError, match=r"train_utils\.make_optimizer in this"):
        prepare(NeuralNetwork, small_config(), pool)


def test_a_replaced_optimizer_trains_and_is_named_in_the_verdict(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = configure(main_tutorial, EPOCHS=1)
    first = script.main()
    monkeypatch.setattr(train_utils, "make_optimizer", lambda model, rate: torch.optim.SGD(model.parameters(), rate))
    second = script.main()
    assert second.final.loss > first.final.loss
    assert "training code: make_optimizer edited" in capsys.readouterr().out


def test_a_replaced_loss_is_used_in_training_but_not_in_evaluation(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = configure(main_tutorial, EPOCHS=1).main()
    train_loop = train_utils.train_loop

    def train_with_smoothing(dataloader: Any, model: Any, _loss_fn: Any, *others: Any) -> Any:
        return train_loop(dataloader, model, smooth_loss, *others)

    monkeypatch.setattr(train_utils, "train_loop", train_with_smoothing)
    smooth = configure(main_tutorial, EPOCHS=1).main()
    # Smoothing raises the training loss; the plain validation loss stays comparable.
    assert smooth.folds[0].history[0]["train/loss"] > plain.folds[0].history[0]["train/loss"] + 0.05
    assert smooth.folds[0].loss == pytest.approx(plain.folds[0].loss, abs=0.2)


@pytest.mark.slow
def test_a_file_that_is_edited_while_the_run_is_on_ends_it_with_one_line(tmp_path: Path) -> None:
    shutil.copytree(
        REPOSITORY,
        tmp_path / "copy",
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "wandb", ".mutants"),
    )
    options = ["--dataset=Digits", "--folds=2", "--epochs=200", "--wandb-mode=disabled", "--workers=2"]
    process = subprocess.Popen(
        [sys.executable, "main_tutorial.py", *options, f"--data-dir={DATA_DIR}"],
        cwd=tmp_path / "copy",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list((tmp_path / "copy").glob("runs/*/f*.pt")), process)
    replace_in("train_utils.py", "lr=learning_rate,", "lr=learning_rate, weight_decay=0.01,")(tmp_path / "copy")
    workers_of(process)[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "The run failed: train_utils.py was edited during the run" in errors
    assert list((tmp_path / "copy").glob("runs/*/f*.pt")), "finished epochs are kept"


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), True])
def test_a_metric_of_any_numeric_type_becomes_a_float(value: Any) -> None:
    number = _to_number("my/metric", value)
    assert type(number) is float and number == float(value)


def test_a_metric_of_the_users_own_is_stored_and_shown(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    add_metric(monkeypatch, torch.tensor([0.5]))
    result = configure(main_tutorial, EPOCHS=1).main()
    stored = json.loads((result.run_dir / "results.json").read_text())["folds"][0]["history"][0]["my/metric"]
    assert stored == 0.5
    report = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col" class="number">my/metric</th>' in report


def add_metric(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    original = train_utils.run_epoch

    def run_epoch_with_metric(*arguments: Any) -> Any:
        state, metrics = original(replace(arguments[0], code_digest=code_digest()), *arguments[1:])
        return state, metrics | {"my/metric": value}

    monkeypatch.setattr(train_utils, "run_epoch", run_epoch_with_metric)


def test_a_metric_that_is_not_a_number_is_named_after_the_first_epoch(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    add_metric(monkeypatch, [1.0, 2.0])
    with pytest.raises(SystemExit) as end:
        configure(main_tutorial).main()
    assert end.value.code == 1
    assert "the metric 'my/metric' as list: a metric must be a single number" in capsys.readouterr().err
    assert not run_dirs(tmp_path)


def test_a_metric_that_is_not_finite_is_stored_as_null(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    add_metric(monkeypatch, float("nan"))
    result = configure(main_tutorial, EPOCHS=1).main()
    assert json.loads((result.run_dir / "results.json").read_text())["final"]["history"][0]["my/metric"] is None


@pytest.mark.parametrize("name", ["train/accuracy", "validation/loss", "evaluation"])
def test_a_missing_metric_is_named_in_one_line(
    name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = train_utils.run_epoch

    def run_epoch_without(*arguments: Any) -> Any:
        state, metrics = original(replace(arguments[0], code_digest=code_digest()), *arguments[1:])
        return state, {each: value for each, value in metrics.items() if each != name}

    monkeypatch.setattr(train_utils, "run_epoch", run_epoch_without)
    with pytest.raises(SystemExit):
        configure(main_tutorial).main()
    assert f"The run failed: run_epoch in train_utils.py did not return '{name}'" in capsys.readouterr().err


def test_a_loss_of_any_numeric_type_in_the_evaluation_is_stored(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_utils.test_loop

    def evaluate(*arguments: Any) -> Any:
        loss, labels, probabilities = original(*arguments)
        return torch.tensor(loss), labels, probabilities

    monkeypatch.setattr(train_utils, "test_loop", evaluate)
    result = configure(main_tutorial, EPOCHS=1).main()
    assert json.loads((result.run_dir / "results.json").read_text())["final"]["loss"] == pytest.approx(
        result.final.loss
    )


class Seeds(NeuralNetwork):
    """Seeds the global generator, as copied code often does, and needs random numbers of its own."""

    def __init__(self) -> None:
        torch.manual_seed(42)
        super().__init__()
        torch.rand(1000)


class Wide(NeuralNetwork):
    """Needs more random numbers while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1000, 100)


def image_order(model_class: type[nn.Module], epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the labels in the order in which an epoch trains on them."""
    seen: list[int] = []
    original = train_utils.train_loop

    def record(dataloader: Any, *others: Any) -> Any:
        batches = list(dataloader)
        seen.extend(label for _, labels in batches for label in labels.tolist())
        return original(batches, *others)

    with monkeypatch.context() as patch:
        patch.setattr(train_utils, "train_loop", record)
        train_utils.run_epoch(replace(make_fit(model_class), code_digest=code_digest()), epoch, None)
    return seen


@pytest.mark.parametrize("model_class", [Seeds, Wide])
def test_the_order_of_the_images_does_not_depend_on_the_network(
    model_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert image_order(model_class, 1, monkeypatch) == image_order(NeuralNetwork, 1, monkeypatch)


def test_a_network_that_seeds_the_generator_sees_another_order_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_order(Seeds, 1, monkeypatch) != image_order(Seeds, 2, monkeypatch)


def pretend_gpu() -> None:
    """Make this process say that it has the device "cuda", though it computes on the CPU with three threads."""
    import experiment.prepare

    experiment.prepare.resolve_resources = lambda config: Resources("cpu", "float32", threads=3, workers=1)


@pytest.mark.slow
def test_device_and_precision_are_resolved_where_the_run_is_trained() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=pretend_gpu) as pool:
        experiment = prepare(NeuralNetwork, small_config(DEVICE="cuda", PRECISION="auto"), pool)
    assert (experiment.resources.threads, experiment.resources.precision) == (3, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_the_training_process_lacks_is_one_line() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(ConfigurationError, match="DEVICE must be a device of the machine that trains, got 'cuda'"):
            prepare(NeuralNetwork, small_config(DEVICE="cuda"), pool)


@pytest.mark.parametrize("variable", slow("OMP_PROC_BIND=true", "OMP_PLACES=cores", "GOMP_CPU_AFFINITY=0"))
def test_a_pinned_process_still_trains_two_fits_at_a_time(variable: str, tmp_path: Path) -> None:
    options = ["--dataset=Digits", "--folds=2", "--epochs=1000", "--wandb-mode=disabled", f"--runs-dir={tmp_path}"]
    command = ["env", variable, sys.executable, str(REPOSITORY / "main_tutorial.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    plan = ""
    while line := process.stdout.readline().strip():
        plan += f" {line}"
    process.kill()
    process.communicate(timeout=30)
    assert "2 at a time" in plan
