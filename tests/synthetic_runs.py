"""Run directories as finished runs leave them, written without any training."""

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

PRINTED = """Network(
  (stack): Sequential(
    (0): Linear(in_features=784, out_features=64, bias=True)
    (1): ReLU()
    (2): Linear(in_features=64, out_features=10, bias=True)
  )
)"""
NETWORK: dict[str, Any] = {
    "name": "Network",
    "printed": PRINTED,
    "parameters": 50890,
    "fingerprint": {"logits": [0.5, -1.25, 2.0], "gradients": [0.25, 1.5]},
}
IDENTITY: dict[str, Any] = {
    "dataset": "FashionMNIST",
    "folds": 5,
    "epochs": 10,
    "batch_size": 64,
    "learning_rate": 0.001,
    "lr_schedule": "constant",
    "mirror": False,
    "rng_seed": 314,
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "torch": "2.14.1",
    "images": "3fa4",
    "code": {"train_utils.run_epoch": "a1", "train_utils.train_loop": "b2"},
    "network": NETWORK,
}
BASE = np.array([0.921, 0.925, 0.919, 0.928, 0.923])
BETTER = BASE + [0.008, 0.011, 0.007, 0.010, 0.009]
NOISE = BASE + [0.002, -0.003, 0.001, -0.002, 0.003]
STARTED = datetime(2026, 11, 26, 18, 30)


def make_results(
    accuracies: Iterable[float] = BASE,
    losses: Iterable[float] | None = None,
    minutes: float = 0,
    classes: Iterable[str] = ("Coat", "Shirt"),
    resumed: bool = False,
) -> dict[str, Any]:
    """Return the content of results.json of a run that started `minutes` after STARTED.

    A fold whose accuracy is NaN has diverged. By default the losses are one minus the accuracies, and the F1 score of
    the n-th class changes n times as much as the accuracy; macro F1 is the accuracy minus 0.1.
    """
    accuracies = [float(accuracy) for accuracy in accuracies]
    losses = [1 - accuracy for accuracy in accuracies] if losses is None else [float(loss) for loss in losses]
    folds, failures = [], {}
    for number, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True), start=1):
        if not np.isfinite(accuracy):
            failures[f"fold-{number}"] = f"fold-{number} diverged in epoch 1."
            continue
        report: dict[str, Any] = {}
        for place, name in enumerate(classes, start=1):
            report[name] = {"precision": 0.5, "recall": 0.5, "f1-score": 0.9 + place * (accuracy - 0.9), "support": 9.0}
        macro_f1 = {"f1-score": accuracy - 0.1}
        report |= {"accuracy": accuracy, "macro avg": macro_f1, "weighted avg": {"f1-score": 0.5}}
        history = [{"epoch": epoch, "train/loss": loss, "validation/loss": loss} for epoch in range(1, 11)]
        folds.append(
            {"name": f"fold-{number}", "accuracy": accuracy, "loss": loss, "report": report, "history": history}
        )
    environment = {
        "started": (STARTED + timedelta(minutes=minutes)).isoformat(),
        "seconds": 42.0,
        "resumed": resumed,
        "machine": "any",
        "versions": {},
    }
    final = {"accuracy": 0.9, "loss": 0.3}
    return {"config": {}, "folds": folds, "final": final, "failures": failures, "environment": environment}


def make_run(
    path: Path, accuracies: Iterable[float] = BASE, network: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Write a finished run; `options` are arguments of `make_results` or parts of the identity."""
    of_results = {name: options.pop(name) for name in ("losses", "minutes", "classes", "resumed") if name in options}
    path.mkdir(parents=True)
    accuracies = list(accuracies)
    write_json(path / "results.json", make_results(accuracies, **of_results))
    identity = make_identity(network, **{"folds": len(accuracies)} | options)
    write_json(path / "config.json", {"identity": identity, "wandb_id": "x"})
    return path


def make_identity(network: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return "identity" of config.json, with some of it changed."""
    return IDENTITY | {"network": NETWORK | (network or {})} | changes


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
