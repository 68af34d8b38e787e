"""Predictions of a trained network for pictures: those of the run, any format, one line for a mistake."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import DATA_DIR, REPOSITORY, start_python
from PIL import Image

from classify import background_advice, load_network, main, read_picture
from comparison.run_reader import read_run
from data_files import load_dataset
from experiment.errors import ConfigurationError
from experiment.results import ExperimentResult

DIGITS = load_dataset("Digits", DATA_DIR).test_images
OWN = "from models import ConvolutionalNeuralNetwork\n\nclass Own(ConvolutionalNeuralNetwork):\n    pass\n"
Command = Callable[..., tuple[str, str]]


@pytest.fixture
def command(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Return a function that calls the command beside a run and digit.png, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    save(DIGITS[0].numpy(), "digit.png")

    def call(*arguments: str) -> tuple[str, str]:
        main(["--runs-dir", "runs", *arguments])
        return capsys.readouterr()

    return call


@pytest.fixture
def error_line(command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that calls the command and returns the one line that it ends with, with status 2."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        heading, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and heading == "Bad configuration:"
        return line

    return call


def save(pixels: np.ndarray, path: str | Path) -> None:
    Image.fromarray(pixels).save(path)


def rename_network(run_dir: Path, name: str) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config["identity"]["network"]["name"] = name
    (run_dir / "config.json").write_text(json.dumps(config))


def test_predictions_for_the_test_images_are_those_of_the_run(cnn_result: ExperimentResult) -> None:
    dataset = load_dataset("Digits", DATA_DIR)
    predictions = load_network(read_run(cnn_result.run_dir)).predict(dataset.test_images).argmax(1)
    assert cnn_result.final is not None
    accuracy = (predictions == dataset.test_labels).double().mean().item()
    assert accuracy == pytest.approx(cnn_result.final.accuracy, abs=0.01)  # trained in bfloat16, evaluated in float32


def test_command_prints_one_line_per_picture_with_three_classes(command: Command, run_dir: Path) -> None:
    save(DIGITS[1].numpy(), "other.png")
    heading, *lines = command("digit.png", "other.png", "--run", run_dir.name[-10:])[0].splitlines()
    assert heading == f"Predictions of the final network of runs/{run_dir.name}:"
    assert [line.split(": ")[0] for line in lines] == ["digit.png", "other.png"]
    assert all(line.count("class ") == 3 and line.count(" %") == 3 for line in lines)


def test_folder_is_a_line_per_picture_and_a_table_with_the_label_of_each_class(command: Command) -> None:
    for name, digit in (("3/a, b.png", 0), ("3/c.png", 1), ("unknown/d.png", 2)):
        Path("digits", name).parent.mkdir(parents=True, exist_ok=True)
        save(DIGITS[digit].numpy(), Path("digits", name))
    Path("digits/notes.txt").write_text("no picture")
    Path("digits/._c.png").write_text("macOS writes such files")
    output = command("digits", "digit.png", "--csv", "table.csv")[0].splitlines()
    assert [line.rpartition(": ")[0] for line in output[1:5]] == [
        "digits/3/a, b.png",
        "digits/3/c.png",
        "digits/unknown/d.png",
        "digit.png",
    ]
    assert output[5] == "Table: table.csv"
    table = pandas.read_csv("table.csv", keep_default_na=False, dtype={"label": str})
    assert table["file"][0] == "digits/3/a, b.png" and list(table["label"]) == ["3", "3", "", ""]
    assert float(table["label_doubt"][1]) == pytest.approx(1 - table["p(3)"][1])
    assert list(table)[:5] == ["file", "split", "label", "prediction", "label_doubt"] and len(list(table)) == 15


def test_advice_on_the_background_of_many_pictures_is_one_line(command: Command) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(255 - DIGITS[0].numpy(), name)
    errors = command("a.png", "b.png", "c.png")[1]
    assert errors.endswith("try --invert. So do 2 more.\n") and errors.count("\n") == 1


def test_folder_without_a_picture_is_one_line(error_line: Callable[..., str]) -> None:
    Path("empty").mkdir()
    assert error_line("empty") == "  there is no picture in empty"


def test_folder_that_cannot_be_read_is_one_line(error_line: Callable[..., str]) -> None:
    Path("somedir").mkdir()
    Path("somedir/circle").symlink_to("circle")
    assert error_line("somedir") == "  somedir/circle cannot be read (Too many levels of symbolic links)."


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/x.csv", "  the table must be a file in an existing folder, got --csv missing/x.csv"),
        (".", "  the table must be a file, got the folder --csv ."),
    ],
)
def test_table_in_a_missing_folder_or_called_like_a_folder_is_refused_before_anything_is_predicted(
    path: str, message: str, error_line: Callable[..., str]
) -> None:
    assert error_line("digit.png", "--run", "missing", "--csv", path) == message


@pytest.mark.parametrize("network", ["nets/mlp.py:Own", "nets.mlp:Own"])
def test_network_in_a_package_with_relative_imports_is_found(
    network: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("nets").mkdir()
    Path("nets/__init__.py").touch()
    Path("nets/base.py").write_text("from models import ConvolutionalNeuralNetwork\n")
    Path("nets/mlp.py").write_text(OWN.replace("from models", "from .base"))
    assert "digit.png: " in command("digit.png", "--network", network)[0]
    for name in ("nets.mlp", "nets.base", "nets"):
        del sys.modules[name]


def test_module_that_does_not_exist_is_one_line(error_line: Callable[..., str]) -> None:
    assert "there is no module nowhere" in error_line("digit.png", "--network", "nowhere.mlp:Own")


def test_file_that_trains_when_it_is_imported_is_one_line(error_line: Callable[..., str]) -> None:
    call = "from experiment.run import run_experiment\nrun_experiment(Own, None)\n"
    Path("own.py").write_text(OWN + call)
    assert error_line("digit.png", "--network", "own.py:Own") == (
        '  own.py trains when it is imported. Put the call of run_experiment under if __name__ == "__main__":'
    )


def test_file_that_reads_its_arguments_when_it_is_imported_sees_none(command: Command) -> None:
    Path("own.py").write_text(f"import argparse\nargparse.ArgumentParser().parse_args()\n{OWN}")
    assert "digit.png: " in command("digit.png", "--network", "own.py:Own")[0]


def test_file_that_exits_when_it_is_imported_is_one_line(error_line: Callable[..., str]) -> None:
    Path("own.py").write_text(f"{OWN}raise SystemExit(3)\n")
    line = error_line("digit.png", "--network", "own.py:Own")
    assert line.startswith("  own.py ends the program when it is imported (exit status 3). Put what it does, ")


def test_command_predicts_with_the_newest_run_in_its_own_process(run_dir: Path, tmp_path: Path) -> None:
    save(DIGITS[0].numpy(), tmp_path / "digit.png")
    process = start_python(tmp_path, str(REPOSITORY / "classify.py"), "digit.png", "--runs-dir", "runs")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and "\ndigit.png: class " in output


def test_grey_picture_of_28_by_28_pixels_is_unchanged(tmp_path: Path) -> None:
    save(DIGITS[0].numpy(), tmp_path / "digit.png")
    assert torch.equal(read_picture(tmp_path / "digit.png"), DIGITS[0])


def modes() -> dict[str, Image.Image]:
    """Return the same picture, light on dark, in all modes that pictures are stored in."""
    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[8:20, 12:16] = 255
    grey = Image.fromarray(pixels)
    transparent = Image.new("RGBA", (28, 28), (255, 255, 255, 0))
    transparent.paste((255, 255, 255, 255), (12, 8, 16, 20))
    return {
        "grey": grey,
        "colours": grey.convert("RGB"),
        "palette": grey.convert("P"),
        "black and white": grey.convert("1"),
        "16 bits": Image.fromarray(pixels.astype(np.uint16) * 257),
        "transparent": transparent,
        "grey and transparent": transparent.convert("LA"),
    }


@pytest.mark.parametrize("mode", modes())
def test_picture_of_any_mode_is_read_as_the_same_image(mode: str, tmp_path: Path) -> None:
    modes()[mode].save(tmp_path / "picture.png")
    assert torch.equal(read_picture(tmp_path / "picture.png"), torch.from_numpy(np.array(modes()["grey"])))


def test_rotation_in_exif_data_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was held upside down
    Image.fromarray(DIGITS[0].numpy()).save(tmp_path / "digit.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "digit.png"), DIGITS[0].flip(0, 1))


@pytest.mark.parametrize("size", [(280, 280), (300, 200), (9, 40), (1, 1)])
def test_picture_of_any_size_becomes_28_by_28(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size).save(tmp_path / "picture.png")
    image = read_picture(tmp_path / "picture.png")
    assert image.shape == (28, 28) and image.dtype == torch.uint8


def test_picture_keeps_its_aspect_ratio(tmp_path: Path) -> None:
    pixels = np.zeros((200, 300), dtype=np.uint8)
    pixels[50:-50, 75:-75] = 255
    save(pixels, tmp_path / "picture.png")
    is_light = read_picture(tmp_path / "picture.png") > 127
    assert is_light.any(0).sum() / is_light.any(1).sum() == pytest.approx(1.5, rel=0.2)


def test_invert_inverts_a_picture(tmp_path: Path) -> None:
    save(255 - DIGITS[0].numpy(), tmp_path / "dark.png")
    assert torch.equal(read_picture(tmp_path / "dark.png", invert=True), DIGITS[0])


def test_transparent_background_is_dark_also_with_invert(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 10, 18, 18))
    picture.save(tmp_path / "dark.png")
    image = read_picture(tmp_path / "dark.png", invert=True)
    assert image[0, 0] == 0 and image[14, 14] == 255


def test_picture_with_a_light_background_costs_one_line(command: Command) -> None:
    save(255 - DIGITS[0].numpy(), "wrong.png")
    errors = command("digit.png", "wrong.png")[1]
    assert errors.count("try --invert") == 1 and "wrong.png looks dark on light" in errors


def test_no_test_image_has_a_light_background() -> None:
    assert not any(background_advice(image, 0.0, inverted=False) for image in DIGITS)


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="png")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20), truncated_png()])
def test_file_that_is_not_a_picture_is_one_line(content: bytes, error_line: Callable[..., str]) -> None:
    Path("bad.png").write_bytes(content)
    assert "bad.png cannot be read" in error_line("bad.png")


def test_missing_picture_is_one_line(error_line: Callable[..., str]) -> None:
    assert "nowhere.png cannot be read: No such file" in error_line("nowhere.png")


def test_folder_without_runs_is_one_line(error_line: Callable[..., str]) -> None:
    assert "There is no finished run in none:" in error_line("digit.png", "--runs-dir", "none")


def test_network_outside_models_py_needs_its_file(
    command: Command, error_line: Callable[..., str], run_dir: Path
) -> None:
    rename_network(run_dir, "Own")
    assert "or the function that builds it: --network file.py:Own" in error_line("digit.png")
    Path("own.py").write_text(OWN + "def build():\n    return Own()\n")
    assert "digit.png: class " in command("digit.png", "--network", "own.py:Own")[0]
    assert "digit.png: class " in command("digit.png", "--network", "own.py:build")[0]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("missing.py:Own", "--network must be file.py:Class with an existing file, got 'missing.py:Own'"),
        ("own.py:Other", "own.py has no Other"),
        ("own.py:width", "the network must be built without arguments"),
        ("own.py:nothing", "the function that builds the network must return an nn.Module, got NoneType"),
        ("own.py:built", "got a Own that is already built"),
    ],
)
def test_name_that_is_no_network_is_one_line(network: str, message: str, error_line: Callable[..., str]) -> None:
    Path("own.py").write_text(f"{OWN}def nothing():\n    pass\n\ndef width(number):\n    pass\n\nbuilt = Own()\n")
    assert message in error_line("digit.png", "--network", network)


def test_network_that_the_parameters_do_not_fit_is_one_line(run_dir: Path) -> None:
    rename_network(run_dir, "NeuralNetwork")
    with pytest.raises(ConfigurationError, match="do not fit NeuralNetwork as it is now"):
        load_network(read_run(run_dir))


def test_edited_network_that_the_parameters_still_fit_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    edited = "def forward(self, images): return -super().forward(images)"
    (tmp_path / "edited.py").write_text(OWN.replace("pass", edited))
    with pytest.raises(ConfigurationError, match="is not the network that was trained"):
        load_network(read_run(run_dir), f"{tmp_path / 'edited.py'}:Own")


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_damaged_model_is_one_line(content: bytes, run_dir: Path) -> None:
    (run_dir / "model.pt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="do not fit ConvolutionalNeuralNetwork"):
        load_network(read_run(run_dir))


def test_run_without_a_final_network_is_one_line(run_dir: Path) -> None:
    (run_dir / "model.pt").unlink()
    with pytest.raises(ConfigurationError, match=r"has no model\.pt"):
        load_network(read_run(run_dir))


WITH_A_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from neighbour import ConvolutionalNeuralNetwork

@dataclass
class Sizes:
    width: int = 28

class Own(ConvolutionalNeuralNetwork):
    pass
"""


def test_file_of_a_network_may_contain_dataclasses_and_import_its_neighbours(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "with_a_dataclass.py").write_text(WITH_A_DATACLASS)
    (tmp_path / "neighbour.py").write_text("from models import ConvolutionalNeuralNetwork")
    assert load_network(read_run(run_dir), f"{tmp_path / 'with_a_dataclass.py'}:Own").class_names[:2] == ["0", "1"]


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0])
def test_floating_point_tiff_is_scaled_by_its_range(largest: float, tmp_path: Path) -> None:
    pixels = np.zeros((28, 28), dtype=np.float32)
    pixels[8:20, 12:16] = largest
    Image.fromarray(pixels).save(tmp_path / "picture.tiff")
    image = read_picture(tmp_path / "picture.tiff")
    assert (image[0, 0], image[14, 14]) == (0, 255)
