"""What pip is told: pins that every Python we name can have, and a wheel that holds every folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mymodels
from mymodels import extras
from mymodels.extras import install_command

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = [f"3.{minor}.9" for minor in range(int(re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)[1]), 15)]


def test_each_pin_is_for_pythons_that_its_package_is_for() -> None:
    """By the metadata of what is installed, as far as it is."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    checked, wrong = 0, []
    for pin in map(Requirement, filter(None, lines)):
        try:
            package = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if package["Version"].partition("+")[0] not in pin.specifier:
            continue
        wanted = SpecifierSet(package.get("Requires-Python") or "")
        for python in PYTHONS:
            here = {"python_version": python.rpartition(".")[0], "python_full_version": python}
            if (pin.marker is None or pin.marker.evaluate(here)) and python not in wanted:
                wrong.append(f"{pin}: Python {python}, but it wants {wanted}")
        checked += 1
    assert checked > 10 and not wrong, wrong


def test_the_wheel_holds_every_file_of_the_package(dist: Path) -> None:
    """And the command's entry and the mark of types; nothing of the tests or the shipped folders."""
    (wheel,) = dist.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "mymodels").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT)) for path in files} | {"mymodels_command.py"}
    assert "mymodels/py.typed" in held


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The wheel and the source distribution, built from what is in the repository."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("mymodels", "mymodels_command.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    code = f"from setuptools import build_meta as b; b.build_wheel({str(made)!r}); b.build_sdist({str(made)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return made


def test_the_source_distribution_holds_the_package_and_no_tests(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"mymodels/py.typed", "mymodels_command.py", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_installed_wheel_gives_the_command_and_the_data(dist: Path, tmp_path: Path) -> None:
    """In a folder of its own, with this environment's other packages."""
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", target, wheel], check=True)
    env = {"PYTHONPATH": str(target), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, target / "bin" / "mymodels", "--version"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"mymodels {mymodels.__version__}\n"), done
    for file in ("py.typed", "released_code.txt", "training/sample_text/PROVENANCE.md"):
        assert (target / "mymodels" / file).is_file()


EXTRAS = ("onnx", "tf", "gguf", "h5", "flax", "finetune", "lora", "tensorboard")


def test_the_command_for_an_extra_names_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    assert set(EXTRAS) <= set(re.findall(r'^([\w-]+) = \["', PYPROJECT, re.M))
    for extra in EXTRAS:
        words = shlex.split(install_command(extra))
        listed = re.findall(r'"([^"]+)"', re.search(rf"^{extra} = \[(.*)\]", PYPROJECT, re.M)[1])
        assert words[:2] == ["pip", "install"]
        assert set(map(Requirement, words[2:])) == set(map(Requirement, listed))


def test_the_command_for_an_extra_is_for_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another environment's pip is first on the path; uv's has no pip; pipx's is pipx's own; nothing is installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(install_command("gguf")) == [sys.executable, "-m", "pip", "install", "gguf>=0.17"]
    with monkeypatch.context() as patch:
        patch.setattr(extras, "find_spec", lambda name: None)
        words = shlex.split(install_command("gguf"))
        assert words == ["uv", "pip", "install", "--python", sys.executable, "gguf>=0.17"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", str(tmp_path))
        (tmp_path / "pipx_metadata.json").write_text("{}")
        assert shlex.split(install_command("gguf")) == ["pipx", "inject", tmp_path.name, "gguf>=0.17"]

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", absent)
    assert shlex.split(install_command("gguf"))[-1] == f"{ROOT}[gguf]"  # a path with an extra, which pip takes
