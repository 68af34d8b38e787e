"""The settings: what is accepted, what is refused, and the command line."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

import main_cnn
import main_tutorial
from experiment.errors import ConfigurationError
from experiment.settings import TrainingConfig, _read_comments, read_command_line

ORDER = (
    "DATASET IMAGE_SHAPE FOLDS EPOCHS BATCH_SIZE LEARNING_RATE LR_SCHEDULE MIRROR RNG_SEED DEVICE PRECISION WORKERS "
    "RESUME WANDB_MODE WANDB_PROJECT_NAME WANDB_API_KEY_PATH DATA_DIR RUNS_DIR"
).split()


GOOD: dict[str, list[Any]] = {
    "DATASET": ["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "Digits", ".", Path("tests")],
    "IMAGE_SHAPE": [(1, 28, 28), (3, 64, 64), (1, 1, 4096)],
    "FOLDS": [2, 100],
    "EPOCHS": [1, 10**6],
    "BATCH_SIZE": [2, 10**9],
    "LEARNING_RATE": [1e-9, 5.0, 1],
    "LR_SCHEDULE": ["constant", "cosine", "one_cycle"],
    "MIRROR": [True, False],
    "RNG_SEED": [0, 2**32 - 1],
    "DEVICE": ["cpu", "auto"],
    "PRECISION": ["auto", "float32", "bfloat16"],
    "WORKERS": ["auto", 1, 64],
    "RESUME": [True, False],
    "WANDB_MODE": ["auto", "online", "offline", "disabled"],
    "WANDB_PROJECT_NAME": ["cnn fun", "two words!" + "-x" * 59],
    "WANDB_API_KEY_PATH": ["key.txt", Path("key.txt")],
    "DATA_DIR": ["data", Path("/data")],
    "RUNS_DIR": ["runs", Path("/runs")],
}


BAD: dict[str, list[Any]] = {
    "DATASET": ["CIFAR100", "digits", "nowhere", "README.md", "", "~no_such_user", "a\0b", "x" * 5000, None, 1],
    "IMAGE_SHAPE": [
        (2, 28, 28),
        (4, 28, 28),
        (1, 28),
        (1, 0, 28),
        (1, 28, 28.0),
        (True, 28, 28),
        np.array(3),
        28,
        "28x28",
        None,
    ],
    "FOLDS": [1, 0, -5, True, 5.0, "5", None],
    "EPOCHS": [0, -1, True, 1.0, "1", None, float("nan"), float("inf")],
    "BATCH_SIZE": [1, 0, True, 64.0, "64", None],
    "LEARNING_RATE": [0, 0.0, -0.1, float("nan"), float("inf"), -float("inf"), 10**400, True, "0.1", None],
    "LR_SCHEDULE": ["linear", None, 1],
    "MIRROR": [0, 1, "True", None],
    "RNG_SEED": [-1, 2**32, True, 1.0, "1", None],
    "DEVICE": ["gpu", "CPU", "cuda:", "cuda:x", "cpu ", "cpu\n", 0, None],
    "PRECISION": ["float16", "double", 32, None],
    "WORKERS": [0, -1, True, 1.0, "2", "all", None],
    "RESUME": [0, 1, "False", None],
    "WANDB_MODE": ["on", "dryrun", True, None],
    "WANDB_PROJECT_NAME": ["", "two words!!" + "-x" * 59, *(f"a{character}b" for character in "/\\#?%:"), 1, None],
    "WANDB_API_KEY_PATH": ["", "a\0b", 1, None],
    "DATA_DIR": ["", "a\0b", 1, None],
    "RUNS_DIR": ["", "a\0b", 1, None],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize("script", [main_cnn, main_tutorial])
def test_a_scripts_constants_are_in_the_order_of_the_design(script: ModuleType) -> None:
    assert [name for name in vars(script) if name.isupper()] == ORDER


@pytest.mark.parametrize("script", [main_cnn, main_tutorial])
def test_a_scripts_own_constants_are_accepted(script: ModuleType) -> None:
    assert TrainingConfig.from_constants(vars(script)).folds == 5


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_a_good_value_is_accepted(name: str, value: Any) -> None:
    assert getattr(TrainingConfig.from_constants(vars(main_cnn) | {name: value}), name.lower()) == value


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_refused_by_the_name_of_its_constant(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(vars(main_cnn) | {name: value})
    named = [other for other in ORDER if f"{other} must be" in str(error.value)]
    assert named == [name]


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(
        {name: st.sampled_from([(v, True) for v in GOOD[name]] + [(v, False) for v in BAD[name]]) for name in ORDER}
    )
)
def test_any_combination_is_accepted_or_refused_by_exactly_the_bad_constants(
    constants: dict[str, tuple[Any, bool]],
) -> None:
    bad = [name for name in ORDER if not constants[name][1]]
    try:
        TrainingConfig.from_constants({name: value for name, (value, _) in constants.items()})
    except ValueError as error:
        assert [name for name in ORDER if f"{name} must be" in str(error)] == bad
    else:
        assert not bad


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ORDER), JUNK)
def test_any_value_is_accepted_or_refused_by_the_name_of_its_constant(name: str, value: Any) -> None:
    try:
        TrainingConfig.from_constants(vars(main_cnn) | {name: value})
    except ValueError as error:
        assert [other for other in ORDER if f"{other} must be" in str(error)] == [name]


def test_only_bad_values_are_named() -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(vars(main_cnn) | {"EPOCHS": 0, "WORKERS": "2", "DATA_DIR": ""})
    assert [name for name in ORDER if f"{name} must be" in str(error.value)] == ["EPOCHS", "WORKERS", "DATA_DIR"]


def test_the_message_has_the_value_that_was_found() -> None:
    with pytest.raises(ValueError, match="EPOCHS must be an integer of at least 1, got '2'"):
        TrainingConfig.from_constants(vars(main_cnn) | {"EPOCHS": "2"})


@pytest.mark.parametrize("name", ["WANDB_API_KEY_PATH", "DATA_DIR", "RUNS_DIR"])
def test_a_path_of_bytes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainingConfig.from_constants(vars(main_cnn) | {name: b"folder"})


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="EPOCH is not a setting"):
        TrainingConfig(**TrainingConfig.from_constants(vars(main_cnn)).to_dict(), epoch=3)  # type: ignore[call-arg]


def test_all_bad_values_are_named_at_once() -> None:
    first_bad = {name: values[0] for name, values in BAD.items()}
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(first_bad)
    assert all(f"{name} must be" in str(error.value) for name in ORDER)


def test_the_configuration_cannot_be_changed() -> None:
    config = TrainingConfig.from_constants(vars(main_cnn))
    with pytest.raises(AttributeError):
        config.epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "constant"),
    [
        ("--epochs=3", {"EPOCHS": 3}),
        ("--learning_rate=1e-4", {"LEARNING_RATE": 0.0001}),
        ("--learning-rate=1", {"LEARNING_RATE": 1}),
        ("--resume=False", {"RESUME": False}),
        ("--resume=true", {"RESUME": True}),
        ("--resume=false", {"RESUME": False}),
        ("--workers=auto", {"WORKERS": "auto"}),
        ("--wandb-project-name=12", {"WANDB_PROJECT_NAME": "12"}),
        ("--data_dir=7", {"DATA_DIR": "7"}),
        ("--dataset=12", {"DATASET": "12"}),
        ("--image-shape=3x64x64", {"IMAGE_SHAPE": "3x64x64"}),
        ("--image-shape=(3,64,64)", {"IMAGE_SHAPE": (3, 64, 64)}),
        ("", {}),
    ],
)
def test_an_option_is_parsed_as_the_value_of_its_constant(
    option: str, constant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main_cnn.py", *option.split()])
    assert read_command_line(vars(main_cnn), None) == constant


def test_every_constant_is_an_option_with_underscores_or_hyphens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ORDER:
        for option in (f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"):
            monkeypatch.setattr("sys.argv", ["main_cnn.py", option, "x"])
            assert read_command_line(vars(main_cnn), None) == {name: "x"}


def script_with(folder: Path, line: str) -> dict[str, Any]:
    """Return the constants of a script of one line."""
    script = folder / "main_own.py"
    script.write_text(f"import os\n\n{line}\n", encoding="utf-8")
    name, _, rest = line.partition(" = ")
    return {"__file__": str(script), name: eval(rest)}


def test_help_shows_the_description_and_each_constants_comment_and_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["main_own.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        read_command_line(script_with(tmp_path, "EPOCHS = 3  # passes – 50 % of them"), "Trains something.")
    shown = capsys.readouterr().out
    assert "\n\nTrains something.\n\n" in shown
    options = [" ".join(option.split()) for option in shown.partition("options:")[2].split("\n  --")]
    assert options[1] == "dataset VALUE (default: None)"
    assert options[4] == "epochs VALUE passes – 50 % of them (default: 3)"
    assert len(options) == 1 + len(ORDER)  # and --help


@pytest.mark.parametrize(
    ("option", "advice"),
    [("--epoch", "did you mean --epochs? "), ("--lr_shedule", "did you mean --lr_schedule? "), ("--zzz", "")],
)
def test_an_unknown_option_is_refused_in_one_line_with_status_2(
    option: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["main_cnn.py", f"{option}=3"])
    with pytest.raises(SystemExit) as end:
        read_command_line(vars(main_cnn), None)
    assert end.value.code == 2
    expected = f"Bad configuration:\n  unrecognized arguments: {option}=3 ({advice}--help lists the options)\n"
    assert capsys.readouterr().err == expected


def test_a_notebook_cell_reads_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert read_command_line({"EPOCHS": 3}, None) == {}


def test_settings_can_be_written_as_json_even_with_undecodable_folder_names() -> None:
    folders = {"DATA_DIR": Path("br\udcfcder"), "RUNS_DIR": Path("runs")}
    content = TrainingConfig.from_constants(vars(main_cnn) | folders | {"EPOCHS": 3, "WORKERS": 2}).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert (content["epochs"], content["workers"], content["mirror"]) == (3, 2, main_cnn.MIRROR)
    assert (content["data_dir"], content["runs_dir"]) == ("br\\udcfcder", "runs")


@pytest.mark.parametrize(("length", "shown"), [(78, "'" + 78 * "." + "'"), (79, "'" + 76 * "." + "…")])
def test_a_long_value_is_shortened_in_the_message(length: int, shown: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(vars(main_cnn) | {"DEVICE": length * "."})
    assert str(error.value).endswith(f'"auto", got {shown}')


def test_a_deleted_constant_is_reported_as_missing() -> None:
    constants = {name: value for name, value in vars(main_cnn).items() if name != "EPOCHS"}
    with pytest.raises(ValueError, match=r"^EPOCHS is missing$"):
        TrainingConfig.from_constants(constants)


def test_a_misspelled_constant_is_named_beside_the_missing_one() -> None:
    constants = {"EPOCH" if name == "EPOCHS" else name: value for name, value in vars(main_cnn).items()}
    with pytest.raises(ValueError, match=r"^EPOCHS is missing; EPOCH is not a setting$"):
        TrainingConfig.from_constants(constants)


@pytest.mark.parametrize(
    ("dataset", "hint"),
    [
        ("Fashionmnist", '(did you mean "FashionMNIST"?)'),
        ("../picturess", f"(there is no folder {REPOSITORY.parent / 'picturess'})"),
        ("./digitss", f"(there is no folder {REPOSITORY / 'digitss'})"),
        ("/a\0b", "got '/a\\x00b'"),
    ],
)
def test_the_message_on_a_wrong_data_set_has_what_is_wrong(dataset: str, hint: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.from_constants(vars(main_cnn) | {"DATASET": dataset})
    assert str(error.value).endswith(hint)


KEY = "5ecre7" * 6 + "0123"


def test_a_key_in_the_place_of_its_path_is_refused_without_being_repeated() -> None:
    with pytest.raises(ValueError, match="WANDB_API_KEY_PATH must be the path of the file") as error:
        TrainingConfig.from_constants(vars(main_cnn) | {"WANDB_API_KEY_PATH": KEY, "EPOCHS": 0})
    assert KEY not in str(error.value) and "EPOCHS must be" in str(error.value)


@pytest.mark.parametrize(
    "value", [KEY, f" {KEY} ", f"local-{KEY}", f"export WANDB_API_KEY={KEY}", f"'{KEY}'", [KEY], "wandb_v1_secret"]
)
@pytest.mark.parametrize("name", ["DATASET", "DEVICE", "WANDB_MODE", "WANDB_PROJECT_NAME", "RUNS_DIR", "DATA_DIR"])
def test_a_key_in_another_constant_is_refused_without_being_repeated(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got what looks like an API key$") as error:
        TrainingConfig.from_constants(vars(main_cnn) | {name: value})
    assert KEY not in str(error.value)


@pytest.mark.parametrize("spelled", ["pictures", "pictures/", "./pictures"])
def test_a_folder_of_pictures_has_one_spelling(spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr("data_files.PROJECT_DIR", tmp_path)
    assert TrainingConfig.from_constants(vars(main_cnn) | {"DATASET": spelled}).dataset == "pictures"


def test_a_folder_that_is_named_like_a_key_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / KEY).mkdir()
    for runs_dir in (KEY, tmp_path / KEY / "runs"):
        assert TrainingConfig.from_constants(vars(main_cnn) | {"RUNS_DIR": runs_dir}).runs_dir == runs_dir


def test_a_key_on_the_command_line_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["main_cnn.py", "--wandb-api-key", KEY])
    with pytest.raises(SystemExit):
        read_command_line(vars(main_cnn), None)
    assert KEY not in capsys.readouterr().err


def test_an_error_of_the_configuration_does_not_contain_its_values() -> None:
    settings = TrainingConfig.from_constants(vars(main_cnn)).to_dict() | {"wandb_api_key_path": KEY}
    with pytest.raises(ValueError) as error:
        TrainingConfig(**settings)
    assert KEY not in str(error.value) and KEY not in repr(error.value)


@pytest.mark.parametrize("string", ["{[]: 1}", "(" * 500, "1" * 5000])
def test_an_odd_string_on_the_command_line_is_one_line(string: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main_cnn.py", f"--epochs={string}"])
    constants = read_command_line(vars(main_cnn), None)
    with pytest.raises(ValueError, match="EPOCHS must be an integer of at least 1"):
        TrainingConfig.from_constants(vars(main_cnn) | constants)


@pytest.mark.parametrize(
    "shape", ["3x64x96", [3, 64, 96], (3, 64, 96), (3, np.int64(64), np.uint8(96)), np.array([3, 64, 96])]
)
def test_an_image_shape_becomes_a_tuple(shape: Any) -> None:
    config = TrainingConfig.from_constants(vars(main_cnn) | {"IMAGE_SHAPE": shape})
    assert config.image_shape == (3, 64, 96) and [type(each) for each in config.image_shape] == [int, int, int]
    assert config.to_dict()["image_shape"] == [3, 64, 96]


@pytest.mark.parametrize(
    "line",
    [
        "EPOCHS: int = 3  # passes over the images",
        "EPOCHS = (  # passes over the images\n    3\n)",
        "EPOCHS = max(\n    3,\n    2,\n)  # passes over the images",
        'EPOCHS = len("#")  # passes over the images',
    ],
)
def test_comment_beside_a_constant_in_any_form_is_read(line: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(line)
    assert _read_comments(tmp_path / "script.py") == {"EPOCHS": "passes over the images"}


def test_comments_are_read_in_the_encoding_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_bytes("# coding: cp1252\nEPOCHS = 3  # für alle\n".encode("cp1252"))
    assert _read_comments(tmp_path / "script.py") == {"EPOCHS": "für alle"}


@pytest.mark.parametrize("content", [b"EPOCHS = 3  # f\xfcr alle\n", b"EPOCHS = = 3\n", None])
def test_script_that_cannot_be_read_has_no_comments(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "script.py").write_bytes(content)
    assert _read_comments(tmp_path / "script.py") == {}


def test_numbers_of_numpy_are_taken_as_numbers() -> None:
    changes = {
        "EPOCHS": np.int64(5),
        "LEARNING_RATE": np.float32(0.5),
        "MIRROR": np.bool_(True),
        "RNG_SEED": np.uint8(7),
    }
    config = TrainingConfig.from_constants(vars(main_cnn) | changes)
    found = (config.epochs, config.learning_rate, config.mirror, config.rng_seed)
    assert found == (5, 0.5, True, 7) and [type(value) for value in found] == [int, float, bool, int]


@pytest.mark.parametrize("value", [torch.tensor(0.1), np.array(0.1)])
def test_tensor_is_no_learning_rate(value: object) -> None:
    with pytest.raises(ConfigurationError, match="LEARNING_RATE must be a finite number above 0, got"):
        TrainingConfig.from_constants(vars(main_cnn) | {"LEARNING_RATE": value})
