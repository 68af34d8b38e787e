"""The command compare.py: its arguments and output."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, Configure, start_python
from synthetic_runs import BASE, BETTER, NOISE, make_run

import main_tutorial
from compare import main

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
Run = Callable[..., tuple[str, int | str | None]]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "before")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs the command beside `runs` and returns its output (or error message) and status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, int | str | None]:
        monkeypatch.setattr("sys.argv", ["compare.py", "--runs-dir", "runs", *arguments])
        try:
            main()
        except SystemExit as end:
            return capsys.readouterr().err, end.code
        return capsys.readouterr().out, 0

    return run


def test_without_names_all_comparable_runs_are_shown(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=2, mirror=True)
    make_run(before.parent / "other", minutes=1, images="77", dataset="KMNIST")
    output, status = command()
    assert status == 0 and output.startswith("Baseline: runs/before\n  the oldest of 2 comparable runs in runs; ")
    assert "MIRROR False → True" in output and "1 on KMNIST" in output
    assert output.endswith("\n\nPage of all runs: runs/index.html\n")
    page = (before.parent / "index.html").read_text(encoding="utf-8")
    assert page.count("<tbody>") == 2 and "MIRROR False → True" in page and "KMNIST, 5 folds" in page


def test_single_run_has_nothing_to_be_compared_with(command: Run, before: Path) -> None:
    message = "There is nothing in runs to compare runs/before with.\n\nPage of all runs: runs/index.html\n"
    assert command() == (message, 0)
    assert "1 run, written" in (before.parent / "index.html").read_text(encoding="utf-8")
    assert command("--baseline", "before") == (f"Bad configuration:\n  {message.splitlines()[0]}\n", 2)
    reason = "runs/before: First finished run: there is nothing to compare it with yet."
    assert command("before") == (f"Bad configuration:\n  {reason}\n", 2)
    make_run(before.parent / "other", rng_seed=315, images="77")
    reason = "runs/other: First run with these folds (RNG_SEED 315)."
    assert command("other") == (f"Bad configuration:\n  {reason}\n", 2)


def test_folder_without_runs_is_named(command: Run) -> None:
    assert command() == ("Bad configuration:\n  There is no finished run in runs.\n", 2)


def test_one_name_is_compared_with_its_nearest_run(command: Run, before: Path) -> None:
    make_run(before.parent / "one", NOISE, minutes=1, mirror=True)
    make_run(before.parent / "two", BETTER, minutes=2, mirror=True, epochs=3)
    output, status = command("two")
    assert status == 0 and output.startswith("runs/two\nCompared with runs/one\n  EPOCHS 10 → 3\n")
    assert output.endswith("\nPage: runs/two/compared-with-one.html\n")
    page = (before.parent / "two" / "compared-with-one.html").read_text(encoding="utf-8")
    assert "<li>EPOCHS 10 → 3</li>" in page and page.count('<svg class="plot"') == 4  # two metrics, two classes


@pytest.mark.parametrize("name", ["runs/two", "runs/two/", "./runs/two", "two/", "../{folder}/runs/two"])
def test_run_is_not_compared_with_itself_however_its_path_is_written(
    name: str, command: Run, before: Path, tmp_path: Path
) -> None:
    make_run(before.parent / "two", BETTER, minutes=2, epochs=3)
    name = name.format(folder=tmp_path.name)
    for path in (name, str(tmp_path / "runs" / "two")):
        output, status = command(path)
        assert status == 0 and output.startswith("runs/two\nCompared with runs/before\n  EPOCHS 10 → 3\n")
    errors, status = command(name, "two")
    assert status == 2 and f"{name} and two are the same run, runs/two. Name different runs." in errors.replace(
        "\n  ", " "
    )


def test_two_runs_are_compared_with_the_noise_of_all(command: Run, before: Path) -> None:
    for number in range(5):
        noise = np.random.default_rng(number).normal(0, 0.002, 5)
        make_run(before.parent / f"N-20261126-19{number:02}00", BASE + noise, minutes=30 + number, mirror=True)
    for names in (("19:04",), ("before", "19:03")):
        output, _ = command(*names)
        assert "Noise estimated on 6 runs with these folds." in output.replace("\n ", "")
    output, _ = command("before", "19:00", "19:01")
    assert "Noise estimated on 6 runs with these folds." in output.replace("\n", " ")


def test_last_and_baseline_choose_what_is_shown(command: Run, before: Path) -> None:
    for number in range(4):
        noise = np.random.default_rng(number).normal(0, 0.002, 5)
        make_run(before.parent / f"N-20261126-19{number:02}00", BASE + noise, minutes=30 + number, epochs=number + 1)
    output, status = command("--last", "2")
    assert status == 0 and output.startswith("Baseline: runs/N-20261126-190200\n") and "19:03 " in output
    assert "19:01 " not in output and "3 runs before these (--last 5 shows all)" in output.replace("\n", " ")
    output, status = command("--last", "2", "--baseline", "before")
    assert status == 0 and output.startswith("Baseline: runs/before\n") and "19:02 " in output and "19:03 " in output
    assert "Baseline: before." in (before.parent / "index.html").read_text()
    output, status = command("19:01", "--baseline", "runs/before")
    assert status == 0 and output.startswith("runs/N-20261126-190100\nCompared with runs/before\n")
    output, status = command("--baseline", "nowhere")
    assert status == 2 and "No run in runs has nowhere in its name." in output


@pytest.mark.parametrize("arguments", [["--last", "1"], ["--last", "many"], ["--last", "3", "before"]])
def test_last_is_an_integer_of_at_least_two_without_names(arguments: list[str], command: Run, before: Path) -> None:
    errors, status = command(*arguments)
    assert status == 2 and "--last" in errors and "Traceback" not in errors


def test_two_names_are_compared_in_their_order(command: Run, before: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    output, status = command("after", "bef")
    assert status == 0 and output.startswith("runs/before\nCompared with runs/after\n") and "worse" in output


def test_of_several_names_the_first_is_the_baseline(command: Run, before: Path) -> None:
    make_run(before.parent / "one", NOISE, minutes=1, mirror=True)
    make_run(before.parent / "two", BETTER, minutes=2, epochs=3)
    make_run(before.parent / "three", minutes=3)
    output, status = command("one", "two", "bef")
    assert status == 0 and output.startswith("Baseline: runs/one\n") and "three" not in output
    assert "corrected for 4 comparisons" in output.replace("\n", " ")


def test_runs_that_are_not_comparable_are_named_one_line_each(command: Run, before: Path) -> None:
    make_run(before.parent / "one", rng_seed=1, images="76")
    make_run(before.parent / "two", images="77")
    errors, status = command("before", "one", "two")
    one, two = (f"  runs/{name} cannot be compared with runs/before" for name in ("one", "two"))
    assert status == 2 and errors.splitlines() == [
        "Bad configuration:",
        f"{one}: RNG_SEED is 1, not 314, so their folds consist of different images.",
        f"{two}: their folds consist of different images: the data set on disk was different.",
    ]


def test_help_explains_the_test_and_its_limits_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    output = capsys.readouterr().out
    assert output.startswith("usage: compare.py [-h] ") and "\n\nDid it help?" in output
    assert "\n\nLimits. " in output and "\n\nThe test is the corrected paired t-test" in output
    assert max(map(len, output.splitlines())) <= 80


def test_default_folder_is_runs_beside_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["compare.py", "no run has this name"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "  No run in runs has no run has this name in its name.\n" in capsys.readouterr().err


def test_overview_of_200_runs_takes_at_most_three_seconds(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    for number in range(200):
        make_run(runs_dir / f"N-{number:06}", BASE + number / 1e5, minutes=number, epochs=1 + number, classes=FASHION)
    before = os.times()
    process = start_python(tmp_path, str(REPOSITORY / "compare.py"), "--runs-dir", "runs", "--last", "200")
    output, errors = process.communicate(timeout=60)
    after = os.times()
    assert (process.returncode, errors) == (0, "") and output.count("EPOCHS") == 199
    processor_time = after.children_user + after.children_system - before.children_user - before.children_system
    assert processor_time < 3  # not elapsed time, which other tests beside this one would lengthen


def test_command_runs_in_its_own_process(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    make_run(before.parent / "after-2", BETTER)
    command = (str(REPOSITORY / "compare.py"), "--runs-dir", "runs")
    processes = [start_python(tmp_path, *command, *names) for names in (("bef", "runs/after"), ("bef", "aft"))]
    (output, _), (_, errors) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 2], errors
    assert output.startswith("runs/after\nCompared with runs/before\n") and "better" in output
    assert errors.splitlines()[1:] == [
        "  Several runs in runs have aft in their names:",
        "    after",
        "    after-2",
    ]


def test_command_imports_neither_torch_nor_matplotlib_for_a_pair(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    code = "import sys, compare; compare.main(); print({'torch', 'matplotlib'} & set(sys.modules))"
    output, errors = start_python(tmp_path, "-c", code, "--runs-dir", "runs", "after").communicate(timeout=60)
    assert output.endswith("set()\n"), errors


def test_page_is_written_when_the_output_is_closed(before: Path, tmp_path: Path) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    process = start_python(tmp_path, str(REPOSITORY / "compare.py"), "--runs-dir", "runs")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert (before.parent / "index.html").exists()


def test_page_that_cannot_be_written_costs_one_line(
    command: Run, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(before.parent / "after", BETTER, minutes=1)
    (before.parent / "index.html").mkdir()
    (before.parent / "after" / "compared-with-before.html").mkdir()
    for names, what in (((), "the page of all runs"), (("after",), "the page")):
        monkeypatch.setattr("sys.stderr", errors := io.StringIO())
        output, status = command(*names)
        assert status == 0 and "better" in output and "Page" not in output
        lines = errors.getvalue().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"Without {what}: RunError: ")


def test_real_run_is_compared_in_the_terminal_and_in_its_report(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    first = configure(main_tutorial, EPOCHS=1, WORKERS=1).main()
    for text in (capsys.readouterr().out, (first.run_dir / "report.html").read_text()):
        assert "First finished run: there is nothing to compare it with yet." in text and "Compared" not in text
    second = configure(main_tutorial, EPOCHS=1, WORKERS=1, BATCH_SIZE=256).main()
    assert f"Compared with runs/{first.run_dir.name}\n  BATCH_SIZE 64 → 256\n  accuracy  " in capsys.readouterr().out
    report = (second.run_dir / "report.html").read_text(encoding="utf-8")
    assert f"Compared with <strong>{first.run_dir.name}</strong>" in report and "<li>BATCH_SIZE 64 → 256</li>" in report
    assert '<td class="text"><mark>256</mark></td>' in report
    assert (second.run_dir / "compare.png").exists()
