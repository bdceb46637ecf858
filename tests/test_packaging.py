"""What pip is told: pins that every Python we name can have, and a wheel that holds every folder."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """And the command's entry and the mark of types; nothing of the tests or the shipped folders."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("mymodels", "mymodels_command.py", "pyproject.toml", "README.md", "LICENSE", "tests"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "mymodels").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT)) for path in files} | {"mymodels_command.py"}
    assert "mymodels/py.typed" in held
