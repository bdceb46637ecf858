"""The command that installs the packages of an extra."""

import shlex
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement


def install_command(extra: str) -> str:
    """The `pip install` command for the packages of `extra`, such as "onnx".

    It lists the packages, as `mymodels[extra]` works only if mymodels was installed from an index.
    """
    try:
        requirements = [Requirement(line) for line in requires("mymodels") or ()]
    except PackageNotFoundError:  # mymodels is on the path, but not installed
        return f"pip install 'mymodels[{extra}]'"
    packages = [
        f"{package.name}{package.specifier}"
        for package in requirements
        if package.marker and package.marker.evaluate({"extra": extra}) and not package.marker.evaluate({"extra": ""})
    ]
    return shlex.join(["pip", "install", *packages])
