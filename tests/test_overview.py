"""Several runs compared with a baseline: the text."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import BASE, BETTER, NOISE, PRINTED, make_run

from comparison.overview import overview_of, overview_of_all
from comparison.run_reader import FinishedRun, find_run, read_run, read_runs
from comparison.statistics import holm
from experiment.errors import ConfigurationError

CONVOLUTION = PRINTED.replace("ReLU()", "Conv2d(32, 64, kernel_size=(3, 3), stride=(1, 1), bias=False)")
LONG_NAME = "ConvolutionalNeuralNetwork"
CHANGES: list[dict[str, Any]] = [
    {},
    {"mirror": True},
    {"epochs": 3},
    {"network": {"printed": CONVOLUTION}},
    {"network": {"name": LONG_NAME, "printed": f"{LONG_NAME}()", "parameters": 893546}},
    {"network": {"fingerprint": {"logits": [1.0, 2.0, 3.0], "gradients": [0.25, 1.5]}}},
    {"batch_size": 16, "learning_rate": 0.003, "lr_schedule": "one_cycle", "precision": "bfloat16", "threads": 2},
    {},
    {"torch": "2.15.0+cu130"},
    {"device": "cuda"},
]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


@pytest.fixture
def ten_runs(tmp_path: Path) -> list[FinishedRun]:
    """Return ten runs, the oldest first: the third is much better than the first, the eighth is its repetition."""
    rng = np.random.default_rng(0)
    for number, change in enumerate(CHANGES):
        noise = rng.normal(0, 0.001, 5) if change else np.zeros(5)
        accuracies = BETTER + 0.03 if number == 2 else BASE + noise
        make_run(tmp_path / "runs" / f"{LONG_NAME}-20261126-18{30 + number}07", accuracies, minutes=number, **change)
    return read_runs(tmp_path / "runs")[0][::-1]


def rows_of(text: str) -> list[str]:
    """Return the first line of each row of an overview."""
    return [line for line in text.splitlines() if re.match(r"[* ] \d\d \w{3} +\d\.\d{4} ", line)]


def test_overview_of_hand_made_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs_dir, linear = tmp_path / "runs", PRINTED.replace("ReLU()", "Identity()")
    make_run(runs_dir / "N-20261126-183000")
    make_run(runs_dir / "N-20261126-183100", BETTER, minutes=1, mirror=True)
    make_run(runs_dir / "N-20261126-183200", NOISE, minutes=2, epochs=3, network={"printed": linear})
    make_run(runs_dir / "N-20261126-183300", BASE + 0.01, minutes=3, learning_rate=0.01)
    make_run(runs_dir / "N-20261126-183400", minutes=64, resumed=True)  # an hour later
    make_run(runs_dir / "renamed", [*NOISE[:3], np.nan, np.nan], minutes=5, batch_size=16)
    assert overview_of_all(Path("runs")).text.splitlines() == [
        "Baseline: runs/N-20261126-183000",
        "  the oldest of 6 comparable runs in runs; FashionMNIST, 5 folds, RNG_SEED 314",
        "",
        "        accuracy      change           p    loss      change           p    took",
        "* 26 Nov  0.9332 +0.0100               –  0.0668 −0.0100               –    42 s",
        "  18:33 LEARNING_RATE 0.001 → 0.01",
        "  26 Nov  0.9322 +0.0090 ± 0.0050 <0.001  0.0678 −0.0090 ± 0.0048 <0.001    42 s",
        "  18:31 MIRROR False → True: accuracy better, loss better",
        "  26 Nov  0.9234 +0.0002 ± 0.0046      1  0.0766 −0.0002 ± 0.0046      1    42 s",
        "  18:32 EPOCHS 10 → 3, ReLU() → Identity()",
        "  26 Nov  0.9232                          0.0768                            42 s",
        "  18:30 baseline",
        "  26 Nov  0.9232    identical             0.0768    identical              >42 s",
        "  18:34 repetition",
        "  26 Nov  0.9217 +0.0000 ± 0.0052      1  0.0783 +0.0000 ± 0.0052      1    42 s",
        "  runs/renamed: BATCH_SIZE 64 → 16 (fold-4, fold-5 diverged)",
        "",
        "* marks the best accuracy. ± is half the width of the 95 % confidence interval.",
        "p and ± are corrected for 6 comparisons (Holm). Noise estimated on 4 runs with",
        "these folds. A run with diverged folds is never marked. > is the time since a",
        "run was resumed.",
    ]


def test_overview_of_unequal_classes_shows_macro_f1_and_corrects_for_it(tmp_path: Path) -> None:
    unequal: dict[str, Any] = {"class_sizes": {"Coat": 90, "Shirt": 30}}
    make_run(tmp_path / "N-20261126-183000", **unequal)
    make_run(tmp_path / "N-20261126-183100", BETTER, minutes=1, mirror=True, **unequal)
    overview = overview_of_all(tmp_path)
    comparison = overview.rows[0].comparison
    assert comparison is not None
    for difference in comparison.metrics.values():
        assert difference.corrected_p == pytest.approx(3 * difference.p)  # all three p are equal
    lines = overview.text.splitlines()
    first = lines.index("") + 1
    assert lines[first : first + 8] == [
        "        accuracy      change           p    loss      change           p    took",
        "        macro F1      change           p",
        "* 26 Nov  0.9322 +0.0090 ± 0.0042 0.0032  0.0678 −0.0090 ± 0.0037 0.0032    42 s",
        "          0.8322 +0.0090 ± 0.0029 0.0032",
        "  18:31 MIRROR False → True: accuracy better, loss better, macro F1 better",
        "  26 Nov  0.9232                          0.0768                            42 s",
        "          0.8232",
        "  18:30 baseline",
    ]
    assert "p and ± are corrected for 3 comparisons (Holm)." in " ".join(lines)


def test_overview_without_a_choice_shows_what_the_runs_have_in_common(before: Path) -> None:
    after = make_run(before.parent / "after", BETTER, mirror=True)
    lines = overview_of(read_run(before), [read_run(after)], before.parent).text.splitlines()
    assert lines[1] == "  FashionMNIST, 5 folds, RNG_SEED 314"


def test_rows_are_sorted_by_accuracy_and_the_best_is_marked(ten_runs: list[FinishedRun]) -> None:
    rows = rows_of(overview_of(ten_runs[0], ten_runs[1:], ten_runs[0].path.parent).text)
    accuracies = [float(row[8:16]) for row in rows]
    assert len(rows) == 10 and accuracies == sorted(accuracies, reverse=True)
    assert [row[0] for row in rows] == ["*", *[" "] * 9]


def test_p_is_corrected_for_all_comparisons_but_the_repetition(ten_runs: list[FinishedRun]) -> None:
    overview = overview_of(ten_runs[0], ten_runs[1:], ten_runs[0].path.parent)
    best = overview.rows[0]
    assert best.comparison is not None
    p_values = []
    for comparison in (row.comparison for row in overview.rows if row.comparison and not row.comparison.is_identical):
        p_values += [difference.p for difference in comparison.metrics.values()]
    assert len(p_values) == 16
    assert best.comparison.metrics["accuracy"].corrected_p == pytest.approx(16 * min(p_values), rel=0.1)
    assert "p and ± are corrected for 16 comparisons (Holm)" in overview.text.replace("\n", " ")
    assert rows_of(overview.text)[0].split()[4:8:3] == ["+0.0390", "<0.001"]


def test_accuracy_and_loss_are_corrected_together(ten_runs: list[FinishedRun]) -> None:
    overview = overview_of(ten_runs[0], ten_runs[1:], ten_runs[0].path.parent)
    differences = [each for row in overview.rows if row.comparison for each in row.comparison.metrics.values()]
    corrected = holm([each.p if each.has_interval else np.nan for each in differences])
    np.testing.assert_array_equal([each.corrected_p for each in differences], corrected)


def test_noise_is_estimated_on_runs_that_are_not_shown(ten_runs: list[FinishedRun]) -> None:
    runs_dir = ten_runs[0].path.parent
    alone = overview_of(ten_runs[0], ten_runs[1:2], runs_dir)
    with_history = overview_of(ten_runs[0], ten_runs[1:2], runs_dir, ten_runs)
    assert "Noise estimated on the 2 runs of each comparison." in " ".join(alone.text.split())
    assert "Noise estimated on 9 runs with these folds." in " ".join(with_history.text.split())
    assert len(with_history.rows) == 2


def test_run_whose_hardest_fold_diverged_is_not_the_best(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000", BASE, minutes=0)
    make_run(tmp_path / "N-20261126-183100", [*(BASE[:2] - 0.0005), np.nan, *(BASE[3:] - 0.001)], minutes=1, epochs=3)
    text = overview_of_all(tmp_path).text
    assert np.mean(np.delete(BASE, 2)) - 0.0008 > BASE.mean()  # the mean over its own folds is the highest
    rows = text[text.index("\n\n") :].splitlines()[3:7]
    assert rows[0].startswith("* ") and "18:30 baseline" in rows[1]
    assert rows[2].startswith("  26 Nov") and "−0.0007" in rows[2]
    assert "(fold-3 diverged)" in rows[3]


def test_better_run_with_diverged_folds_is_above_but_not_marked(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000")
    make_run(tmp_path / "N-20261126-183100", [*BETTER[:4], np.nan], minutes=1, epochs=3)
    assert [row[0] for row in rows_of(overview_of_all(tmp_path).text)] == [" ", "*"]


def make_many(runs_dir: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        accuracies = BASE + rng.normal(0, 0.001, 5)
        make_run(runs_dir / f"N-20261126-19{number:02}00", accuracies, minutes=30 + number, epochs=1 + number)


def test_newest_twenty_runs_are_shown_against_the_oldest_of_them(tmp_path: Path) -> None:
    make_many(tmp_path, 25)
    overview = overview_of_all(tmp_path)
    assert len(overview.rows) == 20 and overview.baseline.path.name == "N-20261126-190500"
    text = " ".join(overview.text.split())
    assert "the oldest of the 20 newest comparable runs" in text
    assert "Not shown: 5 runs before these (--last 25 shows all)." in text
    assert "corrected for 38 comparisons" in text and "Noise estimated on 25 runs" in text
    assert len(overview_of_all(tmp_path, last=25).rows) == 25 and "before" not in overview_of_all(tmp_path, 25).text


@pytest.mark.parametrize(("baseline", "rows"), [("19:00", 4), ("19:24", 3)])
def test_baseline_can_be_named(baseline: str, rows: int, tmp_path: Path) -> None:
    make_many(tmp_path, 25)
    overview = overview_of_all(tmp_path, last=3, chosen=find_run(baseline, tmp_path))
    assert f"{overview.baseline.created:%H:%M}" == baseline and len(overview.rows) == rows
    shown = {row.run.path.name for row in overview.rows}
    assert shown >= {"N-20261126-192400", "N-20261126-192300", "N-20261126-192200"}
    assert "Noise estimated on 25 runs" in overview.text.replace("\n", " ")


def test_every_name_of_the_table_is_found(tmp_path: Path) -> None:
    names = ["N-20261126-183000", "N-20261126-183059", "N-20261127-200000", "M-20261128-200000", "renamed"]
    names += ["N-20261126-210000", "N-20261126-210000-2"]
    for number, name in enumerate(names):
        make_run(tmp_path / name, NOISE, minutes=number, resumed=True, epochs=1 + number)
    overview = overview_of_all(tmp_path)
    text = " ".join(overview.text.split())
    for row in overview.rows:
        assert find_run(row.name, tmp_path) == row.run and f" {row.name}" in text
    assert {"18:30:00", "18:30:59"} <= {row.name for row in overview.rows}


def test_resumed_run_has_the_time_in_its_folders_name(tmp_path: Path) -> None:
    make_run(tmp_path / "N-20261126-183000")
    make_run(tmp_path / "N-20261125-120000", NOISE, minutes=600, resumed=True, epochs=3)
    lines = overview_of_all(tmp_path).text.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("  12:00 EPOCHS")]
    assert lines[place - 1][2:8] == "25 Nov"
    assert find_run("12:00", tmp_path).path.name == "N-20261125-120000"


def test_what_few_rows_share_comes_first(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epochs": 3, "batch_size": 32}
    paths = [
        make_run(tmp_path / "first"),
        make_run(tmp_path / "second", NOISE, **shared),
        make_run(tmp_path / "third", BETTER, **shared, learning_rate=0.01),
    ]
    first, *others = [read_run(path) for path in paths]
    text = " ".join(overview_of(first, others, tmp_path).text.split())
    assert "second: EPOCHS 10 → 3, BATCH_SIZE 64 → 32" in text
    assert "third: LEARNING_RATE 0.001 → 0.01, EPOCHS 10 → 3, BATCH_SIZE 64 → 32" in text


def test_changes_that_do_not_fit_are_counted(before: Path) -> None:
    layers = PRINTED.replace("ReLU()", "Tanh()").replace("Linear", "LazyLinear")
    after = make_run(before.parent / "N-20261126-183100", NOISE, **CHANGES[6], mirror=True, network={"printed": layers})
    lines = overview_of(read_run(before), [read_run(after)], before.parent).text.splitlines()
    assert lines[5:7] == [
        "  18:31 BATCH_SIZE 64 → 16, LEARNING_RATE 0.001 → 0.003, LR_SCHEDULE constant →",
        "        one_cycle, MIRROR False → True and 5 more",
    ]


def test_lines_have_at_most_80_columns(ten_runs: list[FinishedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ten_runs[0].path.parents[1])
    choice, notes = "the oldest of 10 runs in runs", ["a note " * 20]
    text = overview_of(ten_runs[0], ten_runs[1:], ten_runs[0].path.parent, choice=choice, notes=notes).text
    assert max(map(len, text.splitlines())) <= 80


def test_very_large_loss_leaves_the_columns_apart(before: Path, tmp_path: Path) -> None:
    diverged = read_run(make_run(tmp_path / "after", NOISE - 0.8, losses=[0, 1000, 2000, 3000, 4000]))
    assert " 2000.0 +1999.9 ± 2944.9   0.13    42 s\n" in overview_of(read_run(before), [diverged], before.parent).text


def test_runs_that_are_not_comparable_are_refused_one_line_each(before: Path, tmp_path: Path) -> None:
    others = [read_run(make_run(tmp_path / name, images=name)) for name in ("one", "two")]
    with pytest.raises(ConfigurationError, match="^[^\n]*one cannot be compared[^\n]*\n[^\n]*two cannot be [^\n]*$"):
        overview_of(read_run(before), others, before.parent)


def test_two_folds_are_enough(tmp_path: Path) -> None:
    make_run(tmp_path / "old", [*BASE[:2], np.nan, np.nan, np.nan])
    make_run(tmp_path / "new", minutes=1)
    text = overview_of_all(tmp_path).text
    assert len(rows_of(text)) == 2 and "Not shown" not in text


def test_runs_that_are_not_shown_are_counted(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(before.parents[1])
    make_run(before.parent / "after", BETTER, minutes=9)
    for number, dataset in enumerate(("KMNIST", "MNIST", "KMNIST")):
        make_run(before.parent / f"{number}", minutes=number, images="77", dataset=dataset)
        (make_run(before.parent / f"unfinished-{number}") / "results.json").unlink()
    make_run(before.parent / "diverged", [0.9, *[np.nan] * 4], minutes=10)
    notes = " ".join(overview_of_all(Path("runs")).text.split()).partition(" Not shown: ")[2].split(" Not shown: ")
    assert notes == [
        "3 runs, for example: runs/unfinished-0 is unfinished: it has no results.json.",
        "1 run in which fewer than two folds have a result.",
        "runs whose folds consist of different images (2 on KMNIST, 1 on MNIST). Name runs to compare them.",
    ]


def test_folder_without_comparable_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (make_run(tmp_path / "runs" / "unfinished") / "results.json").unlink()
    note = "Not shown: 1 run, for example: runs/unfinished is unfinished: it has no results.json."
    with pytest.raises(ConfigurationError) as error:
        overview_of_all(Path("runs"))
    assert str(error.value).splitlines() == ["There is no finished run in runs.", note]
    make_run(tmp_path / "runs" / "only")
    with pytest.raises(ConfigurationError) as error:
        overview_of_all(Path("runs"))
    assert str(error.value).splitlines() == ["There is nothing in runs to compare runs/only with.", note]


def test_runs_on_other_pictures_of_the_same_folder_are_named_with_what_differs(before: Path) -> None:
    sizes = {"cat": 20, "dog": 20}
    for number, minutes in enumerate((1, 2)):
        make_run(before.parent / f"{number}", minutes=minutes, images="77", class_sizes=sizes)
    for path in (before, before.parent / "again"):
        shutil.rmtree(path, ignore_errors=True)
        make_run(path, minutes=5, class_sizes=sizes | {"cat": 32})
    text = " ".join(overview_of_all(before.parent).text.split())
    assert "different images (2 on FashionMNIST (-12 training images: cat 32 → 20))" in text
