"""README.md and docs/: the links, files, options, constants and values on the pages exist, and their code runs."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
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

README, TUTORIAL = REPOSITORY / "README.md", REPOSITORY / "docs" / "tutorial.md"
MAKEFILE = (REPOSITORY / "Makefile").read_text()
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
FOLDERS = (".", "experiment", "comparison", "docs", "tests", "tests/benchmarks")
FILES_OF_A_RUN = {
    "report.html",
    "index.html",
    "results.json",
    "config.json",
    "model.pt",
    "learning_curves.png",
    "compare.png",
    "predictions.csv",
}
FILES_OF_A_RUN |= {"per_class.png", "confusion_matrix.png", "mistakes.png"}
FILES_OF_THE_READER = {"picture.png", "file.py"}
OTHER_NAMES = {"WANDB_API_KEY", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "CLASS_NAMES"}
# Options that a page names without their program are those of main_cnn.py, except:
PROGRAMS = dict.fromkeys(("--invert", "--run", "--network"), "classify.py")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
VALUE = r'"\w*"|True|False|\d[\d.]*'


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def python_blocks(page: Path) -> list[str]:
    return [block for language, block in BLOCK.findall(page.read_text()) if language == "python"]


def code_lines(page: Path) -> list[str]:
    """Return the lines of all blocks that are not Python, and each code span of the prose as one line."""
    lines = []
    for language, block in BLOCK.findall(page.read_text()):
        if language != "python":
            lines += block.splitlines()
    for span in re.findall(r"`([^`]+)`", prose(page)):
        lines.append(" ".join(span.split()))
    return lines


def code(page: Path) -> str:
    return "\n".join(code_lines(page))


def on_each_page(search: Callable[[Path], Iterable[str]]) -> list[Any]:
    """Return a test's parameters: each page with each different string that a search finds on it."""
    parameters = []
    for page in PAGES:
        for found in dict.fromkeys(search(page)):
            is_slow = found.startswith("tests/benchmarks/") and " --" in found  # imports take seconds
            marks = [pytest.mark.slow] if is_slow else []
            parameters.append(pytest.param(page, found, id=f"{page.name}: {found[:80].strip()}", marks=marks))
    assert parameters
    return parameters


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!http)([^)]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), on_each_page(links))
def test_link_has_a_target(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def files(page: Path) -> list[str]:
    """Return the names in code or italics that end like a file's, and paths below a folder of the repository."""
    text = "\n".join([code(page), *re.findall(r"\*([\w./-]+\.\w+)\*", prose(page))])
    start = r"(?<![\w./<>*-])"
    names = re.findall(start + r"[\w*./-]*[\w*]+\.(?:py|md|txt|yml|yaml|json|png|pt|toml)\b", text)
    names += re.findall(start + r"(?:experiment|comparison|tests|docs|images|\.ci)/[\w./-]*", text)
    return [name for name in names if name not in FILES_OF_A_RUN | FILES_OF_THE_READER]


@pytest.mark.parametrize(("page", "name"), on_each_page(files))
def test_named_file_exists(page: Path, name: str) -> None:
    assert any(any(REPOSITORY.glob(f"{folder}/{name}")) for folder in FOLDERS)  # a name may be a pattern


def constants(page: Path) -> list[str]:
    """Return capitalised names with an underscore, and others that stand alone or have a value."""
    text = "\n".join([code(page), *python_blocks(page)])
    names = re.findall(r"(?m)\b[A-Z]{2,}(?:_[A-Z]+)+\b|^[A-Z]{2,}$|\b[A-Z]{2,}(?= = | must be )", text)
    return [name for name in names if name not in OTHER_NAMES]


@pytest.mark.parametrize(("page", "name"), on_each_page(constants))
def test_named_constant_exists(page: Path, name: str) -> None:
    assert name in ORDER


def readme_table() -> dict[str, list[str]]:
    """Return the defaults that the README's table shows for each constant: one, or one per script."""
    table = {}
    for name_cell, default_cell in re.findall(r"(?m)^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| (.*?) \|", README.read_text()):
        names, defaults = re.findall(r"`(\w+)`", name_cell), re.findall(r"`(.*?)`", default_cell)
        if len(names) == 1:
            table[names[0]] = defaults
        else:
            table |= {name: [default] for name, default in zip(names, defaults, strict=True)}
    return table


def test_readme_table_has_every_constant_in_order() -> None:
    assert list(readme_table()) == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_readme_table_has_the_default(name: str) -> None:
    defaults = [getattr(main_cnn, name), getattr(main_tutorial, name)]
    if defaults[0] == defaults[1]:
        defaults.pop()
    assert [ast.literal_eval(default) for default in readme_table()[name]] == defaults


def assignments(page: Path) -> list[str]:
    """Return the values of constants that a page assigns, lists in the README's table, or gives to options."""
    found = re.findall(rf"\b[A-Z_]+ = (?:{VALUE})", "\n".join([code(page), *python_blocks(page)]))
    if page == README:
        for name, description in re.findall(r"(?m)^\| `([A-Z_]+)` \| (.*)$", README.read_text()):
            found += [f"{name} = {value}" for value in re.findall(rf"`({VALUE})`", description)]
    for line in code_lines(page):
        if re.match(r"(?:python main_\w+\.py )?--", line):
            for option, value in re.findall(r"--([\w-]+)[ =](\w\S*)", line):
                literal = value if re.fullmatch(VALUE, value) else f'"{value}"'
                found.append(f"{option.upper().replace('-', '_')} = {literal}")
    return found


@pytest.mark.parametrize(("page", "assignment"), on_each_page(assignments))
def test_value_is_accepted(page: Path, assignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiment.resources.device_available", lambda device: True)
    name, _, value = assignment.partition(" = ")
    TrainingConfig.from_constants(vars(main_cnn) | {name: ast.literal_eval(value)})


@pytest.mark.parametrize(("page", "target"), on_each_page(lambda page: re.findall(r"\bmake ([\w./-]+)", code(page))))
def test_make_target_exists(page: Path, target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)


def options(page: Path) -> list[str]:
    """Return each option with its program, as in ``main_cnn.py --epochs``."""
    found = []
    for line in code_lines(page):
        command = re.match(r"(?:python )?([\w/]+\.py )?(.*)", line)
        assert command is not None
        program, arguments = (command[1] or "").strip(), command[2]
        if not program and not line.startswith("--"):
            continue
        for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
            found.append(f"{program or PROGRAMS.get(option, 'main_cnn.py')} {option}")
    return found


@cache
def help_of(program: str) -> str:
    assert re.search("argparse|read_command_line", (REPOSITORY / program).read_text()), "has no --help"
    command = [sys.executable, program, "--help"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(("page", "command"), on_each_page(options))
def test_option_exists(page: Path, command: str) -> None:
    program, option = command.split()
    assert option in re.findall(r"--[\w-]+", help_of(program).partition("\noptions:\n")[2])


def imports(page: Path) -> list[str]:
    return re.findall(r"(?m)^(?:import|from) .+", "".join(python_blocks(page)))


@pytest.mark.parametrize(("page", "statement"), on_each_page(imports))
def test_import_in_a_python_block_works(page: Path, statement: str) -> None:
    exec(statement, {})


def excerpts(page: Path) -> list[str]:
    return [block for block in python_blocks(page) if block.startswith("# in ")]


@pytest.mark.parametrize(("page", "block"), on_each_page(excerpts))
def test_excerpt_is_in_its_file(page: Path, block: str) -> None:
    heading, *excerpt = [line.strip() for line in block.strip().splitlines()]
    lines = [line.strip() for line in (REPOSITORY / heading.removeprefix("# in ")).read_text().splitlines()]
    start = lines.index(excerpt[0])
    assert lines[start : start + len(excerpt)] == excerpt


def test_tutorial_has_at_most_280_lines() -> None:
    assert len(TUTORIAL.read_text().splitlines()) <= 280


@pytest.mark.slow
def test_readmes_commands_run(tmp_path: Path) -> None:
    runs_dir = f"--runs-dir={tmp_path}"
    small = ["--dataset=Digits", "--epochs=1", "--folds=2", "--wandb-mode=disabled"]
    added = {"main_cnn.py": small, "main_tutorial.py": small, "compare.py": [], "classify.py": []}
    for program, options in added.items():
        command = next(line for line in code_lines(README) if line.startswith(f"python {program}"))
        command = command.replace("picture.png", "images/mistakes.png")
        run = [sys.executable, *shlex.split(command)[1:], *options, runs_dir]
        process = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr


def test_readme_has_at_most_180_lines() -> None:
    assert len(README.read_text().splitlines()) <= 180


MODULES = [path.name for folder in (".", "experiment", "comparison") for path in (REPOSITORY / folder).glob("[!_]*.py")]


@pytest.mark.parametrize("module", MODULES)
def test_readmes_layout_names_every_module(module: str) -> None:
    _, _, section = README.read_text().partition("## How the code is organised")
    layout = BLOCK.findall(section)[0][1]
    assert any(fnmatch(module, name) for name in re.findall(r"[\w*]+\.py", layout))
