"""The command that installs the packages of an extra."""

import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement


def install_command(extra: str) -> str:
    """The command that installs the packages of `extra`, such as "onnx", into this environment.

    It lists the packages, as `mymodels[extra]` works only if mymodels was installed from an index.
    """
    try:
        requirements = [Requirement(line) for line in requires("mymodels") or ()]
    except PackageNotFoundError:  # mymodels is on the path, but not installed
        requirements = []
    packages = [
        f"{package.name}{package.specifier}"
        for package in requirements
        if package.marker and package.marker.evaluate({"extra": extra}) and not package.marker.evaluate({"extra": ""})
    ]
    if not packages:  # or an editable installation is older than the extra
        checkout = Path(__file__).parents[1]
        packages = [f"{checkout if (checkout / 'pyproject.toml').is_file() else 'mymodels'}[{extra}]"]
    return shlex.join([*_installer(), *packages])


def _installer() -> list[str]:
    """The start of a command that installs into this environment, whatever made it."""
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return ["pipx", "inject", environment.name]
    if find_spec("pip") is None:  # uv makes environments without pip
        return ["uv", "pip", "install", "--python", sys.executable]
    pip = shutil.which("pip")
    if pip and Path(pip).parent == Path(sys.executable).parent:
        return ["pip", "install"]
    return [sys.executable, "-m", "pip", "install"]
