"""The settings of a run: every constant of the entry scripts, checked; and the command line that changes them."""

import argparse
import ast
import io
import os
import re
import tokenize
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Strict, StrictInt
from pydantic_core import PydanticCustomError

from data_files import CLASS_NAMES, resolve_path
from experiment.errors import ConfigurationError, user_errors
from experiment.formatting import KEY, hide_keys, looks_like_key
from experiment.wandb_sweep import sweep_parameters

MAX_SIDE = 4096  # pixels of an image
MAX_SHOWN = 80  # characters of a bad value in a message


def _check_path(path: str | Path) -> str | Path:
    if not str(path).strip() or "\0" in str(path):
        raise ValueError
    if looks_like_key(path) and not os.path.exists(path):
        raise ValueError
    try:
        Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user
        raise ValueError from None
    return path


def _check_dataset(dataset: str | Path) -> str | Path:
    if dataset in CLASS_NAMES:
        return dataset
    _check_path(dataset)
    try:
        is_folder = resolve_path(dataset).is_dir()
    except OSError:  # a path that is too long
        is_folder = False
    if not is_folder:
        raise ValueError
    return str(Path(dataset)) if isinstance(dataset, str) else dataset  # without the "/" that a shell appends


def _check_image_shape(value: Any) -> tuple[int, int, int]:
    """Return an image shape as a tuple, also if it is a list or an array, or a string such as ``3x64x64``."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5}){2}", value):
        value = [int(number) for number in value.split("x")]
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError
    channels, height, width = (each.item() if isinstance(each, np.generic) else each for each in value)
    if not all(type(each) is int for each in (channels, height, width)):
        raise ValueError
    if channels not in (1, 3) or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError
    return channels, height, width


def _require_number(value: Any) -> Any:
    if not isinstance(value, (int, float)):  # pydantic takes whatever has a __float__
        raise ValueError
    return value


def _refuse_key_as_name(name: str) -> str:
    if re.search(KEY, name):
        raise ValueError
    return name


StrOrPath = Annotated[str, Strict()] | Annotated[Path, Strict()]
PathSetting = Annotated[StrOrPath, Field(description="a path"), AfterValidator(_check_path)]
ProjectNameSetting = Annotated[
    str,
    Field(pattern=r"^[^/\\#?%:]{1,128}$", strict=True, description="1 to 128 characters, none of them / \\ # ? % :"),
    AfterValidator(_refuse_key_as_name),
]
ImageShapeSetting = Annotated[
    tuple[int, int, int],
    PlainValidator(_check_image_shape),
    Field(description="(channels, height, width), 1 or 3 channels, such as (1, 28, 28) or (3, 64, 64)"),
]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid", hide_input_in_errors=True)
)
class TrainingConfig:
    """All settings of a run, checked; each field is a constant of the entry scripts, in lower case.

    Raises
    ------
    ValueError
        If anything is wrong: one error that names every bad constant, what it must be (the field's description) and
        what it is.
    """

    dataset: Annotated[StrOrPath, AfterValidator(_check_dataset)] = Field(
        description=", ".join(f'"{name}"' for name in CLASS_NAMES) + " or the path of a folder of pictures"
    )
    image_shape: ImageShapeSetting
    folds: StrictInt = Field(ge=2, description="an integer of at least 2")
    epochs: StrictInt = Field(ge=1, description="an integer of at least 1")
    batch_size: StrictInt = Field(ge=2, description="an integer of at least 2")
    learning_rate: Annotated[float, BeforeValidator(_require_number)] = Field(
        gt=0, allow_inf_nan=False, strict=True, description="a finite number above 0"
    )
    lr_schedule: Literal["constant", "cosine", "one_cycle"] = Field(description='"constant", "cosine" or "one_cycle"')
    mirror: bool = Field(strict=True, description="True or False")
    rng_seed: StrictInt = Field(ge=0, lt=2**32, description="an integer from 0 to 4294967295")
    device: str = Field(
        pattern=r"^(cpu|cuda|cuda:\d{1,3}|mps|auto)$",
        strict=True,
        description='"cpu", "cuda", "cuda:N", "mps" or "auto"',
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(description='"auto", "float32" or "bfloat16"')
    workers: Literal["auto"] | Annotated[StrictInt, Field(ge=1)] = Field(
        description='"auto" or an integer of at least 1'
    )
    resume: bool = Field(strict=True, description="True or False")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = Field(
        description='"auto", "online", "offline" or "disabled"'
    )
    wandb_project_name: ProjectNameSetting
    wandb_api_key_path: PathSetting = Field(description="the path of the file with your key")
    data_dir: PathSetting
    runs_dir: PathSetting

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _name_bad_constants(cls, values: Any, handler: pydantic.ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(values)
        except pydantic.ValidationError as error:
            lines = dict.fromkeys(_error_line(each) for each in error.errors())  # a union has one error per type
            raise PydanticCustomError("settings", "{lines}", {"lines": "\n".join(lines)}) from None

    @classmethod
    def from_constants(cls, constants: Mapping[str, Any]) -> "TrainingConfig":
        """Build the configuration from a script's constants, as in ``TrainingConfig.from_constants(globals())``.

        NumPy's numbers are taken as Python's. In a trial of a W&B sweep, the parameters of the trial replace the
        constants.

        Raises
        ------
        ConfigurationError
            A ValueError with one line per constant that is bad or missing.
        """
        values = {name: constants[name.upper()] for name in config_fields() if name.upper() in constants}
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        try:
            return cls(**(values | sweep_parameters()))
        except pydantic.ValidationError as error:
            raise ConfigurationError(_with_spelling(error.errors()[0]["msg"], constants)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON can store them."""
        settings = asdict(self)
        for name, value in settings.items():
            if isinstance(value, (str, Path)):
                settings[name] = _to_utf8(value)
            elif isinstance(value, tuple):
                settings[name] = list(value)
        return settings


def config_fields() -> dict[str, Any]:
    """Return pydantic's description of each setting, by name."""
    return TrainingConfig.__pydantic_fields__  # type: ignore[attr-defined]  # unknown to mypy for dataclasses


def _error_line(error: Any) -> str:
    """Return the message for one of pydantic's errors."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name.upper()} is missing"
    if name not in config_fields():
        return f"{name.upper()} is not a setting"
    found = repr(error["input"])
    if looks_like_key(error["input"]):
        return f"{name.upper()} must be {config_fields()[name].description}, got what looks like an API key"
    if len(found) > MAX_SHOWN:
        found = f"{found[: MAX_SHOWN - 3]}…"
    hint = _dataset_hint(error["input"]) if name == "dataset" else ""
    return f"{name.upper()} must be {config_fields()[name].description}, got {found}{hint}"


def _with_spelling(message: str, constants: Mapping[str, Any]) -> str:
    """Return a message in which each missing constant is followed by a similar name that the script defines."""
    unknown = [name for name in constants if name.isupper() and name.lower() not in config_fields()]
    lines = []
    for line in message.splitlines():
        if line.endswith(" is missing"):
            for similar in get_close_matches(line.removesuffix(" is missing"), unknown, n=1):
                line = f"{line}; {similar} is not a setting"
        lines.append(line)
    return "\n".join(lines)


def _dataset_hint(dataset: Any) -> str:
    """Return in parentheses what is wrong with the name of a data set: its spelling, or there is no such folder."""
    if not isinstance(dataset, (str, Path)) or not 0 < len(str(dataset)) <= MAX_SHOWN or "\0" in str(dataset):
        return ""
    names = {name.lower(): name for name in CLASS_NAMES}
    similar = get_close_matches(str(dataset).lower(), names, n=1)
    if similar and os.sep not in str(dataset):
        return f' (did you mean "{names[similar[0]]}"?)'
    with suppress(RuntimeError, OSError):  # "~name" of an unknown user
        return f" (there is no folder {_to_utf8(os.path.abspath(resolve_path(dataset)))})"
    return ""


def _to_utf8(value: str | Path) -> str:
    """Return a string or path that can be encoded as UTF-8: a file name may contain other bytes."""
    return str(value).encode(errors="backslashreplace").decode()


def read_command_line(constants: Mapping[str, Any], description: str | None) -> dict[str, Any]:
    """Return the constants that the command line sets, as in ``python main_cnn.py --epochs 3 --lr-schedule=constant``.

    In a notebook cell, which has no script, no command line is read.

    Parameters
    ----------
    constants : mapping
        The script's ``globals()``. Each constant becomes an option of the same name, its value the default, and the
        comment beside it the option's help.
    description : str
        The first lines of ``--help``.
    """
    if "__file__" not in constants:
        return {}
    parser = _Parser(description=description, allow_abbrev=False)
    comments = _read_comments(Path(constants["__file__"]))
    for name in config_fields():
        flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        help_text = f"{comments.get(name.upper(), '')} (default: {constants.get(name.upper())!r})".replace("%", "%%")
        parser.add_argument(*flags, dest=name, metavar="VALUE", help=help_text.strip(), default=argparse.SUPPRESS)
    with user_errors():
        given = vars(parser.parse_args())
    return {name.upper(): _parse_value(name, string) for name, string in given.items()}


def _read_comments(script: Path) -> dict[str, str]:
    """Return the comment beside each constant of a script; none if it cannot be read, as in ``python - < script``."""
    try:
        with tokenize.open(script) as file:
            source = file.read()
        statements = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return {}
    comment_in_line = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    comments = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            comment = comment_in_line.get(statement.lineno) or comment_in_line.get(statement.end_lineno or 0)
            if isinstance(target, ast.Name) and comment:
                comments[target.id] = comment.removeprefix("#").strip()
    return comments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        option = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        similar = get_close_matches(option[1], self._option_string_actions, n=1) if option else []
        advice = f"did you mean {similar[0]}? " if similar else ""
        raise ConfigurationError(f"{hide_keys(message)} ({advice}--help lists the options)")


def _parse_value(name: str, string: str) -> Any:
    """Return the value of an option: a string if the setting is a string or path, else a Python literal."""
    if config_fields()[name].annotation in (str, StrOrPath) or re.fullmatch(r"\d+x\d+x\d+", string):
        return string
    if string.lower() in ("true", "false"):
        return string.lower() == "true"
    try:
        return ast.literal_eval(string)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all of them are raised for odd strings
        return string
