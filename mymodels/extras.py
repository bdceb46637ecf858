"""The command that installs an extra."""

import shlex
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement


def install_command(extra: str) -> str:
    """A `pip install` of the packages of `extra`, such as "onnx".

    It names the packages and not `mymodels[extra]`, as that works only for who installed mymodels from an index.
    """
    try:
        wanted = [Requirement(line) for line in requires("mymodels") or ()]
    except PackageNotFoundError:  # the source is on the path, and nothing is installed
        return f"pip install 'mymodels[{extra}]'"
    packages = [
        f"{package.name}{package.specifier}"
        for package in wanted
        if package.marker and package.marker.evaluate({"extra": extra}) and not package.marker.evaluate({"extra": ""})
    ]
    return shlex.join(["pip", "install", *packages])
