"""What `make` installs: PyTorch's CPU build if its index is reachable; tested on a local index with dummy wheels."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import REPOSITORY

PYTORCH = {"torch": "2.14.1", "torchvision": "0.29.1"}
DISTRIBUTIONS = packages_distributions()
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default build is the CPU build")


def write_wheels(index: Path, label: str, *names: str) -> None:
    """Write stand-ins of torch and torchvision, as an index stores them; they can be installed but not imported."""
    for name in names:
        version = PYTORCH[name]
        (index / name).mkdir(parents=True)
        with ZipFile(index / name / f"{name}-{version}{label}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}{label}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}{label}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a server that has a default index, one of CPU builds, and one that has torch's alone."""
    folder = tmp_path_factory.mktemp("index")
    write_wheels(folder / "default", "", *PYTORCH)
    write_wheels(folder / "cpu", "+cpu", *PYTORCH)
    write_wheels(folder / "half", "+cpu", "torch")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty environment, to be copied."""
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def checkout(environment: Path, tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the Makefile, PyTorch's requirements alone, and an environment of its own."""
    shutil.copytree(environment, tmp_path / ".venv", symlinks=True)
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    requirements = (REPOSITORY / "requirements.txt").read_text().splitlines()
    (tmp_path / "requirements.txt").write_text("\n".join(line for line in requirements if line.startswith("torch")))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # the machine's own settings may name further places to look in
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/default")
    return tmp_path


def make(checkout: Path, *arguments: str) -> tuple[str, dict[str, str]]:
    """Set up with make; return its output and the installed versions."""
    command = ["make", ".venv/installed", *arguments]
    run = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    installed = [path.name.split("-")[:2] for path in checkout.glob(".venv/lib/*/site-packages/torch*.dist-info")]
    return run.stdout, {name: version.removesuffix(".dist") for name, version in installed}


@pytest.mark.slow
@on_linux
def test_the_cpu_build_is_installed_once_if_its_index_is_reachable(checkout: Path, index: str) -> None:
    output, installed = make(checkout, f"CPU_INDEX={index}/cpu")
    assert installed == {name: f"{version}+cpu" for name, version in PYTORCH.items()}
    assert "default build" not in output
    assert "up to date" in make(checkout, f"CPU_INDEX={index}/cpu")[0]


@on_linux
def test_an_unreachable_index_is_reported_in_one_line(checkout: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        output, installed = make(checkout, f"CPU_INDEX=http://127.0.0.1:{closed.getsockname()[1]}")
    assert installed == PYTORCH
    assert output.count("default build") == 1 and "Traceback" not in output and "WARNING" not in output


@pytest.mark.slow
@on_linux
def test_both_packages_are_the_default_build_if_the_cpu_index_lacks_one(checkout: Path, index: str) -> None:
    output, installed = make(checkout, f"CPU_INDEX={index}/half")
    assert installed == PYTORCH and "no matching build" in output


@on_linux
@pytest.mark.slow
def test_an_index_that_hangs_is_abandoned(checkout: Path) -> None:
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        output, installed = make(checkout, f"CPU_INDEX=http://127.0.0.1:{silent.getsockname()[1]}")
    assert installed == PYTORCH and "is not reachable" in output
    assert time.monotonic() - start < 20  # at most 15 for the index, and a few for pip


@on_linux
@pytest.mark.parametrize("system, arguments", [("Linux", ["GPU=1"]), ("Darwin", [])])
def test_the_cpu_index_is_not_used_for_a_gpu_or_on_another_system(
    checkout: Path, system: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "uname").write_text(f"#!/bin/sh\necho {system}\n")
    (checkout / "uname").chmod(0o755)
    monkeypatch.setenv("PATH", str(checkout), prepend=os.pathsep)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        assert make(checkout, f"CPU_INDEX=http://127.0.0.1:{unused.getsockname()[1]}", *arguments)[1] == PYTORCH
        unused.setblocking(False)
        with pytest.raises(BlockingIOError):
            unused.accept()


@pytest.mark.parametrize(("gpu", "device"), [("", ""), ("1", " --device auto")])
def test_make_trains_on_the_gpu_if_its_build_was_requested(gpu: str, device: str) -> None:
    command = ["make", "--no-print-directory", "-n", "train", f"GPU={gpu}"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert printed.stdout.rstrip().endswith(f"main_cnn.py{device}")


@on_linux
@pytest.mark.slow
def test_an_environment_without_pip_is_completed(checkout: Path, index: str) -> None:
    shutil.rmtree(checkout / ".venv")
    venv.create(checkout / ".venv")
    assert make(checkout, f"CPU_INDEX={index}/cpu", f"PYTHON={sys.executable}")[1].keys() == PYTORCH.keys()


def test_a_python_that_is_too_old_is_refused_before_any_download(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    old = tmp_path / "python3.10"
    pretend = "import sys; sys.version_info, sys.version = (3, 10), '3.10.13 (main)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    run = subprocess.run(["make", "train", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0 and not (tmp_path / ".venv").exists()
    assert run.stderr.startswith(f"Python 3.11 or newer is needed, but {old} is 3.10.13. ")


def imported(*patterns: str) -> set[str]:
    """Return the distributions of all packages that the files import, at their top or in a function."""
    paths = [path for pattern in patterns for path in REPOSITORY.glob(pattern)]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    project = {path.stem for path in [*paths, *REPOSITORY.glob("*.py")]} | {"experiment", "comparison"}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - project
    return {DISTRIBUTIONS[package][0].lower().replace("_", "-") for package in packages}


def required(file: str) -> dict[str, str]:
    """Return the packages that a requirements file names, with their bounds."""
    lines = [line.partition(" ")[0] for line in (REPOSITORY / file).read_text().splitlines()]
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", line) for line in lines if line and line[0] not in "#-"]
    return {match[1]: match[2] for match in found if match}


def test_requirements_name_every_imported_package() -> None:
    only_in_a_notebook = {"ipython"}  # installed with every notebook, and imported only there
    assert imported("*.py", "experiment/*.py", "comparison/*.py") - only_in_a_notebook == set(
        required("requirements.txt")
    )


def test_development_requirements_name_every_package_of_the_tests() -> None:
    everything = required("requirements.txt") | required("requirements-dev.txt")
    assert imported("tests/*.py", "tests/benchmarks/*.py", "docs/*.py") <= set(everything)


def test_every_requirement_has_a_lower_bound_and_the_next_major_version_as_upper_bound() -> None:
    for name, bounds in required("requirements.txt").items():
        match = re.fullmatch(r">=(\d+)[\d.]*,<(\d+)", bounds)
        assert match and int(match[2]) == int(match[1]) + 1, name
