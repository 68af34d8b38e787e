"""Finished runs are read, listed and found by name; whatever is damaged is one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import BASE, BETTER, make_identity, make_results, make_run, write_json

from comparison.run_reader import as_run, display_path, find_run, read_run, read_runs
from experiment.errors import ConfigurationError

DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b'{"folds": 3}',
    b'{"folds": [{}, 1]}',
    b'{"folds": "\xe4"}',
    b"[" * 10**5,
    b"\0",
]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


def names_in(runs_dir: Path) -> list[str]:
    """Return the names of the finished runs in a folder."""
    return [run.path.name for run in read_runs(runs_dir)[0]]


def test_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [0.9, np.nan, 0.8], minutes=3, resumed=True))
    assert list(run.folds) == ["fold-1", "fold-3"] and run.diverged == ["fold-2"]
    assert run.folds["fold-1"].accuracy == 0.9 and run.folds["fold-1"].f1 == pytest.approx({"Coat": 0.9, "Shirt": 0.9})
    assert f"{run.started:%H:%M}" == "18:33" and run.seconds == 42 and run.resumed
    assert (run.finished - run.started).total_seconds() == 42


def test_time_with_a_zone_is_read_as_local_time(before: Path) -> None:
    content = json.loads((before / "results.json").read_text())
    content["environment"]["started"] = "2026-11-26T18:30:00+00:00"
    write_json(before / "results.json", content)
    assert read_run(before).started.timestamp() == 1795717800


def test_run_that_is_about_to_be_saved_equals_the_saved_run(tmp_path: Path) -> None:
    run = as_run(tmp_path / "runs" / "now", make_results(BETTER), make_identity())
    assert run == read_run(make_run(tmp_path / "runs" / "now", BETTER))


def test_unfinished_run_is_refused(before: Path) -> None:
    (before / "results.json").unlink()
    with pytest.raises(ConfigurationError, match="before is unfinished: it has no results.json.$"):
        read_run(before)


def test_folder_that_may_not_be_entered_is_refused_with_the_reason(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may enter every folder
    with pytest.raises(ConfigurationError, match=r"^\S*before cannot be read \(Permission denied\)\.$"):
        read_run(before)


def test_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a run: it has no config.json.$"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "config.json"])
@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_file_is_named_in_one_line(name: str, content: bytes, before: Path) -> None:
    (before / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"^[^\n]*before cannot be read: {name} [^\n]*$"):
        read_run(before)


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_pipe_instead_of_a_file_is_not_read(name: str, before: Path) -> None:
    (before / name).unlink()
    os.mkfifo(before / name)
    with pytest.raises(ConfigurationError, match=rf"cannot be read: {name} cannot be read \(it is a pipe\)\.$"):
        read_run(before)


def test_folder_instead_of_a_file_is_named(before: Path) -> None:
    (before / "results.json").unlink()
    (before / "results.json").mkdir()
    with pytest.raises(ConfigurationError, match=r"results.json cannot be read \(Is a directory\)"):
        read_run(before)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", '"high"'], ids=["nan", "infinity", "1e400", "text"])
def test_metric_must_be_finite(value: str, before: Path) -> None:
    results = (before / "results.json").read_text()
    (before / "results.json").write_text(results.replace(str(BASE[0]), value, 1))
    with pytest.raises(ConfigurationError, match=r"results.json is damaged \(folds.0.accuracy"):
        read_run(before)


@pytest.mark.parametrize("missing", ["images", "threads", "network"])
def test_missing_entry_of_another_version_is_named(missing: str, before: Path) -> None:
    content = json.loads((before / "config.json").read_text())
    del content["identity"][missing]
    write_json(before / "config.json", content)
    with pytest.raises(ConfigurationError, match=f"config.json lacks identity.{missing} .written by another version"):
        read_run(before)


def test_runs_are_listed_from_the_newest_by_their_time(tmp_path: Path) -> None:
    for name, minutes in (("b", 2), ("c", 1), ("a", 3)):
        make_run(tmp_path / name, minutes=minutes)
    assert names_in(tmp_path) == ["a", "b", "c"]


def test_listing_passes_over_whatever_is_not_a_readable_run(before: Path) -> None:
    for number, content in enumerate(DAMAGED):
        for name in ("results.json", "config.json"):
            (make_run(before.parent / f"{name}-{number}") / name).write_bytes(content)
    (before.parent / "folder").mkdir()
    (before.parent / "results.json").write_text("{}")
    (before.parent / "loop").symlink_to("loop")
    assert names_in(before.parent) == ["before"]


def test_listing_returns_why_a_run_cannot_be_read(before: Path) -> None:
    (make_run(before.parent / "interrupted") / "results.json").unlink()
    (make_run(before.parent / "old") / "config.json").write_text("{}")
    (before.parent / "no run").mkdir()
    _, problems = read_runs(before.parent)
    assert [problem.partition("runs/")[2].partition(":")[0] for problem in problems] == [
        "interrupted is unfinished",
        "old cannot be read",
    ]


def test_missing_folder_has_no_runs(tmp_path: Path) -> None:
    assert read_runs(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("name", ["before-20261126-183045", "bef", "ore", "before-2026", "18:30"])
def test_run_is_found_by_a_part_of_its_name(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "after-20261126-193045")
    path = make_run(tmp_path / "before-20261126-183045")
    assert find_run(name, tmp_path).path == path


def test_run_is_found_by_its_path(before: Path, tmp_path: Path) -> None:
    assert find_run(str(before), tmp_path / "nowhere").path == before


def test_whole_name_is_preferred_to_a_part(before: Path) -> None:
    make_run(before.parent / "before-2")
    assert find_run("before", before.parent).path == before


def test_ambiguous_name_is_refused_with_all_matches(before: Path) -> None:
    make_run(before.parent / "before-2")
    where = display_path(before.parent)
    with pytest.raises(ConfigurationError) as error:
        find_run("bef", before.parent)
    assert str(error.value) == f"Several runs in {where} have bef in their names:\n  before\n  before-2"


def test_at_most_ten_matches_are_listed(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"run-{number:02}").mkdir()
    with pytest.raises(ConfigurationError, match="\n  run-09\n  and 2 more$"):
        find_run("run", tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "n" * 300])
def test_unknown_name_is_refused_with_the_folder_that_was_searched(name: str, before: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        find_run(name, before.parent)
    assert str(error.value) == f"No run in {display_path(before.parent)} has {name} in its name."


@pytest.mark.parametrize("name", ["runs/before", "runs/before/", "./runs//before", "../here/runs/before", "before/"])
def test_run_is_found_under_the_path_that_the_list_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for runs_dir in (Path("runs"), tmp_path / "here" / "runs"):
        make_run(Path("runs") / "before") if not Path("runs").exists() else None
        (listed,) = read_runs(runs_dir)[0]
        assert find_run(name, runs_dir).path == listed.path
        assert find_run(os.path.abspath(listed.path), runs_dir).path == listed.path


def test_run_in_another_folder_has_an_absolute_path(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(before.parent)
    assert find_run("before", Path("nowhere")).path == before


def test_run_is_created_when_its_folder_was(tmp_path: Path) -> None:
    resumed = read_run(make_run(tmp_path / "N-20261125-120001-2", minutes=9, resumed=True))
    assert f"{resumed.created:%d %H:%M:%S}" == "25 12:00:01" and f"{resumed.started:%d %H:%M}" == "26 18:39"
    for name in ("renamed", "N-20269999-999999"):
        run = read_run(make_run(tmp_path / name))
        assert run.created == run.started


def test_time_with_colons_matches_only_the_time(tmp_path: Path) -> None:
    for name in ("N-20261830-121830", "N1830-20261126-120000", "N-20261126-183059", "N-20261126-183000"):
        make_run(tmp_path / name)
    with pytest.raises(ConfigurationError) as error:
        find_run("18:30", tmp_path)
    assert str(error.value).splitlines()[1:] == ["  N-20261126-183000", "  N-20261126-183059"]
    assert find_run("18:30:59", tmp_path).path.name == "N-20261126-183059"


def test_final_fit_is_never_read(before: Path) -> None:
    run, content = read_run(before), json.loads((before / "results.json").read_text())
    for final in (None, 3, {"accuracy": 1.0, "loss": 0.0}):
        write_json(before / "results.json", content | {"final": final})
        assert read_run(before) == run
