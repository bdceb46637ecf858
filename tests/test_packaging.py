"""What pip is told: pins that every Python we name can have, and a wheel that holds every folder."""

import re
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


def test_the_wheel_holds_every_folder() -> None:
    listed = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1]))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mymodels").rglob("*.py")}
    assert folders == listed
