"""Finished runs read back, which of them are comparable, and in what they differ."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import BASE, BETTER, PRINTED, make_identity, make_results, make_run, write_json

import experiment.past_runs
from experiment.errors import ConfigurationError
from experiment.past_runs import (
    LONG,
    as_run,
    comparable,
    default_runs_dirs,
    differences,
    find_run,
    finished_runs,
    nearest,
    read_run,
    read_runs,
    same_answers,
    why_not_comparable,
)
from experiment.run_directory import path_from_here

DAMAGED = ["", "{", "[]", "null", "7", '"folds"', "{}", '{"folds": 3}', '{"folds": [{}, 1]}', "[" * 10**5, "\0"]
DROPOUT = PRINTED.replace("    (2)", "    (2): Dropout(p=0.5, inplace=False)\n    (3)")


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def differ(tmp_path: Path, old: dict[str, Any] | None = None, **new: Any) -> list[tuple[str, str]]:
    """Return the differences between a run with a network and one with whatever is given, as name and text."""
    one, other = make_run(tmp_path / "one", network=old), make_run(tmp_path / "other", **new)
    return [(found.name, found.text) for found in differences(read_run(one), read_run(other))]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [0.9, np.nan, 0.8], minutes=3, resumed=True))
    assert list(run.folds) == ["fold-1", "fold-3"] and run.diverged == ["fold-2"]
    assert run.folds["fold-1"].accuracy == 0.9 and run.folds["fold-1"].f1 == pytest.approx({"Coat": 0.9, "Shirt": 0.9})
    assert f"{run.started:%H:%M}" == "18:33" and run.seconds == 42 and run.resumed
    assert (run.finished - run.started).total_seconds() == 42


def test_a_time_with_a_zone_is_told_in_local_time(before: Path) -> None:
    content = json.loads((before / "results.json").read_text())
    content["environment"]["started"] = "2026-11-26T18:30:00+00:00"
    write_json(before / "results.json", content)
    assert read_run(before).started.timestamp() == 1795717800


def test_a_run_that_is_just_ending_is_read_from_what_it_will_write(tmp_path: Path) -> None:
    run = as_run(tmp_path / "runs" / "now", make_results(BETTER), make_identity())
    assert run == read_run(make_run(tmp_path / "runs" / "now", BETTER))


def test_a_run_that_is_just_ending_and_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"^[^\n]*{tmp_path.name} cannot be compared: lacks folds[^\n]*$"):
        as_run(tmp_path, {}, make_identity())


def test_an_unfinished_run_says_that_it_is(before: Path) -> None:
    (before / "results.json").unlink()
    with pytest.raises(ConfigurationError, match="before is unfinished: it has no results.json.$"):
        read_run(before)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a run: it has no config.json.$"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "config.json"])
@pytest.mark.parametrize(
    "content", [content for content in DAMAGED if content != "{}"], ids=lambda text: re.sub(r"\W+", "-", text[:8])
)
def test_a_damaged_file_is_named_in_one_line(name: str, content: str, before: Path) -> None:
    (before / name).write_text(content)
    with pytest.raises(ConfigurationError, match=f"^[^\n]*before cannot be compared: {name} [^\n]*$"):
        read_run(before)


def test_a_file_that_is_no_text_is_named(before: Path) -> None:
    (before / "results.json").write_bytes(b'{"folds": "\xe4"}')
    with pytest.raises(ConfigurationError, match="results.json is damaged"):
        read_run(before)


def test_a_folder_in_a_files_place_is_named(before: Path) -> None:
    (before / "results.json").unlink()
    (before / "results.json").mkdir()
    with pytest.raises(ConfigurationError, match="results.json Is a directory"):
        read_run(before)


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "1e400", '"high"'], ids=["nan", "infinity", "1e400", "text"])
def test_a_figure_that_is_not_finite_is_damage(figure: str, before: Path) -> None:
    results = (before / "results.json").read_text()
    (before / "results.json").write_text(results.replace(str(BASE[0]), figure, 1))
    with pytest.raises(ConfigurationError, match=r"results.json is damaged \(folds.0.accuracy"):
        read_run(before)


@pytest.mark.parametrize("missing", ["images", "threads", "network"])
def test_a_run_of_an_older_version_says_what_it_lacks(missing: str, before: Path) -> None:
    content = json.loads((before / "config.json").read_text())
    del content["identity"][missing]
    write_json(before / "config.json", content)
    with pytest.raises(ConfigurationError, match=f"config.json lacks identity.{missing} .an older version"):
        read_run(before)


def test_runs_are_listed_the_newest_first_whatever_their_names_and_files_dates(tmp_path: Path) -> None:
    for name, minutes in (("b", 2), ("c", 1), ("a", 3)):
        make_run(tmp_path / name, minutes=minutes)
    assert [run.path.name for run in finished_runs(tmp_path)] == ["a", "b", "c"]


def test_whatever_lies_among_the_runs_is_passed_over(before: Path) -> None:
    for number, content in enumerate(DAMAGED):
        for name in ("results.json", "config.json"):
            (make_run(before.parent / f"{name}-{number}") / name).write_text(content)
    (before.parent / "folder").mkdir()
    (before.parent / "results.json").write_text("{}")
    (before.parent / "loop").symlink_to("loop")
    assert [run.path.name for run in finished_runs(before.parent)] == ["before"]


def test_of_each_run_that_is_passed_over_there_is_a_reason(before: Path) -> None:
    (make_run(before.parent / "cut off") / "results.json").unlink()
    (make_run(before.parent / "old") / "config.json").write_text("{}")
    (before.parent / "no run").mkdir()
    _, reasons = read_runs(before.parent)
    assert [reason.partition("runs/")[2].partition(":")[0] for reason in reasons] == [
        "cut off is unfinished",
        "old cannot be compared",
    ]


def test_a_folder_that_is_not_there_has_no_runs(tmp_path: Path) -> None:
    assert finished_runs(tmp_path / "nowhere") == []


def test_the_folder_of_the_runs_is_read_from_both_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(experiment.past_runs, "PROJECT_DIR", tmp_path)
    (tmp_path / "main_cnn.py").write_text('import torch\n\nRUNS_DIR = "/here"  # the results\n')
    (tmp_path / "main_tutorial.py").write_text('RUNS_DIR = "/there"\n')
    assert default_runs_dirs() == [Path("/here"), Path("/there")]


@pytest.mark.parametrize("text", ["import os\nRUNS_DIR = os.environ['RUNS']\n", "RUNS_DIR = 5\n", "", "RUNS_DIR = \n"])
def test_a_script_that_does_not_say_its_folder_plainly_is_named(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experiment.past_runs, "PROJECT_DIR", tmp_path)
    (tmp_path / "main_cnn.py").write_text(text)
    with pytest.raises(ConfigurationError, match="^main_cnn.py "):
        default_runs_dirs()


def test_without_scripts_the_runs_lie_where_the_scripts_have_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experiment.past_runs, "PROJECT_DIR", tmp_path)
    assert default_runs_dirs() == [tmp_path / "runs"]


def test_the_scripts_of_this_repository_say_where_their_runs_lie() -> None:
    assert default_runs_dirs() == [experiment.past_runs.PROJECT_DIR / "runs"]


@pytest.mark.parametrize("name", ["before", "bef", "ore", "before-2026"])
def test_a_run_is_found_by_a_part_of_its_name(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "after")
    path = make_run(tmp_path / ("before" if name == "before" else "before-20261126"))
    assert find_run(name, tmp_path).path == path


def test_a_run_is_found_by_its_time_with_colons(tmp_path: Path) -> None:
    path = make_run(tmp_path / "Network-20261126-183045")
    make_run(tmp_path / "Network-20261126-193045")
    assert find_run("18:30", tmp_path).path == path


def test_a_beginning_comes_before_a_part(tmp_path: Path) -> None:
    path = make_run(tmp_path / "before")
    make_run(tmp_path / "as-before")
    assert find_run("bef", tmp_path).path == path


def test_a_whole_name_is_that_runs_though_another_begins_so(before: Path) -> None:
    make_run(before.parent / "before-2")
    assert find_run("before", before.parent).path == before


def test_a_run_is_found_in_any_of_several_folders(before: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "more" / "after")
    assert find_run("aft", before.parent, tmp_path / "more").path == tmp_path / "more" / "after"


def test_a_name_that_several_have_is_refused_with_all_of_them(before: Path) -> None:
    make_run(before.parent / "before-2")
    with pytest.raises(ConfigurationError, match="bef must name one run, .*\n    before\n    before-2$"):
        find_run("bef", before.parent)


def test_of_very_many_names_only_some_are_listed(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"run-{number}").mkdir()
    with pytest.raises(ConfigurationError, match="and 2 more$"):
        find_run("run", tmp_path)


def test_ten_names_are_all_listed(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"run-{number}").mkdir()
    with pytest.raises(ConfigurationError, match="\n    run-8\n    run-9$"):
        find_run("run", tmp_path)


def test_a_name_that_none_has_is_refused_with_the_folders_that_were_looked_through(
    before: Path, tmp_path: Path
) -> None:
    where = f"{path_from_here(before.parent)} and {path_from_here(tmp_path / 'more')}"
    with pytest.raises(ConfigurationError) as refusal:
        find_run("nowhere", before.parent, tmp_path / "more")
    assert str(refusal.value) == f"nowhere must name one run, but in {where} it is part of: nothing"


def test_two_runs_of_the_same_settings_do_not_differ(tmp_path: Path) -> None:
    assert differ(tmp_path) == []


def test_every_setting_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    found = differ(tmp_path, epochs=3, mirror=True, device="cuda", precision="bfloat16", threads=2, torch="2.15.0")
    assert found == [
        ("EPOCHS", "10 → 3"),
        ("MIRROR", "False → True"),
        ("DEVICE", "cpu → cuda"),
        ("PRECISION", "float32 → bfloat16"),
        ("threads", "1 → 2"),
        ("torch", "2.14.1 → 2.15.0"),
    ]


def test_a_layer_that_was_added_is_the_only_difference_though_all_later_numbers_shift(tmp_path: Path) -> None:
    assert differ(tmp_path, network={"printed": DROPOUT}) == [("layer", "+ Dropout(p=0.5, inplace=False)")]


def test_a_layer_that_was_removed_is_one_difference(tmp_path: Path) -> None:
    assert differ(tmp_path, {"printed": DROPOUT}) == [("layer", "− Dropout(p=0.5, inplace=False)")]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("ReLU()", "Tanh()", "ReLU() → Tanh()"),
        ("ReLU()", "PReLU(num_parameters=1)", "ReLU() → PReLU(num_parameters=1)"),
        ("Dropout(p=0.5, inplace=False)", "Dropout(p=0.2, inplace=False)", "Dropout(p=0.5 → 0.2)"),
        (
            "Conv2d(32, 64, kernel_size=(3, 3), padding=(1, 1))",
            "Conv2d(32, 96, kernel_size=(5, 5), padding=(1, 1))",
            "Conv2d(32, 64 → 96, kernel_size=(3, 3) → (5, 5))",
        ),
        ("Conv2d(1, 2, bias=False)", "Conv2d(1, 2)", "Conv2d(1, 2, − bias=False)"),
        ("Conv2d(1, 2)", "Conv2d(1, 2, bias=False)", "Conv2d(1, 2, + bias=False)"),
        ("Linear(3, 4)", "Linear(3)", "Linear(3, 4) → Linear(3)"),
        ("Own(1, a=1, b=2, c=3)", "Own(1, a=1, b=2, c=4)", "Own(1, c=3 → 4)"),
        ("Own(1, when=a=b)", "Own(1, when=a=c)", "Own(1, when=a=b → a=c)"),
        ("(own): Linear(1, 2)", "(own): Linear(1, 3)", "(own): Linear(1, 2 → 3)"),
        (
            "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1)",
            "AvgPool2d(kernel_size=2, stride=2, padding=0)",
            "MaxPool2d(kernel_size=2, stride=2, …) → AvgPool2d(kernel_size=2, stride=2, …)",
        ),
    ],
)
def test_a_layer_that_was_replaced_is_one_difference_and_shows_what_became_another(
    old: str, new: str, text: str, tmp_path: Path
) -> None:
    network = {"printed": PRINTED.replace("ReLU()", new)}
    assert differ(tmp_path, {"printed": PRINTED.replace("ReLU()", old)}, network=network) == [("layer", text)]


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (f"Own({'n' * (LONG - 5)}, 2, 3)", f"Own({'n' * (LONG - 5)}, 2, …)"),
        (f"Own({'n' * LONG}, 2)", f"Own({'n' * LONG}, 2)"),  # longer, with nothing to leave out
        (f"Own({'a, ' * LONG}z)", "Own(a, a, …)"),
    ],
)
def test_a_layer_that_is_too_long_is_shown_with_its_first_two_arguments(layer: str, shown: str, tmp_path: Path) -> None:
    network = {"printed": PRINTED.replace("ReLU()", layer)}
    assert differ(tmp_path, network=network) == [("layer", f"ReLU() → {shown}")]


def test_a_layer_of_exactly_the_greatest_length_is_shown_whole(tmp_path: Path) -> None:
    layer = f"{'O' * (LONG - len('(1, 2, 3)'))}(1, 2, 3)"
    network = {"printed": PRINTED.replace("ReLU()", layer)}
    assert differ(tmp_path, network=network) == [("layer", f"ReLU() → {layer}")]


def test_another_class_of_network_is_told_as_one_difference(tmp_path: Path) -> None:
    other = {"name": "Wide", "printed": "Wide(\n" + "  a\n" * 30 + ")", "weights": 669706, "answers": [1.0]}
    assert differ(tmp_path, network=other) == [("network", "Network → Wide (50,890 → 669,706 weights)")]


def test_a_network_that_only_answers_otherwise_is_one_difference(tmp_path: Path) -> None:
    found = differ(tmp_path, network={"answers": [0.5, -1.25, 2.1]})
    assert found == [("network", "answers otherwise (its code or initialisation)")]


@pytest.mark.parametrize(
    ("other", "same"),
    [([1.0, -2.0], True), ([1.0019, -2.0], True), ([1.0021, -2.0], False), ([1.0], False), ([1.0, np.nan], False)],
)
def test_answers_are_the_same_to_a_thousandth_of_the_largest(other: list[float], same: bool) -> None:
    assert same_answers([1.0, -2.0], other) == same


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"dataset": "KMNIST"}, "other DATASET (KMNIST, not FashionMNIST), so other images in each fold"),
        ({"folds": 10}, "other FOLDS (10, not 5), so other images in each fold"),
        ({"rng_seed": 1}, "other RNG_SEED (1, not 314), so other images in each fold"),
        ({}, "other images in each fold: the data set on disk was another one"),
    ],
)
def test_runs_whose_folds_are_other_images_are_not_comparable_and_say_why(
    other: dict[str, Any], reason: str, before: Path, tmp_path: Path
) -> None:
    run = read_run(make_run(tmp_path / "after", images="77", **other))
    told = f"{path_from_here(run.path)} cannot be compared with {path_from_here(before)}: {reason}."
    assert why_not_comparable(read_run(before), run) == told and not comparable(read_run(before), run)


def test_runs_with_one_fold_in_common_are_not_comparable(before: Path, tmp_path: Path) -> None:
    after = read_run(make_run(tmp_path / "after", [0.9, *[np.nan] * 4]))
    told = str(why_not_comparable(read_run(before), after))
    assert told.endswith(": fewer than two folds have a result in both.")


def test_runs_with_two_folds_in_common_are_comparable(before: Path, tmp_path: Path) -> None:
    after = read_run(make_run(tmp_path / "after", [0.9, *[np.nan] * 3, 0.9]))
    assert why_not_comparable(read_run(before), after) is None


def nearest_of(tmp_path: Path, now: dict[str, Any], *others: dict[str, Any]) -> str | None:
    """Return the name of the run that a run is nearest to, of others that were made one after the other: "0", "1"…"""
    runs = []
    for number, identity in enumerate(others):
        runs.append(read_run(make_run(tmp_path / str(number), minutes=number, **identity)))
    found = nearest(read_run(make_run(tmp_path / "now", minutes=99, **now)), runs)
    return None if found is None else found.path.name


def test_a_change_is_compared_with_what_it_changed(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"mirror": True}, {}) == "0"


def test_after_an_undo_another_change_is_compared_with_the_run_before_both(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"mirror": True}) == "0"


def test_in_a_chain_of_kept_changes_each_is_compared_with_the_one_before(tmp_path: Path) -> None:
    kept = {"mirror": True, "epochs": 3}
    assert nearest_of(tmp_path, kept | {"batch_size": 16}, {}, {"mirror": True}, kept) == "2"


def test_a_repetition_is_compared_with_what_it_repeats(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {}, {}, {"mirror": True}) == "0"


def test_of_runs_that_are_equally_near_the_newest_is_taken(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"mirror": True, "epochs": 3}, {}) == "2"


def test_two_layers_less_are_nearer_than_another_class_of_network(tmp_path: Path) -> None:
    other = {"name": "Wide", "printed": "Wide(\n  (a): Linear(1, 2)\n  (b): Linear(2, 3)\n  (c): Linear(3, 4)\n)"}
    shorter = {"printed": PRINTED.replace("    (1): ReLU()\n", "").replace("out_features=10", "out_features=11")}
    assert nearest_of(tmp_path, {"network": shorter}, {}, {"network": other}) == "0"


def test_another_class_with_the_same_layers_is_nearer_than_two_other_settings(tmp_path: Path) -> None:
    renamed, two_settings = {"network": {"name": "Other"}}, {"mirror": True, "epochs": 3}
    assert nearest_of(tmp_path, {}, renamed, two_settings) == "0"


def test_another_version_of_torch_is_a_difference_like_any_other(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"torch": "2.15.0", "mirror": True}, {}, {"torch": "2.15.0"}) == "1"


def test_a_run_that_is_not_comparable_is_never_the_nearest(tmp_path: Path) -> None:
    assert nearest_of(tmp_path, {"epochs": 3}, {}, {"epochs": 3, "images": "77"}) == "0"
    assert nearest_of(tmp_path / "again", {}, {"images": "77"}) is None


def test_a_run_is_not_its_own_nearest(before: Path) -> None:
    run = read_run(before)
    assert nearest(run, [run]) is None


def test_the_final_fit_is_never_read(before: Path) -> None:
    run, content = read_run(before), json.loads((before / "results.json").read_text())
    for final in (None, 3, {"accuracy": 1.0, "loss": 0.0}):
        write_json(before / "results.json", content | {"final": final})
        assert read_run(before) == run
