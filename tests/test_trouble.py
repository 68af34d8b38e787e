"""docs/trouble.md has every message with which the program fails or warns, and no other."""

import ast
import re
from functools import cache

import pytest
from conftest import REPOSITORY

import main_cnn
from experiment.settings import TrainingConfig

PAGE = (REPOSITORY / "docs" / "trouble.md").read_text()
FOLDERS = (".", "experiment", "comparison")
PRINTS_A_MESSAGE = {"ConfigurationError", "RunError", "DatasetError", "CodeChangedError", "warn"}
OTHERS_MESSAGES = ("Installation", "These have no message of this program")  # parts of the page
MIN_LETTERS = 8  # of a message that is not only built from others


def text_of(node: ast.expr) -> str:
    """Return the text of an expression, with "…" for each part that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    return "…"


@cache
def texts(messages_only: bool) -> list[str]:
    """Return all texts in the program, or those with which it fails or warns."""
    found = []
    for path in [path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not messages_only and isinstance(node, (ast.Constant, ast.JoinedStr)):
                found.append(text_of(node))
            if messages_only and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in PRINTS_A_MESSAGE and node.args:
                    found.append(text_of(node.args[0]))
    return sorted({text for text in found if len(re.findall(r"\w", text)) >= MIN_LETTERS})


def rows() -> list[str]:
    """Return the messages in the first columns of the page's tables."""
    found = []
    for section in re.split(r"(?m)^(?=## |These have)", PAGE):
        if not section.removeprefix("## ").startswith(OTHERS_MESSAGES):
            for cell in re.findall(r"(?m)^\| (`.*?) \| ", section):
                found += re.findall(r"`([^`]+)`", cell)
    return [row for row in found if not row.endswith(".py")]


def as_pattern(row: str) -> str:
    return ".*?".join(re.escape(part) for part in re.split(r"\s*…\s*", row))


@pytest.mark.parametrize("message", texts(messages_only=True))
def test_message_is_on_the_page(message: str) -> None:
    assert any(re.search(as_pattern(row), message, re.DOTALL) for row in rows())


@pytest.mark.parametrize("row", rows())
def test_message_on_the_page_is_one_of_the_program(row: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(vars(main_cnn) | {"EPOCHS": 0, "WANDB_API_KEY_PATH": "5ecre7" * 6 + "0123"})
    candidates = [*texts(messages_only=False), str(error.value)]
    assert any(re.search(as_pattern(row), text, re.DOTALL) for text in candidates)
