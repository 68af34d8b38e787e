"""The settings of a run: every constant of the entry scripts, checked; and the command line that changes them."""

import argparse
import ast
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import pydantic
import torch
from pydantic import AfterValidator, Field, Strict, StrictInt
from pydantic_core import PydanticCustomError

from experiment.errors import ConfigurationError, user_errors
from experiment.wandb_sweep import sweep_parameters

# The settings that say what is computed, as the entry scripts group them.
HYPERPARAMETERS = ("dataset", "folds", "epochs", "batch_size", "learning_rate", "lr_schedule", "mirror", "rng_seed")


def device_is_here(device: str) -> bool:
    """Return whether the machine has "cpu", "auto", "mps", "cuda" or "cuda:N"."""
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    return device != "mps" or torch.backends.mps.is_available()


def _must_be_here(device: str) -> str:
    if not device_is_here(device):
        raise ValueError
    return device


def _must_name_a_place(path: str | Path) -> str | Path:
    if not str(path).strip() or "\0" in str(path):
        raise ValueError
    try:
        Path(path).expanduser()
    except RuntimeError:  # there is no such home
        raise ValueError from None
    return path


TextOrPath = Annotated[str, Strict()] | Annotated[Path, Strict()]
Place = Annotated[TextOrPath, Field(description="a path"), AfterValidator(_must_name_a_place)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainingConfig:
    """All settings of a run, checked; each field is a constant of the entry scripts, in lower case.

    Raises
    ------
    ValueError
        If anything is wrong: one error that names every bad constant, what it must be (the field's description) and
        what it is.
    """

    dataset: Literal["MNIST", "FashionMNIST", "KMNIST", "Digits"] = Field(
        description='"MNIST", "FashionMNIST", "KMNIST" or "Digits"'
    )
    folds: StrictInt = Field(ge=2, description="an integer of at least 2")
    epochs: StrictInt = Field(ge=1, description="an integer of at least 1")
    batch_size: StrictInt = Field(ge=2, description="an integer of at least 2")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, strict=True, description="a finite number above 0")
    lr_schedule: Literal["constant", "cosine", "one_cycle"] = Field(description='"constant", "cosine" or "one_cycle"')
    mirror: bool = Field(strict=True, description="True or False")
    rng_seed: StrictInt = Field(ge=0, lt=2**32, description="an integer from 0 to 4294967295")
    device: Annotated[str, AfterValidator(_must_be_here)] = Field(
        pattern=r"^(cpu|cuda|cuda:\d{1,3}|mps|auto)$",
        description='"cpu", "cuda", "cuda:N", "mps" or "auto", and on this machine',
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(description='"auto", "float32" or "bfloat16"')
    workers: Literal["auto"] | Annotated[StrictInt, Field(ge=1)] = Field(
        description='"auto" or an integer of at least 1'
    )
    resume: bool = Field(strict=True, description="True or False")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = Field(
        description='"auto", "online", "offline" or "disabled"'
    )
    wandb_project_name: str = Field(
        pattern=r"^[^/\\#?%:]{1,128}$", strict=True, description="1 to 128 characters, none of them / \\ # ? % :"
    )
    wandb_api_key_path: Place
    data_dir: Place
    runs_dir: Place

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _in_the_users_words(cls, values: Any, handler: pydantic.ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(values)
        except pydantic.ValidationError as error:
            lines = dict.fromkeys(_line_of(each) for each in error.errors())  # of a union, each part has an error
            raise PydanticCustomError("settings", "{lines}", {"lines": "\n".join(lines)}) from None

    @classmethod
    def from_constants(cls, constants: Mapping[str, Any]) -> "TrainingConfig":
        """Build the configuration from a script's constants, as in ``TrainingConfig.from_constants(globals())``.

        Where an agent of W&B's wants something else of a trial, that counts.

        Raises
        ------
        ConfigurationError
            A ValueError with a line for every constant that is bad or missing.
        """
        values = {name: constants[name.upper()] for name in fields_of_config() if name.upper() in constants}
        try:
            return cls(**(values | sweep_parameters()))
        except pydantic.ValidationError as error:
            raise ConfigurationError(error.errors()[0]["msg"]) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON can hold them."""
        return {
            name: _as_text(value) if isinstance(value, (str, Path)) else value for name, value in asdict(self).items()
        }


def fields_of_config() -> dict[str, Any]:
    """Return pydantic's description of each setting, by name."""
    return TrainingConfig.__pydantic_fields__  # type: ignore[attr-defined]  # which mypy does not know of dataclasses


def _line_of(error: Any) -> str:
    """Return what the user is told of one of pydantic's errors."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name.upper()} is missing"
    if name not in fields_of_config():
        return f"{name.upper()} is no setting"
    found = repr(error["input"])
    if len(found) > 80:
        found = f"{found[:77]}…"
    return f"{name.upper()} must be {fields_of_config()[name].description}, got {found}"


def _as_text(value: str | Path) -> str:
    """Return a text or a path as UTF-8 can hold it; a file's name may have bytes that are none."""
    return str(value).encode(errors="backslashreplace").decode()


def read_command_line(constants: Mapping[str, Any], description: str | None) -> dict[str, Any]:
    """Return the constants that the command line sets, as in ``python main_cnn.py --epochs 3 --lr-schedule=constant``.

    Where there is no script, as in a notebook's cell, no command line is read.

    Parameters
    ----------
    constants : mapping
        The script's ``globals()``: each constant is an option of the same name, its value the default, and the comment
        beside it what ``--help`` says.
    description : str
        What ``--help`` says of the script.
    """
    if "__file__" not in constants:
        return {}
    parser = _Parser(description=description, allow_abbrev=False)
    comments = _comments_beside_constants(Path(constants["__file__"]))
    for name in fields_of_config():
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        text = f"{comments.get(name.upper(), '')} (default: {constants.get(name.upper())!r})".replace("%", "%%")
        parser.add_argument(*flags, dest=name, metavar="VALUE", help=text.strip(), default=argparse.SUPPRESS)
    with user_errors():
        given = vars(parser.parse_args())
    return {name.upper(): _value_of(name, text) for name, text in given.items()}


def _comments_beside_constants(script: Path) -> dict[str, str]:
    """Return the comment that stands beside each constant in a script."""
    lines = re.findall(r"^([A-Z_]+) = .*?  # (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (--help lists the options)")


def _value_of(name: str, text: str) -> Any:
    """Return what an option's text stands for: a text where the setting is one, else the number or the truth value."""
    if fields_of_config()[name].annotation in (str, TextOrPath):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
