"""Which names the modules of a transformers release have, from its source."""

import ast
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .symbols import GONE
from .walking import walk

Minor = tuple[int, int]
FIRST, LAST = (4, 56), (5, 23)  # the supported range


class Release(NamedTuple):
    """A transformers release that code is checked for: its minor version, and its `transformers/` folder if there is one."""

    version: Minor
    folder: Path | None = None

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def find_releases(names: Sequence[str] | None) -> list[Release]:
    """Releases for version numbers or folders that they are installed in; for None, the installed release.

    Raises:
        ValueError: an entry is neither.
    """
    if names is None:
        spec = find_spec("transformers")
        package = Path(spec.origin).parent if spec is not None and spec.origin else None
        return [_installed(package)] if package is not None else []
    releases = []
    for name in names:
        text = str(name)
        if (Path(text) / "transformers" / "__init__.py").is_file():
            releases.append(_installed(Path(text) / "transformers"))
        elif version := re.fullmatch(r"(\d+)\.(\d+)(\.\w+)*", text):
            releases.append(Release((int(version[1]), int(version[2]))))
        else:
            raise ValueError(f"{text!r} is neither a transformers version nor a folder with one installed in it")
    return releases


def _installed(package: Path) -> Release:
    found = re.search(r'^__version__ = "(\d+)\.(\d+)', _read(package / "__init__.py"), re.MULTILINE)
    return Release((int(found[1]), int(found[2])) if found else LAST, package)


class Span(NamedTuple):
    """The releases, first and last, under which something breaks."""

    first: Minor = FIRST
    last: Minor = LAST

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.first <= version <= self.last

    def __str__(self) -> str:
        first, last = (".".join(map(str, version)) for version in self)
        if self.first <= FIRST:
            return "under every supported transformers" if self.last >= LAST else f"under transformers through {last}"
        if self.last >= LAST:
            return f"under transformers {first} and newer"
        return f"under transformers {first}" if first == last else f"under transformers {first} to {last}"


def level_for(span: Span, releases: Iterable[Release]) -> str:
    """`failed` if the span contains one of `releases`, else `warning`: another supported release is affected."""
    return "failed" if any(release.version in span for release in releases) else "warning"


def lacking(module: str, name: str, releases: Sequence[Release]) -> tuple[list[str], Span | None]:
    """Where `from module import name` fails: in which of `releases`, and in which span of releases, if known.

    Args:
        module: full name, such as `transformers.cache_utils`.
        name: what is imported from it, or "" for the module itself.
    """
    known = GONE.get((module, name)) or GONE.get((module, ""))
    span = Span(*known) if known else None
    failing = [
        str(release)
        for release in releases
        if (not _has(release.folder, module, name) if release.folder else span is not None and release.version in span)
    ]
    return failing, span


def model_types(releases: Iterable[Release]) -> dict[str, str]:
    """transformers' model types and their config classes, from all installed releases among these."""
    found: dict[str, str] = {}
    for release in releases:
        if release.folder is not None:
            found |= _model_types(release.folder)
    return found


@lru_cache(maxsize=32)
def _model_types(package: Path) -> dict[str, str]:
    auto = package / "models" / "auto"
    found: dict[str, str] = {}
    for file in ("configuration_auto.py", "auto_mappings.py"):
        text = _read(auto / file)
        block = re.search(r"^CONFIG_MAPPING_NAMES\b.*?^\)", text, re.MULTILINE | re.DOTALL)
        found |= dict(re.findall(r'\(\s*"([\w-]+)",\s*"(\w+)"', block[0] if block else ""))
    return found


@lru_cache(maxsize=4096)
def _has(package: Path | None, module: str, name: str) -> bool:
    if package is None:
        return True
    names = _names(package, module)
    if names is None:
        return False
    return not name or name == "*" or name in names or _names(package, f"{module}.{name}") is not None


_GATHERING = ("transformers", "transformers.models")  # they star-import every model; reading `__all__` is faster
_ALIASES = re.compile(r'"?(?:\{__name__\}\.)?(\w+)"?\s*[:,]\s*"\.?(\w+)"')


@lru_cache(maxsize=256)
def _names(package: Path, module: str) -> frozenset[str] | None:
    """The names a module binds, lazily or not; None if there is no such module."""
    base = package.joinpath(*module.split(".")[1:])
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py") if base != package else package
    if not file.is_file():
        target = _alias(package, module)
        return _names(package, target) if target else None
    text = _read(file)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    names = {"__version__", "__name__", "__file__"}
    for node in walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            starred = any(alias.name == "*" for alias in node.names)
            names |= {alias.asname or alias.name for alias in node.names}
            if starred and node.level and module not in _GATHERING:
                inner = ".".join([*_package_of(module, file, node.level), *(node.module or "").split(".")]).rstrip(".")
                names |= _names(package, inner) or frozenset()
        elif file.name == "__init__.py" and isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # the tables of lazy modules
    if module == "transformers":
        names |= _exported_by_models(package)
    return frozenset(names)


def _package_of(module: str, file: Path, level: int) -> list[str]:
    parts = module.split(".")
    drop = level - 1 if file.name == "__init__.py" else level
    return parts[: len(parts) - drop]


def _alias(package: Path, module: str) -> str | None:
    """The new name of a module that transformers 5 renamed, from the table in its `__init__.py`."""
    parent, _, name = module.rpartition(".")
    if fast := re.fullmatch(r"transformers\.models\.(\w+)\.(image_processing_\w+)_fast", module):
        return f"transformers.models.{fast[1]}.{fast[2]}"
    if parent != "transformers":
        return None
    for old, new in _ALIASES.findall(_read(package / "__init__.py")):
        if old == name and (package / f"{new}.py").is_file():
            return f"transformers.{new}"
    return None


@lru_cache(maxsize=16)
def _exported_by_models(package: Path) -> frozenset[str]:
    """Names that `transformers` exports lazily from its models: each module's `__all__`."""
    found: set[str] = set()
    for file in (package / "models").rglob("*.py"):
        if file.name == "__init__.py":
            continue
        for block in re.findall(r"^__all__ (?:\+)?= \[(.*?)\]", _read(file), re.MULTILINE | re.DOTALL):
            found |= set(re.findall(r'"(\w+)"', block))
    return frozenset(found)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
