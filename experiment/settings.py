"""The settings of a run: every constant of the entry scripts, checked; and the command line that changes them."""

import argparse
import ast
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import pydantic
from pydantic import Field, StrictInt
from pydantic_core import PydanticCustomError

from experiment.errors import ConfigurationError, user_errors
from experiment.machine import device_is_here
from experiment.wandb_sweep import sweep_parameters


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class TrainingConfig:
    """All settings of a run, checked; each field is a constant of the entry scripts, in lower case.

    Raises
    ------
    ValueError
        If anything is wrong: one error that names every bad constant, what it must be and what it is.
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
    device: str = Field(
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
    wandb_api_key_path: str | Path = Field(description="a path")
    data_dir: str | Path = Field(description="a path")
    runs_dir: str | Path = Field(description="a path")

    @pydantic.field_validator("*", mode="wrap")
    @classmethod
    def _check(cls, value: Any, handler: Callable[[Any], Any], info: pydantic.ValidationInfo) -> Any:
        """Let pydantic check the field, add what types cannot say, and put any error into the user's words."""
        name = str(info.field_name)
        try:
            checked = handler(value)
            bad = (name == "device" and not device_is_here(checked)) or (
                name.endswith(("_path", "_dir")) and not _is_path(value)
            )
        except pydantic.ValidationError:
            bad = True
        if bad:
            found = repr(value) if len(repr(value)) <= 80 else f"{value!r:.77}…"
            parts = {"name": name.upper(), "wanted": cls.wanted()[name], "found": found}
            raise PydanticCustomError("setting", "{name} must be {wanted}, got {found}", parts)
        return checked

    @classmethod
    def wanted(cls) -> dict[str, str]:
        """Return what each setting can be, in words."""
        described: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        return {name: field.description for name, field in described.items()}

    @classmethod
    def from_constants(cls, constants: Mapping[str, Any]) -> "TrainingConfig":
        """Build the configuration from a script's constants, as in ``TrainingConfig.from_constants(globals())``.

        Where an agent of W&B's wants something else of a trial, that counts.

        Raises
        ------
        ConfigurationError
            A ValueError with a line for every constant that is bad or missing.
        """
        try:
            values = {name: constants[name.upper()] for name in cls.wanted() if name.upper() in constants}
            return cls(**(values | sweep_parameters()))
        except pydantic.ValidationError as error:
            says = {"missing": "is missing", "unexpected_keyword_argument": "is no setting"}
            lines = [
                f"{str(e['loc'][0]).upper()} {says[e['type']]}" if e["type"] in says else e["msg"]
                for e in error.errors()
            ]
            raise ConfigurationError("\n".join(lines)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON can hold them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _is_path(path: Any) -> bool:
    return isinstance(path, (str, Path)) and bool(str(path).strip()) and "\0" not in str(path)


def read_command_line(constants: Mapping[str, Any], description: str | None) -> dict[str, Any]:
    """Return the constants that the command line sets, as in ``python main_cnn.py --epochs 3 --lr-schedule=constant``.

    Parameters
    ----------
    constants : mapping
        The script's constants: each is an option of the same name, and the default.
    description : str
        What ``--help`` says of the script.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    for name, wanted in TrainingConfig.wanted().items():
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        text = f"{wanted} (default: {constants.get(name.upper())!r})".replace("%", "%%")
        parser.add_argument(*flags, dest=name, metavar="VALUE", help=text, default=argparse.SUPPRESS)
    with user_errors():
        given = vars(parser.parse_args())
    texts = {field.name for field in fields(TrainingConfig) if field.type in (str, str | Path)}
    return {name.upper(): value if name in texts else _literal(value) for name, value in given.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (--help lists the options)")


def _literal(text: str) -> Any:
    """Return the number or the truth value that a text stands for, or the text."""
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text
