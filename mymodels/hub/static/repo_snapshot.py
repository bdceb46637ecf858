"""The content of a Hub folder for the static checks: names, JSON values and syntax trees. No code is run."""

import ast
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoints import CheckpointError
from ...checkpoints.safetensors_files import parse_json
from .api_availability import Release
from .walking import walk

MAX_FILES = 20_000
MAX_CODE_BYTES = 1_000_000  # per file and in total; transformers' longest model has 0.3 MB
MAX_ALL_CODE_BYTES = 4_000_000
MAX_CONFIG_BYTES = 10_000_000
# JSON files whose values are checked; indexes are read with the weights, others only searched for secrets
CONFIG_FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
    "quantize_config.json",
)


class Finding(NamedTuple):
    """One outcome of a check, without the check's name; see `Check`."""

    status: str
    what: str
    where: str = ""
    remedy: str = ""


@dataclass
class CodeFile:
    """One Python file: its text, its syntax tree, and the full names of what it imported."""

    name: str
    text: str
    tree: ast.Module
    names: dict[str, str]  # local name → full name: "nn" → "torch.nn", "MyConfig" → ".configuration.MyConfig"
    others: dict[str, set[str]]  # local name → its other full names, if it is imported several times

    def at(self, node: ast.AST) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}"

    def dotted(self, node: ast.AST | None) -> str:
        """The full name of a name or attribute expression (`nn.init.zeros_` → `torch.nn.init.zeros_`), or ""."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.names.get(node.id, node.id), *reversed(parts)])

    def meanings(self, node: ast.AST) -> set[str]:
        """All full names of an expression whose first name is imported several times."""
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        dotted = self.dotted(node)
        if not isinstance(root, ast.Name):
            return {dotted}
        rest = dotted.removeprefix(self.names.get(root.id, root.id))
        return {dotted, *(meaning + rest for meaning in self.others.get(root.id, ()))}


@dataclass
class Folder:
    """What there is in a folder.

    Attributes:
        path: the folder.
        files: regular files by their `/`-separated name.
        odd: links, pipes and devices by name.
        crowded: there are more than `MAX_FILES`; the rest was not read.
        values: the `CONFIG_FILES` that are valid JSON objects.
        invalid: those that are not, with the reason.
        code: the Python files that could be parsed.
        unparsed: those that could not, with the reason.
        releases: the transformers releases that the code is checked for.
        problems: the problems found by `check_checkpoint`, once it was called.
        memo: results that several checks share, by name.
    """

    path: Path
    releases: Sequence[Release] = ()
    files: dict[str, Path] = field(default_factory=dict)
    odd: dict[str, Path] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    crowded: bool = False
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    invalid: dict[str, str] = field(default_factory=dict)
    code: dict[str, CodeFile] = field(default_factory=dict)
    unparsed: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return self.values.get("config.json", {})

    @property
    def auto_map(self) -> dict[str, Any]:
        value = self.config.get("auto_map")
        return value if isinstance(value, dict) else {}


def read_folder(path: Path, releases: Sequence[Release] = ()) -> Folder:
    """Read a folder without following links out of it, executing or unpickling anything."""
    folder = Folder(path, releases)
    for name, file in _walk(path, folder):
        if _is_regular(file, path):
            folder.files[name] = file
        else:
            folder.odd[name] = file
    for name in CONFIG_FILES:
        if name in folder.files:
            try:
                folder.values[name] = _read_config(folder.files[name])
            except (CheckpointError, OSError) as error:
                folder.invalid[name] = str(error)
    left = MAX_ALL_CODE_BYTES
    for name, file in folder.files.items():
        if name.endswith(".py"):
            left -= file.stat().st_size
            parsed = parse_code(name, file) if left >= 0 else "there is more code than any model has"
            if isinstance(parsed, CodeFile):
                folder.code[name] = parsed
            else:
                folder.unparsed[name] = parsed
    return folder


def _walk(root: Path, folder: Folder) -> Iterator[tuple[str, Path]]:
    count = 0
    for parent, folders, names in os.walk(root):
        folders.sort()
        inside = Path(parent).relative_to(root).as_posix()
        for name in list(folders):
            if Path(parent, name).is_symlink():  # `os.walk` does not enter it; counted as a file here
                folders.remove(name)
                names.append(name)
            else:
                folder.folders.add(name if inside == "." else f"{inside}/{name}")
        if ".git" in folders:
            folders.remove(".git")  # reported by name; its content is not part of the repo
        for name in sorted(names):
            count += 1
            if count > MAX_FILES:
                folder.crowded = True
                return
            yield (name if inside == "." else f"{inside}/{name}"), Path(parent, name)


def _is_regular(file: Path, root: Path) -> bool:
    """Whether this is a regular file, or a link into `blobs` in huggingface_hub's cache."""
    try:
        if file.is_symlink():
            target = file.resolve(strict=True)
            blobs = [parent.parent / "blobs" for parent in root.resolve().parents if parent.name == "snapshots"]
            return any(target.is_relative_to(home) for home in blobs) and stat.S_ISREG(target.stat().st_mode)
        return stat.S_ISREG(file.lstat().st_mode)
    except (OSError, RuntimeError):  # removed meanwhile, or a circular link
        return False


def _read_config(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        data = handle.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file.name} is larger than {MAX_CONFIG_BYTES:,} bytes, which no config is")
    return parse_json(data, Path(file.name))


def parse_code(name: str, file: Path) -> CodeFile | str:
    """The parsed Python file, or a few words on why it cannot be parsed."""
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_CODE_BYTES + 1)
        if len(data) > MAX_CODE_BYTES:
            return f"it is larger than {MAX_CODE_BYTES:,} bytes"
        return parse_text(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except OSError as error:
        return str(error)


def parse_text(name: str, text: str) -> CodeFile | str:
    """The syntax tree of a Python file's text, or in a few words why there is none."""
    if "\0" in text:
        return "it contains null bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in an ordinary string and the like
            tree = ast.parse(text)
        return CodeFile(name, text, tree, *_imported_names(tree))
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (RecursionError, MemoryError):
        return "its expressions are nested too deeply"
    except ValueError as error:
        return str(error)


def _imported_names(tree: ast.Module) -> tuple[dict[str, str], dict[str, set[str]]]:
    names: dict[str, str] = {}
    others: dict[str, set[str]] = {}
    for node in walk(tree):
        found: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            tops = [(alias, alias.name.split(".")[0]) for alias in node.names]
            found = [(alias.asname or top, alias.name if alias.asname else top) for alias, top in tops]
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            found = [(alias.asname or alias.name, f"{module}.{alias.name}") for alias in node.names]
        for name, meaning in found:
            if names.setdefault(name, meaning) != meaning:
                others.setdefault(name, set()).add(meaning)
    return names, others


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with the path of its keys."""
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, Mapping):
            waiting += [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]


def brief(text: Any, limit: int = 80) -> str:
    """`repr`, shortened, because texts from a hostile file may be long."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 20]}… ({len(shown)} characters)"
