"""Checks of requirements that pip installs from elsewhere than PyPI, so that their code is unknown."""

import re
import sys
from collections.abc import Iterator
from typing import Any

from .repo_snapshot import Finding, Folder, brief, strings

if sys.version_info >= (3, 11):
    import tomllib  # novm
else:
    import tomli as tomllib

MAX_BYTES = 1_000_000
_KNOWN_INDEX = re.compile(
    r"https://(pypi\.org/simple|pypi\.python\.org/simple|download\.pytorch\.org/whl(/[\w.]+)?)/?$"
)
_OPTION = re.compile(
    r"^\s*(-i|--index-url|--pypi-url|--extra-index-url|-f|--find-links|--trusted-host)(?:[ =]\s*|(?=https?:))(\S+)"
)
_EDITABLE = re.compile(r"^\s*(-e|--editable)[ =]\s*(\S+)")
_ADDRESS = re.compile(r"((git|hg|svn|bzr)\+\S+|(https?|ftp|file)://\S+|git@\S+)")
_LOCAL = re.compile(r"^\s*(\.{0,2}/\S*|[A-Za-z]:\\\S*|~\S*|\S+\.(whl|tar\.gz|zip))(\s|;|$)")
_FILES = re.compile(r"(^|/)(requirements[\w.-]*\.(txt|in)|constraints[\w.-]*\.txt)$|(^|/)requirements/[\w.-]+\.txt$")


def requirements(folder: Folder) -> Iterator[Finding]:
    """Requirement files and `pyproject.toml`: addresses, other indexes, paths, and insecure hosts."""
    for name, path in folder.files.items():
        if _FILES.search(name):
            with path.open("rb") as file:
                text = file.read(MAX_BYTES).decode("utf-8", errors="replace")
            for number, line in enumerate(text.replace("\\\n", " ").split("\n"), 1):
                yield from _of_line(name, f"{name}:{number}", re.sub(r"(^|\s)#.*", "", line))
        elif name.rpartition("/")[2] == "pyproject.toml":
            with path.open("rb") as file:
                data = file.read(MAX_BYTES)
            try:
                value: Any = tomllib.loads(data.decode("utf-8", errors="replace"))
            except (tomllib.TOMLDecodeError, RecursionError):
                continue  # not read by any installer
            for key, text in _dependencies(value):
                yield from _of_line(name, f"{name}: {key[:80]}", text)


def _dependencies(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, text in strings(value):
        if re.search(r"(^|\.)((optional-)?dependencies|requires|dependency-groups)\b", key) or (
            re.search(r"^tool\.(uv|poetry|pdm|hatch)\.", key) and re.search(r"\.(url|git|path|index-url)$", key)
        ):
            yield key, text


def _of_line(name: str, where: str, line: str) -> Iterator[Finding]:
    remedy = "require releases from PyPI, by name and version"
    if option := _OPTION.match(line):
        if _KNOWN_INDEX.match(option[2]):
            return
        shown = brief(re.sub(r"//[^/@]*@", "//…@", option[2]))
        yield Finding("failed", f"{name} has pip look for packages at {shown}, by {option[1]}", where, remedy)
    elif editable := _EDITABLE.match(line):
        yield Finding(
            "failed", f"{name} has pip install the code at {brief(editable[2])}, by {editable[1]}", where, remedy
        )
    elif address := _ADDRESS.search(line):
        pinned = re.search(r"@[0-9a-f]{40}\b|#sha256=[0-9a-f]{64}\b", address[1])
        ours = re.match(
            r"(git\+)?https://github\.com/huggingface/|https://(download\.pytorch\.org|files\.pythonhosted\.org)/",
            address[1],
        )
        shown = brief(re.sub(r"//[^/@]*@", "//…@", address[1]))
        status = "warning" if pinned or ours else "failed"
        yield Finding(status, f"{name} has pip install {shown}, which is not on PyPI", where, remedy)
    elif local := _LOCAL.match(line):
        yield Finding("failed", f"{name} has pip install {brief(local[1])}, a path", where, remedy)


CHECKS = {"requirements": requirements}
