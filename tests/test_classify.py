"""Predictions of a trained network for pictures: those of the run, any format, one line for a mistake."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, REPOSITORY, start_python
from PIL import Image

from classify import has_light_background, load_network, main, read_picture
from data_files import load_dataset
from experiment.errors import ConfigurationError
from experiment.files import relative_to_cwd
from experiment.results import ExperimentResult

OWN = "from models import ConvolutionalNeuralNetwork\n\nclass Own(ConvolutionalNeuralNetwork):\n    pass\n"


def save_digit(path: Path, number: int = 0) -> np.ndarray:
    """Save a test image as a picture; return its pixels."""
    pixels = load_dataset("Digits", DATA_DIR).test_images[number].numpy()
    Image.fromarray(pixels).save(path)
    return pixels


def test_predictions_for_the_test_images_are_those_of_the_run(cnn_result: ExperimentResult) -> None:
    dataset = load_dataset("Digits", DATA_DIR)
    predictions = load_network(cnn_result.run_dir).predict(dataset.test_images).argmax(1)
    assert cnn_result.final is not None
    accuracy = (predictions == dataset.test_labels).double().mean().item()
    assert accuracy == pytest.approx(cnn_result.final.accuracy, abs=0.01)  # trained in bfloat16, evaluated in float32


def test_a_grey_picture_of_28_by_28_pixels_is_unchanged(tmp_path: Path) -> None:
    pixels = save_digit(tmp_path / "digit.png")
    assert np.array_equal(read_picture(tmp_path / "digit.png").numpy(), pixels)


def test_the_command_prints_one_line_per_picture_with_three_classes(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for number, path in enumerate(paths):
        save_digit(Path(path), number)
    main([*paths, "--run", run_dir.name[-10:], "--runs-dir", str(run_dir.parent)])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"Predictions of the final network of {relative_to_cwd(run_dir)}:"
    assert [line.split(": ")[0] for line in lines] == paths
    assert all(line.count("class ") == 3 and line.count(" %") == 3 for line in lines)


def test_the_newest_run_is_the_default(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_digit(tmp_path / "digit.png")
    main([str(tmp_path / "digit.png"), "--runs-dir", str(run_dir.parent)])
    assert "digit.png: class " in capsys.readouterr().out


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
def test_a_picture_of_any_mode_is_read_as_the_same_image(mode: str, tmp_path: Path) -> None:
    modes()[mode].save(tmp_path / "picture.png")
    assert torch.equal(read_picture(tmp_path / "picture.png"), torch.from_numpy(np.array(modes()["grey"])))


@pytest.mark.parametrize("size", [(280, 280), (300, 200), (9, 40), (1, 1)])
def test_a_picture_of_any_size_becomes_28_by_28_with_its_aspect_ratio(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels[size[1] // 4 : -(size[1] // 4) or None, size[0] // 4 : -(size[0] // 4) or None] = 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    image = read_picture(tmp_path / "picture.png")
    assert image.shape == (28, 28) and image.dtype == torch.uint8
    if size == (300, 200):
        rows, columns = (image > 127).any(1).sum().item(), (image > 127).any(0).sum().item()
        assert columns / rows == pytest.approx(1.5, rel=0.2)


def test_invert_inverts_a_picture(tmp_path: Path) -> None:
    pixels = save_digit(tmp_path / "light.png")
    Image.fromarray(255 - pixels).save(tmp_path / "dark.png")
    assert np.array_equal(read_picture(tmp_path / "dark.png", invert=True).numpy(), pixels)


def test_a_transparent_background_is_dark_also_with_invert(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 10, 18, 18))
    picture.save(tmp_path / "dark.png")
    image = read_picture(tmp_path / "dark.png", invert=True)
    assert image[0, 0] == 0 and image[14, 14] == 255


def test_a_picture_that_has_light_background_is_warned_of(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = save_digit(tmp_path / "right.png")
    Image.fromarray(255 - pixels).save(tmp_path / "wrong.png")
    main([str(tmp_path / "right.png"), str(tmp_path / "wrong.png"), "--runs-dir", str(run_dir.parent)])
    errors = capsys.readouterr().err
    assert errors.count("try --invert") == 1 and "wrong.png looks dark on light" in errors


def test_no_test_image_has_a_light_background() -> None:
    assert not any(map(has_light_background, load_dataset("Digits", DATA_DIR).test_images))


def errors_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that the command ends with, with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    heading, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and heading == "Bad configuration:"
    return line


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_a_file_that_is_not_a_picture_is_one_line(
    content: bytes, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    assert "bad.png cannot be read" in errors_of([str(tmp_path / "bad.png"), "--runs-dir", str(run_dir.parent)], capsys)


def test_a_truncated_picture_is_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8)).save(buffer, format="png")
    (tmp_path / "bad.png").write_bytes(buffer.getvalue()[:2000])
    assert "bad.png cannot be read" in errors_of([str(tmp_path / "bad.png"), "--runs-dir", str(run_dir.parent)], capsys)


def test_a_missing_picture_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = errors_of(["nowhere.png", "--runs-dir", str(run_dir.parent)], capsys)
    assert "nowhere.png cannot be read: No such file" in line


def test_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_digit(tmp_path / "digit.png")
    line = errors_of([str(tmp_path / "digit.png"), "--runs-dir", str(tmp_path / "none")], capsys)
    assert "There is no finished run in" in line


def rename_network(run_dir: Path, name: str) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config["identity"]["network"]["name"] = name
    (run_dir / "config.json").write_text(json.dumps(config))


def test_a_network_outside_models_py_needs_its_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename_network(run_dir, "Own")
    save_digit(tmp_path / "digit.png")
    arguments = [str(tmp_path / "digit.png"), "--runs-dir", str(run_dir.parent)]
    assert "Own is not in models.py. Name its file: --network file.py:Own" in errors_of(arguments, capsys)
    (tmp_path / "own.py").write_text(OWN)
    main([*arguments, "--network", f"{tmp_path / 'own.py'}:Own"])
    assert "digit.png: class " in capsys.readouterr().out


def test_a_network_that_the_parameters_do_not_fit_is_one_line(run_dir: Path) -> None:
    rename_network(run_dir, "NeuralNetwork")
    with pytest.raises(ConfigurationError, match="do not fit NeuralNetwork as it is now"):
        load_network(run_dir)


def test_an_edited_network_that_the_parameters_still_fit_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    edited = "def forward(self, images): return -super().forward(images)"
    (tmp_path / "edited.py").write_text(OWN.replace("pass", edited))
    with pytest.raises(ConfigurationError, match="is not the network that was trained"):
        load_network(run_dir, f"{tmp_path / 'edited.py'}:Own")


def test_a_run_without_a_final_network_is_one_line(run_dir: Path) -> None:
    (run_dir / "model.pt").unlink()
    with pytest.raises(ConfigurationError, match=r"has no model\.pt"):
        load_network(run_dir)


def test_the_command_runs_in_its_own_process(run_dir: Path, tmp_path: Path) -> None:
    save_digit(tmp_path / "digit.png")
    process = start_python(tmp_path, str(REPOSITORY / "classify.py"), "digit.png", "--runs-dir", "runs")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and "\ndigit.png: class " in output


def test_importing_the_command_imports_no_library_for_pictures() -> None:
    code = "import sys, classify; print('PIL' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True) == "False\n"


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


def test_the_file_of_a_network_may_contain_dataclasses_and_import_its_neighbours(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "with_a_dataclass.py").write_text(WITH_A_DATACLASS)
    (tmp_path / "neighbour.py").write_text("from models import ConvolutionalNeuralNetwork")
    assert load_network(run_dir, f"{tmp_path / 'with_a_dataclass.py'}:Own").class_names[:2] == ["0", "1"]
