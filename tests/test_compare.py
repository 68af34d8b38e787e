"""Did it help? Pairs of runs made for the purpose, and two real ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Configure, start_python
from PIL import Image
from scipy.stats import t, ttest_rel

import main_tutorial
from experiment.compare import (
    compare_with_newest,
    draw,
    finished_runs,
    main,
    paired_difference,
    read_run,
    reason_against,
    text_of,
)
from experiment.errors import ConfigurationError

PRINTED = "Network(\n  (stack): Sequential(\n    (0): Linear(4, 8)\n    (1): ReLU()\n    (2): Linear(8, 2)\n  )\n)"
SOURCE = "class Network(nn.Module):\n    def forward(self, images):\n\n        return self.stack(images)\n"
IDENTITY: dict[str, Any] = {
    "dataset": "FashionMNIST",
    "folds": 5,
    "epochs": 10,
    "lr_schedule": "constant",
    "rng_seed": 314,
    "data": "3fa4",
    "network": PRINTED,
    "source": SOURCE,
    "digest": "any",
}
BASE = np.array([0.921, 0.925, 0.919, 0.928, 0.923])
BETTER = BASE + [0.008, 0.011, 0.007, 0.010, 0.009]
NOISE = BASE + [0.002, -0.003, 0.001, -0.002, 0.003]
DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "7",
    '"folds"',
    "{}",
    '{"folds": 3}',
    '{"folds": [{}, 1]}',
    "[" * 10**5,
    "\0",
    "\udce4",
]


def make_run(path: Path, accuracies: Any = BASE, finished: float = 0, **identity: Any) -> Path:
    """Write what a finished run leaves that took those accuracies; NaN stands for a fold that diverged."""
    path.mkdir(parents=True)
    folds = [
        {
            "name": f"fold-{number}",
            "accuracy": accuracy,
            "loss": 1 - accuracy,
            "report": {
                "Coat": {"precision": 0.5, "f1-score": accuracy - 0.1},
                "Shirt": {"precision": 0.5, "f1-score": 2 * accuracy - 1},
                "accuracy": accuracy,
                "macro avg": {"f1-score": 0.5},
            },
            "history": [],
        }
        for number, accuracy in enumerate(map(float, accuracies), start=1)
        if np.isfinite(accuracy)
    ]
    write_json(path / "results.json", {"folds": folds, "final": {"accuracy": 0.9, "loss": 0.3}})
    write_json(path / "config.json", {"identity": IDENTITY | {"folds": len(accuracies)} | identity, "wandb_id": "x"})
    os.utime(path / "results.json", (finished, finished))
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def compared(before: Path, after: Path) -> str:
    return text_of(read_run(before), read_run(after))


def automatic(runs_dir: Path, accuracies: Any = BETTER) -> str:
    """Return what a run that ends now says of those in a folder."""
    path = make_run(runs_dir.parent / "elsewhere" / "now", accuracies)
    results, config = (json.loads((path / name).read_text()) for name in ("results.json", "config.json"))
    return compare_with_newest(runs_dir / "now", results, config["identity"])


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def test_a_repetition_is_said_to_be_the_same_to_the_bit(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after", digest="another")).splitlines()
    assert lines[0].endswith("before") and lines[1:] == ["  the same in every fold, to the bit"]


def test_a_run_that_gains_in_all_folds_is_better(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", BETTER))
    accuracy, loss, f1 = text.splitlines()[1:]
    assert accuracy.split()[:6] == ["accuracy", "0.9232", "→", "0.9322", "+0.0090", "±"]
    assert "better (p = " in accuracy and accuracy.endswith("in 5 of 5 folds")
    assert "better (p = " in loss and loss.endswith("in 5 of 5 folds")
    assert f1 == "  F1, most changed: Shirt +0.018, Coat +0.009"


def test_the_same_runs_the_other_way_round_are_worse(before: Path, tmp_path: Path) -> None:
    text = compared(make_run(tmp_path / "after", BETTER), before)
    assert text.count("worse (p = ") == 2 and "better" not in text


def test_noise_is_no_difference_that_these_folds_can_tell(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", NOISE))
    assert text.count("no difference that these folds can tell (p = ") == 2
    assert "better" not in text and "worse" not in text


def test_only_the_folds_that_both_have_are_compared_and_the_text_says_so(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", [*BETTER[:4], np.nan]))
    assert "over the 4 of 5 folds that both have" in text and "in 4 of 4 folds" in text
    assert f"{BASE[:4].mean():.4f} → {BETTER[:4].mean():.4f}" in text


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400])
def test_a_fold_whose_figures_are_not_finite_has_diverged(figure: str, before: Path, tmp_path: Path) -> None:
    results = (before / "results.json").read_text()
    (before / "results.json").write_text(results.replace(str(BASE[0]), figure, 1))
    assert "over the 4 of 5 folds" in compared(before, make_run(tmp_path / "after", BETTER))


def test_a_run_of_more_folds_than_it_says_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="it does not say what its folds are"):
        read_run(make_run(tmp_path / "run", folds=4))


def test_folds_that_diverged_but_for_one_leave_nothing_to_compare(before: Path, tmp_path: Path) -> None:
    after = read_run(make_run(tmp_path / "after", [0.9, *[np.nan] * 4]))
    assert "fewer than two folds in common" in reason_against(read_run(before), after)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"dataset": "KMNIST", "data": "77"}, "other DATASET (KMNIST, not FashionMNIST)"),
        ({"data": "77"}, "other DATA (77, not 3fa4)"),
        ({"folds": 10}, "other FOLDS (10, not 5)"),
        ({"rng_seed": 1}, "other RNG_SEED (1, not 314)"),
    ],
)
def test_runs_whose_folds_are_other_images_are_refused(
    other: dict[str, Any], reason: str, before: Path, tmp_path: Path
) -> None:
    assert reason in reason_against(read_run(before), read_run(make_run(tmp_path / "after", **other)))


def test_an_unfinished_run_is_refused(before: Path) -> None:
    (before / "results.json").unlink()
    with pytest.raises(ConfigurationError, match="before is unfinished"):
        read_run(before)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "config.json"])
@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:8] or "empty")
def test_a_damaged_file_is_refused_by_name(name: str, content: str, before: Path) -> None:
    (before / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match="results.json or config.json is damaged"):
        read_run(before)


def test_a_renamed_folder_changes_nothing_but_its_name(before: Path, tmp_path: Path) -> None:
    after = make_run(tmp_path / "after", BETTER)
    text = compared(before, after)
    assert compared(before.rename(tmp_path / "runs" / "the one"), after) == text.replace("before", "the one")


def test_a_run_says_how_it_compares_with_the_newest_that_is_comparable(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "z-old", finished=1)
    make_run(tmp_path / "runs" / "a-newer", finished=2)
    make_run(tmp_path / "runs" / "other-seed", finished=3, rng_seed=1)
    assert automatic(tmp_path / "runs").splitlines()[0].endswith("a-newer")


def test_where_no_run_is_comparable_nothing_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "other-seed", rng_seed=1)
    assert automatic(tmp_path / "runs") == ""


def test_whatever_lies_among_the_runs_is_passed_over(before: Path) -> None:
    for number, content in enumerate(DAMAGED):
        for name in ("results.json", "config.json"):
            path = make_run(before.parent / f"{name}-{number}", finished=9)
            (path / name).write_bytes(content.encode(errors="surrogateescape"))
    (before.parent / "folder" / "results.json").mkdir(parents=True)
    (before.parent / "results.json").write_text("{}")
    (before.parent / "loop").symlink_to("loop")
    odd = {"network": "(\n\r\n)", "source": None, "lr_schedule": "\ud800", "epochs": [None]}
    make_run(before.parent / "odd", finished=9, **odd)
    assert [run.path.name for run in finished_runs(before.parent)] == ["odd", "before"]
    assert "better" in automatic(before.parent).encode().decode()


def test_a_folder_whose_name_is_no_text_can_be_compared(tmp_path: Path) -> None:
    before = make_run(tmp_path / "runs" / "br\udcfcder $\\x$")
    after = make_run(tmp_path / "after", BETTER)
    draw(read_run(before), read_run(after)).savefig(os.devnull, format="png")
    assert "br?der" in automatic(tmp_path / "runs").encode().decode()


def test_every_constant_that_differs_is_named(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", BETTER, epochs=3, lr_schedule="cosine", mirror=True))
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["EPOCHS", "10", "→", "3"],
        ["LR_SCHEDULE", "constant", "→", "cosine"],
        ["MIRROR", "False", "→", "True"],
    ]


def test_a_further_layer_is_the_only_line_of_the_network_that_is_shown(before: Path, tmp_path: Path) -> None:
    network = PRINTED.replace("    (2)", "    (2): Dropout(0.5)\n    (3)")
    lines = compared(before, make_run(tmp_path / "after", BETTER, network=network)).splitlines()
    assert lines[1].split() == ["+", "Dropout(0.5)"] and lines[2].startswith("  accuracy")


def test_a_network_that_differs_in_its_source_alone_is_said_to(before: Path, tmp_path: Path) -> None:
    lines = compared(before, make_run(tmp_path / "after", BETTER, source=SOURCE.replace("self", "me"))).splitlines()
    assert lines[1].split() == "network only its source differs".split() and lines[2].startswith("  accuracy")


def make_old(path: Path, source: str = SOURCE, printed: str = PRINTED) -> Path:
    """Write a run of the version whose identity held the source and the printed structure in one."""
    make_run(path)
    content = json.loads((path / "config.json").read_text())
    del content["identity"]["source"]
    content["identity"]["network"] = f"{source}\n{printed}"
    write_json(path / "config.json", content)
    return path


def test_an_earlier_version_that_kept_source_and_structure_in_one_is_the_same_network(tmp_path: Path) -> None:
    text = compared(make_old(tmp_path / "old"), make_run(tmp_path / "after", BETTER))
    assert text.splitlines()[1].startswith("  accuracy")


def test_an_earlier_versions_layers_are_compared(tmp_path: Path) -> None:
    old = make_old(tmp_path / "old", printed=PRINTED.replace("Linear(4, 8)", "Linear(4, 9)"))
    lines = compared(old, make_run(tmp_path / "after", network=PRINTED.replace("9", "8"))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["-", "+"] and "Linear(4, 9)" in lines[1]


def test_two_earlier_runs_whose_source_differs_are_said_to(tmp_path: Path) -> None:
    old = make_old(tmp_path / "old")
    assert "only its source differs" in compared(old, make_old(tmp_path / "older", SOURCE.replace("self", "me")))


def test_a_run_without_losses_or_reports_is_compared_as_far_as_it_goes(before: Path, tmp_path: Path) -> None:
    content = json.loads((before / "results.json").read_text())
    content["folds"] = [{"name": fold["name"], "accuracy": fold["accuracy"]} for fold in content["folds"]]
    write_json(before / "results.json", content)
    (accuracy,) = compared(before, make_run(tmp_path / "after", BETTER)).splitlines()[1:]
    assert "better" in accuracy
    assert "to the bit" not in compared(before, make_run(tmp_path / "again"))


def test_classes_that_hardly_changed_are_not_named(before: Path, tmp_path: Path) -> None:
    assert "F1" not in compared(before, make_run(tmp_path / "after", BASE + 0.0002))


def test_the_figure_shows_each_folds_difference_and_the_corrected_interval(before: Path, tmp_path: Path) -> None:
    (plot,) = draw(read_run(before), read_run(make_run(tmp_path / "after", BETTER))).axes
    assert [label.get_text() for label in plot.get_yticklabels()] == ["accuracy", "F1 of Coat", "F1 of Shirt"]
    interval, points = plot.collections[0].get_paths()[0].vertices, np.asarray(plot.collections[1].get_offsets())
    gains = BETTER - BASE
    np.testing.assert_allclose(points[:5, 0], gains)
    reach = t.isf(0.025, 4) * gains.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    np.testing.assert_allclose(np.asarray(interval)[:, 0], [gains.mean() - reach, gains.mean() + reach])


def test_the_final_fit_is_never_read(before: Path, tmp_path: Path) -> None:
    after = make_run(tmp_path / "after", BETTER)
    text, content = compared(before, after), json.loads((after / "results.json").read_text())
    for final in (None, 3, {"accuracy": 1.0, "loss": 0.0}):
        write_json(after / "results.json", content | {"final": final})
        assert compared(before, after) == text


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_the_figures_are_those_of_nadeau_and_bengio(folds: int) -> None:
    old, new = np.random.default_rng(folds).normal(0.9, 0.01, (2, folds))
    mean, error, p = paired_difference(old.tolist(), new.tolist(), folds)
    gains = [b - a for a, b in zip(old, new, strict=True)]
    variance = sum((gain - sum(gains) / folds) ** 2 for gain in gains) / (folds - 1)
    assert mean == pytest.approx(sum(gains) / folds)
    assert error == pytest.approx((variance * (1 / folds + 1 / (folds - 1))) ** 0.5)
    uncorrected = ttest_rel(new, old).statistic  # of var / K, so that the corrected one is this much smaller:
    scaled = uncorrected / np.sqrt(folds * (1 / folds + 1 / (folds - 1)))
    assert mean / error == pytest.approx(scaled)
    assert p == pytest.approx(two_sided(scaled, folds - 1), rel=1e-6)


def two_sided(statistic: float, freedom: int) -> float:
    """Return p by scipy's own paired test: of differences that have just this statistic."""
    spread = np.resize([1.0, -1.0], freedom + 1)
    spread -= spread.mean()
    spread /= spread.std(ddof=1) / np.sqrt(freedom + 1)
    return float(ttest_rel(spread + statistic, np.zeros(freedom + 1)).pvalue)


def test_folds_that_are_missing_do_not_change_the_share_of_a_test_set() -> None:
    _, error, _ = paired_difference(BASE[:3].tolist(), NOISE[:3].tolist(), 5)
    assert error == pytest.approx(np.std((NOISE - BASE)[:3], ddof=1) * np.sqrt(1 / 3 + 1 / 4))


def test_two_folds_need_thirteen_times_the_standard_error() -> None:
    error = paired_difference([0.0, 0.0], [0.0, 0.01], 2)[1]
    for times, better in ((12.5, False), (13.0, True)):
        assert (paired_difference([0, 0], [times * error - 0.005, times * error + 0.005], 2)[2] < 0.05) == better


def test_differences_that_are_alike_but_for_rounding_have_no_p() -> None:
    before = np.array([0.1, 0.3, 0.6, 0.9])
    assert np.ptp((before + 0.01) - before) > 0
    assert np.isnan(paired_difference(before.tolist(), (before + 0.01).tolist(), 4)[2])


def test_no_difference_in_any_fold_is_what_chance_always_brings() -> None:
    assert paired_difference([0.9, 0.8], [0.9, 0.8], 2) == (0, 0, 1)


@pytest.mark.parametrize(("p", "better"), [(0.049, True), (0.051, False)])
def test_better_needs_a_p_below_five_of_a_hundred(p: float, better: bool, before: Path, tmp_path: Path) -> None:
    noise = NOISE - BASE - np.mean(NOISE - BASE)
    gain = t.isf(p / 2, 4) * noise.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    text = compared(before, make_run(tmp_path / "after", BASE + noise + gain))
    assert text.count(f"better (p = {p:.2g})") == (2 if better else 0) and text.count(f"p = {p:.2g}") == 2


def test_differences_that_are_all_alike_tell_nothing(before: Path, tmp_path: Path) -> None:
    text = compared(before, make_run(tmp_path / "after", BASE + 0.01))
    assert text.count("no difference that these folds can tell (all folds differ alike, so there is no p)") == 2


@pytest.mark.parametrize("folds", [2, 5, 10])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping training sets", "independent errors"])
def test_equal_recipes_are_called_different_in_at_most_six_of_a_hundred(folds: int, overlap: bool) -> None:
    rng = np.random.default_rng(0)
    share = 1 / folds if overlap else 0  # of the variance that all folds have in common
    noise = rng.normal(size=(2000, folds)) * (1 - share) ** 0.5 + rng.normal(size=(2000, 1)) * share**0.5
    different = [paired_difference([0.0] * folds, gains, folds)[2] < 0.05 for gains in noise.tolist()]
    assert np.mean(different) <= 0.06


Run = Callable[..., tuple[str, int | str | None]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: Path) -> Run:
    """Return a function that runs the command on `before`'s folder; it returns what was printed, and the status."""

    def run(*arguments: str) -> tuple[str, int | str | None]:
        monkeypatch.setattr("sys.argv", ["compare", "--runs-dir", str(before.parent), *arguments])
        try:
            main()
        except SystemExit as end:
            return capsys.readouterr().err, end.code
        return capsys.readouterr().out, 0

    return run


def test_the_two_newest_that_are_comparable_are_compared(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, finished=1)
    make_run(before.parent / "other", BETTER, finished=2, rng_seed=1)
    output, status = command()
    assert status == 0 and "before" in output and "better" in output and "other" not in output
    assert (before.parent / "after" / "compare.png").exists()


def test_a_single_run_cannot_be_compared(command: Run) -> None:
    assert command() == ("Bad configuration:\n  There are no two runs to compare.\n", 2)


def test_each_run_that_is_named_is_compared_with_the_first(command: Run, before: Path) -> None:
    make_run(before.parent / "one", BETTER, finished=-1)
    make_run(before.parent / "two", NOISE, finished=-2)
    output, status = command("be", "one", "two")
    assert status == 0 and output.count("before\n") == 2 and "no difference" in output.partition("two")[2]
    with Image.open(before / "compare.png") as picture:  # the newest, though it was named first
        assert picture.format == "PNG" and picture.width > picture.height


def test_each_reason_against_a_comparison_is_given(command: Run, before: Path) -> None:
    make_run(before.parent / "one", rng_seed=1)
    make_run(before.parent / "two", data="77")
    errors, status = command("before", "one", "two")
    assert status == 2 and "other RNG_SEED" in errors and "other DATA " in errors
    assert not list(before.parent.rglob("compare.png"))


def test_a_beginning_that_several_names_have_is_refused_with_all_of_them(command: Run, before: Path) -> None:
    make_run(before.parent / "before-2")
    errors, status = command("bef", "before")
    assert status == 2 and "before\n" in errors and "before-2\n" in errors


def test_a_whole_name_is_that_runs_though_another_begins_so(command: Run, before: Path) -> None:
    make_run(before.parent / "before-2", BETTER)
    output, status = command("before", "before-2")
    assert status == 0 and output.splitlines()[1].endswith("before")


def test_a_part_of_a_name_will_do_and_a_beginning_comes_first(command: Run, before: Path) -> None:
    make_run(before.parent / "after-before", BETTER)
    assert command("bef", "ter-b")[1] == 0


def test_a_name_is_found_from_within_the_runs_folder(
    command: Run, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(before.parent / "after", BETTER)
    monkeypatch.chdir(before.parent)
    assert command("before", "after")[1] == 0


def test_a_name_that_no_run_has_is_refused(command: Run) -> None:
    errors, status = command("before", "nowhere")
    assert status == 2 and errors.splitlines()[1].startswith("  nowhere must name one run")
    assert errors.endswith("it is part of: nothing\n")


def test_the_command_explains_what_it_cannot_tell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    output = capsys.readouterr().out
    assert "usage: python -m experiment.compare" in output and "What this cannot tell" in output


def test_the_command_answers_in_a_process_of_its_own(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, finished=1)
    make_run(before.parent / "after-2", BETTER)
    compare = ("-m", "experiment.compare", "--runs-dir", "runs")
    processes = [start_python(tmp_path, *compare, *names) for names in (("bef", "runs/after"), ("bef", "aft"))]
    (output, _), (_, errors) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 2], errors
    assert output.startswith("runs/after\nAgainst runs/before\n") and "better" in output
    assert output.endswith("Worth opening:\n  runs/after/compare.png\n")
    assert errors.splitlines()[1:] == [
        "  aft must name one run, but in runs it is part of:",
        "      after",
        "      after-2",
    ]


def test_the_picture_is_drawn_though_nobody_reads_what_is_said(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, finished=1)
    process = start_python(tmp_path, "-m", "experiment.compare", "--runs-dir", "runs")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert (before.parent / "after" / "compare.png").exists()


def test_a_real_run_says_in_the_terminal_and_in_its_report_how_it_compares(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    first = configure(main_tutorial, EPOCHS=1, WORKERS=1).main()
    assert "Against" not in capsys.readouterr().out + (first.run_dir / "report.md").read_text()
    second = configure(main_tutorial, EPOCHS=1, WORKERS=1, BATCH_SIZE=256).main()
    for text in (capsys.readouterr().out, (second.run_dir / "report.md").read_text()):
        assert f"Against runs/{first.run_dir.name}\n  BATCH_SIZE     64 → 256\n  accuracy  " in text
