"""The repository itself: what its configuration files promise."""

import yaml
from conftest import REPOSITORY


def test_conda_installs_the_requirements_file() -> None:
    environment = yaml.safe_load((REPOSITORY / "cnn_environment.yml").read_text())
    assert environment["name"] == "cnn"
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]
