"""README.md and docs/: what they name is there, what they show runs."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_settings import ORDER

import main_cnn
import main_tutorial
from experiment.settings import TrainingConfig

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MADE_BY_A_RUN = {
    *("report.md", "results.json", "config.json", "model.pt", "compare.png"),
    "picture.png",  # the reader's own
    *("learning_curves.png", "per_class.png", "confusion_matrix.png", "mistakes.png"),
}
OTHER_VARIABLES = {"WANDB_API_KEY", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "CLASS_NAMES"}
OTHER_OPTIONS = {"--report"}  # pip's
# Of options that are named alone; else main_cnn.py.
OWNERS = {"--against": "tests/benchmarks/worker_overhead.py", "--invert": "-m experiment.classify"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def code(page: Path) -> str:
    """Return all that stands as code on a page but Python's blocks: a line of a block, or a span, a line."""
    blocks = [block for kind, block in BLOCK.findall(page.read_text()) if kind != "python"]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    return "".join(blocks) + "\n".join(spans)


def python_blocks(page: Path) -> list[str]:
    return [block for kind, block in BLOCK.findall(page.read_text()) if kind == "python"]


def found(search: Callable[[Path], Iterable[str]]) -> list[Any]:
    """Return a test's parameters: what a search finds on each page, once."""
    items = [(page, item) for page in PAGES for item in dict.fromkeys(search(page))]
    assert items
    return [pytest.param(page, item, id=f"{page.name}: {item[:80].strip()}") for page, item in items]


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    again = [names[:i].count(name) for i, name in enumerate(names)]
    return {f"{name}-{number}" if number else name for name, number in zip(names, again, strict=True)}


@pytest.mark.parametrize(("page", "link"), found(lambda page: re.findall(r"\]\((?!http)([^)]+)\)", prose(page))))
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert not anchor or anchor in slugs(target)


def named_files(page: Path) -> Iterator[str]:
    """Return what is named with a file's ending, or below a folder of the repository, or as a module."""
    text = "\n".join([code(page), *re.findall(r"\*([\w./-]+\.\w+)\*", prose(page))])
    names = re.findall(r"(?<![\w./<>*-])[\w*./-]*[\w*]+\.(?:py|md|txt|yml|yaml|json|png|pt|toml)\b", text)
    names += re.findall(r"(?<![\w./<>*-])(?:experiment|tests|docs|images|\.ci)/[\w./-]*", text)
    names += [f"experiment/{module}.py" for module in re.findall(r"\bexperiment\.(?!py\b)(\w+)", text)]
    return (name for name in names if name not in MADE_BY_A_RUN)


@pytest.mark.parametrize(("page", "name"), found(named_files))
def test_a_file_that_is_named_is_there(page: Path, name: str) -> None:
    folders = (".", "experiment", "docs", "tests", "tests/benchmarks")
    assert any(any(REPOSITORY.glob(f"{folder}/{name}")) for folder in folders)  # a name may be a pattern


def constants(page: Path) -> Iterator[str]:
    """Return names with an underscore, wherever; of one word, where nothing else can be meant."""
    text = "\n".join([code(page), *python_blocks(page)])
    names = re.findall(r"(?m)\b[A-Z]{2,}(?:_[A-Z]+)+\b|^[A-Z]{2,}$|\b[A-Z]{2,}(?= = | must be )", text)
    return (name for name in names if name not in OTHER_VARIABLES)


@pytest.mark.parametrize(("page", "name"), found(constants))
def test_a_constant_that_is_named_is_one(page: Path, name: str) -> None:
    assert name in ORDER


def table() -> Iterator[tuple[str, list[str], str]]:
    """Return each constant of the README's table with its defaults and what is said of it alone."""
    rows = re.findall(r"(?m)^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| (.*?) \| (.*) \|$", PAGES[0].read_text())
    for names, defaults, words in rows:
        keys, values = re.findall(r"`(\w+)`", names), re.findall(r"`(.*?)`", defaults)
        yield from (
            [(keys[0], values, words)] if len(keys) == 1 else ((k, values[i : i + 1], "") for i, k in enumerate(keys))
        )


def assignments(page: Path) -> Iterator[str]:
    """Return the constants' values that are assigned, that the README's table names, and that options give."""
    literal = r'"\w*"|True|False|\d[\d.]*'
    yield from re.findall(rf"\b[A-Z_]+ = (?:{literal})", "\n".join([code(page), *python_blocks(page)]))
    for name, _, words in table() if page == PAGES[0] else ():
        yield from (f"{name} = {value}" for value in re.findall(rf"`({literal})`", words))
    for line in code(page).splitlines():
        if re.match(r"(?:python main_\w+\.py )?--", line):
            for option, value in re.findall(r"--([\w-]+)[ =](\w\S*)", line):
                shown = value if re.fullmatch(literal, value) else f'"{value}"'
                yield f"{option.upper().replace('-', '_')} = {shown}"


@pytest.mark.parametrize(("page", "assignment"), found(assignments))
def test_a_value_that_is_shown_is_accepted(page: Path, assignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiment.settings.device_is_here", lambda device: True)  # a page may name any
    name, _, value = assignment.partition(" = ")
    TrainingConfig.from_constants(vars(main_cnn) | {name: ast.literal_eval(value)})


def test_the_readmes_table_has_every_constant_in_order() -> None:
    assert [name for name, _, _ in table()] == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_the_readmes_table_has_the_default(name: str) -> None:
    own = [getattr(script, name) for script in (main_cnn, main_tutorial)]
    defaults = [[ast.literal_eval(value) for value in values] for key, values, _ in table() if key == name]
    assert defaults == [own if own[0] != own[1] else own[:1]]


@pytest.mark.parametrize(("page", "target"), found(lambda page: re.findall(r"\bmake ([\w./-]+)", code(page))))
def test_a_make_target_that_is_named_is_one(page: Path, target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "name"), found(lambda page: re.findall(r"\bmake [\w -]*?(\w+)=", code(page))))
def test_a_variable_that_make_is_given_is_one(page: Path, name: str) -> None:
    assert f"$({name})" in (REPOSITORY / "Makefile").read_text()


@cache
def options_of(program: str) -> list[str]:
    """Return the options that a program's --help lists."""
    if program.endswith(".py"):  # else asking for help would start it
        assert re.search("argparse|read_command_line", (REPOSITORY / program).read_text()), "it takes no options"
    command = [sys.executable, *program.split(), "--help"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    return re.findall(r"--[\w-]+", run.stdout.partition("\noptions:\n")[2])


def options(page: Path) -> Iterator[str]:
    """Return the options that are named behind a program, or alone."""
    for line in code(page).splitlines():
        if match := re.match(r"(?:python )?([\w/]+\.py|-m experiment\.\w+|(?=--))(.*)", line):
            for option in re.findall(r"(?<!\S)--[\w-]+", match[2]):
                if match[1] or option not in OTHER_OPTIONS:
                    yield f"{match[1] or OWNERS.get(option, 'main_cnn.py')} {option}"


def marked(parameters: list[Any]) -> list[Any]:
    """Mark the benchmarks' options as slow: to ask for their help takes seconds each, for what they import."""
    found = []
    for parameter in parameters:
        marks = [pytest.mark.slow] if "tests/benchmarks/" in parameter.values[1] else []
        found.append(pytest.param(*parameter.values, id=parameter.id, marks=marks))
    return found


@pytest.mark.parametrize(("page", "option"), marked(found(options)))
def test_a_command_line_option_that_is_named_is_one(page: Path, option: str) -> None:
    program, _, name = option.rpartition(" ")
    assert name in options_of(program)


@pytest.mark.parametrize(("page", "block"), found(python_blocks))
def test_a_python_block_compiles(page: Path, block: str) -> None:
    ast.parse(block)


@pytest.mark.parametrize(
    ("page", "statement"), found(lambda page: re.findall(r"(?m)^(?:import|from) .+", "".join(python_blocks(page))))
)
def test_what_a_python_block_imports_is_there(page: Path, statement: str) -> None:
    exec(statement, {})


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
    commands = re.findall(r"(?m)^python .+", code(PAGES[0]))
    small = ["--dataset=Digits", "--epochs=1", "--folds=2", "--wandb-mode=disabled", f"--runs-dir={tmp_path}"]
    scripts = [next(each for each in commands if name in each) for name in ("main_cnn", "main_tutorial")]
    compare = "python -m experiment.compare"
    assert compare in commands
    for command in (*scripts, compare):
        arguments = [f"--runs-dir={tmp_path}"] if command == compare else small
        run = [sys.executable, *shlex.split(command)[1:], *arguments]
        process = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    assert "Against" in process.stdout and len(list(tmp_path.glob("*/results.json"))) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.search("@@|TODO|TBD", page.read_text())


def test_readme_and_tutorial_are_each_read_in_one_sitting() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 180
    assert len((REPOSITORY / "docs" / "tutorial.md").read_text().splitlines()) <= 280


@pytest.mark.parametrize(
    "module",
    [path.name for folder in (".", "experiment") for path in (REPOSITORY / folder).glob("*.py") if path.stem[0] != "_"],
)
def test_the_readmes_layout_names_every_module(module: str) -> None:
    layout = BLOCK.findall(PAGES[0].read_text().partition("## How the code is laid out")[2])[0][1]
    assert any(fnmatch(module, name) for name in re.findall(r"[\w*]+\.py", layout))
