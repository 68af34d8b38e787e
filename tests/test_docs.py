"""README.md and docs/: what they name is there, what they show runs."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_settings import ORDER

import main_cnn
import main_tutorial
from experiment.settings import TrainingConfig

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MADE_BY_A_RUN = {
    *("report.md", "results.json", "config.json", "model.pt", "compare.png", "wandb_*.py"),
    *("learning_curves.png", "per_class.png", "confusion_matrix.png", "mistakes.png"),
}
OTHER_VARIABLES = {"WANDB_API_KEY", "GPU"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def code(page: Path) -> list[str]:
    """Return all that stands as code on a page: lines of its blocks that are not Python's, and spans."""
    blocks = [line for kind, block in BLOCK.findall(page.read_text()) if not kind for line in block.splitlines()]
    return [*blocks, *re.findall(r"`([^`]+)`", prose(page))]


def found(search: Callable[[Path], Iterator[str] | list[str]]) -> list[object]:
    """Return a test's parameters: what a search finds on each page, once."""
    items = [(page, item) for page in PAGES for item in dict.fromkeys(search(page))]
    assert items
    return [pytest.param(page, item, id=f"{page.name}: {item}") for page, item in items]


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), found(lambda page: re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())))
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert not anchor or anchor in slugs(target)


def named_files(page: Path) -> Iterator[str]:
    text = "\n".join([*code(page), *re.findall(r"\*([\w./]+\.\w+)\*", prose(page))])
    names = re.findall(r"(?<![\w./<>*-])[\w*./-]*[\w*]+\.(?:py|md|txt|yml|yaml|json|png|pt|toml)\b", text)
    return (name for name in names if name not in MADE_BY_A_RUN and name not in ("image.png", "test_*.py"))


@pytest.mark.parametrize(("page", "name"), found(named_files))
def test_a_file_that_is_named_is_there(page: Path, name: str) -> None:
    folders = (".", "experiment", "docs", "tests", "tests/benchmarks")
    assert any((REPOSITORY / folder / name).exists() for folder in folders)


def constants(page: Path) -> Iterator[str]:
    text = "\n".join(code(page)) + "\n".join(block for _, block in BLOCK.findall(page.read_text()))
    return (name for name in re.findall(r"(?<![\w.])[A-Z]{2,}(?:_[A-Z]+)+\b", text) if name not in OTHER_VARIABLES)


@pytest.mark.parametrize(("page", "name"), found(constants))
def test_a_constant_that_is_named_is_one(page: Path, name: str) -> None:
    assert name in ORDER


def assignments(page: Path) -> Iterator[str]:
    return (line for line in code(page) if re.fullmatch(r"[A-Z_]+ = \S+", line))


@pytest.mark.parametrize(("page", "assignment"), found(assignments))
def test_a_value_that_is_shown_is_accepted(page: Path, assignment: str) -> None:
    name, _, value = assignment.partition(" = ")
    TrainingConfig.from_constants(vars(main_cnn) | {name: ast.literal_eval(value)})


def test_the_readmes_table_has_every_constant_with_its_default() -> None:
    rows = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| (.*?) \|", PAGES[0].read_text(), re.MULTILINE)
    listed: dict[str, list[object]] = {}
    for names, values in rows:
        keys, defaults = re.findall(r"`(\w+)`", names), [ast.literal_eval(v) for v in re.findall(r"`(.*?)`", values)]
        listed |= dict(zip(keys, ([each] for each in defaults), strict=True)) if len(keys) > 1 else {keys[0]: defaults}
    assert list(listed) == ORDER
    for name, defaults in listed.items():
        own = [getattr(script, name) for script in (main_cnn, main_tutorial)]
        assert defaults == (own if own[0] != own[1] else own[:1]), name


@pytest.mark.parametrize(
    ("page", "target"), found(lambda page: re.findall(r"(?<!\w)make ([\w./-]+)", "\n".join(code(page))))
)
def test_a_make_target_that_is_named_is_one(page: Path, target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@cache
def help_of(program: str) -> str:
    """Return what a program's --help says."""
    command = [sys.executable, *program.split(), "--help"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def options(page: Path) -> Iterator[str]:
    for line in code(page):
        if match := re.match(r"(?:python )?(main_\w+\.py|-m experiment\.\w+|tests/benchmarks/\w+\.py)(.*)", line):
            yield from (f"{match[1]} {option}" for option in re.findall(r"(--[\w-]+)", match[2]))


@pytest.mark.parametrize(("page", "option"), found(options))
def test_a_command_line_option_that_is_named_is_one(page: Path, option: str) -> None:
    program, _, name = option.rpartition(" ")
    assert re.search(rf"{name}\b", help_of(program))


def python_blocks(page: Path) -> list[str]:
    return [block for kind, block in BLOCK.findall(page.read_text()) if kind == "python"]


@pytest.mark.parametrize(("page", "block"), found(python_blocks))
def test_a_python_block_compiles(page: Path, block: str) -> None:
    ast.parse(block)


@pytest.mark.parametrize(
    ("page", "block"), found(lambda page: [block for block in python_blocks(page) if block.startswith("# in ")])
)
def test_an_excerpt_stands_in_its_file(page: Path, block: str) -> None:
    first, *excerpt = block.strip().splitlines()
    lines = [line.strip() for line in (REPOSITORY / first.removeprefix("# in ")).read_text().splitlines()]
    start = lines.index(excerpt[0].strip())
    assert lines[start : start + len(excerpt)] == [line.strip() for line in excerpt]


def test_the_tutorials_table_of_layers_is_what_its_code_prints() -> None:
    blocks = BLOCK.findall((REPOSITORY / "docs" / "tutorial.md").read_text())
    (number,) = (i for i, (_, block) in enumerate(blocks) if "for layer in" in block)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(blocks[number][1], {})
    assert printed.getvalue() == blocks[number + 1][1]


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """One command of each program, on Digits."""
    commands = [command for command in code(PAGES[0]) if command.startswith("python ")]
    small = ["--dataset=Digits", "--epochs=1", "--folds=2", "--wandb-mode=disabled", f"--runs-dir={tmp_path}"]
    scripts = [next(each for each in commands if name in each) for name in ("main_cnn", "main_tutorial")]
    compare = "python -m experiment.compare"
    assert compare in commands
    for command in (*scripts, compare):
        arguments = [f"--runs-dir={tmp_path}"] if command == compare else small
        run = [sys.executable, *shlex.split(command)[1:], *arguments]
        output = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "Against" in output and len(list(tmp_path.glob("*/results.json"))) == 2


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 200


@pytest.mark.parametrize(
    "module",
    [path.name for folder in (".", "experiment") for path in (REPOSITORY / folder).glob("*.py") if path.stem[0] != "_"],
)
def test_the_readmes_layout_names_every_module(module: str) -> None:
    layout = PAGES[0].read_text().partition("## How the code is laid out")[2]
    assert module in layout or (module.startswith("wandb_") and "wandb_*.py" in layout)
