"""The code files of a model, flat as the Hub wants them, and the Auto classes that they serve.

transformers copies a model's file and what it imports relatively into one folder, without changing a line: `from ..x`
and absolute imports of one's own package then fail elsewhere. Here such imports are rewritten.
"""

import ast
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..checkpoints import CheckpointError
from ..checkpoints.safetensors_files import inside

_HEADS = {  # how a class's name ends → the Auto class it is for, the longest first
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForPreTraining": "AutoModelForPreTraining",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "PreTrainedModel": "",
    "Config": "AutoConfig",
    "Model": "AutoModel",
}


class Import(NamedTuple):
    """One `from … import …` of one's own code."""

    node: ast.ImportFrom
    file: Path


def auto_class_of(class_name: str) -> str:
    """The Auto class that a class is for, by how its name ends; `""` if it is for none."""
    return next((auto for ending, auto in _HEADS.items() if class_name.endswith(ending)), "")


def file_of(cls: type) -> Path | None:
    """The file a class is defined in, None if it is one of transformers' own.

    Raises:
        CheckpointError: it is in no file, such as a notebook's cell.
    """
    if cls.__module__.split(".")[0] == "transformers":
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        raise CheckpointError(
            f"{cls.__name__} is defined in {cls.__module__}, which is no file: put it into a .py file and import it from there"
        )
    return Path(file)


def collect_code(entries: Iterable[Path], *, within: Path | None = None) -> dict[str, str]:
    """The text of `entries` and of all that they import of their own code, by file name, ready to lie in one folder.

    Imports of one's own package, relative or absolute, become `from .name import …`; what an entry needs only
    indirectly it also imports itself, because transformers before 5.7 fetches no more than that.

    Args:
        within: a folder that nothing may be taken from outside of, but for the models that mymodels ships.

    Raises:
        CheckpointError: an import cannot be made flat or leads out of `within`, two files have one name, or a file is no Python; the message
            names file and line.
    """
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    direct: dict[str, set[str]] = {}
    queue = [Path(entry) for entry in entries]
    entry_names = [path.name for path in queue]
    while queue:
        path = queue.pop(0)
        if found.setdefault(path.name, path).resolve() != path.resolve():
            raise CheckpointError(
                f"{path} and {found[path.name]} have the same name, and the Hub has no folders: rename one"
            )
        if path.name in texts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{path} is no Python file that could be copied: {error}") from error
        imports = own_imports(path, tree)
        if within is not None:
            for one in imports:
                _check_inside(one, path, within)
        texts[path.name] = _rewritten(text, imports)
        direct[path.name] = {one.file.name for one in imports}
        queue += [one.file for one in imports]
    for name in entry_names:
        texts[name] = _with_indirect(name, texts, direct)
    return dict(sorted(texts.items()))


def _check_inside(one: Import, path: Path, within: Path) -> None:
    """Refuse what a folder's code takes from elsewhere on this machine."""
    root = within.resolve()
    shipped = Path(__file__).parent.parent / "models"
    if one.file.parent.resolve() == shipped.resolve():
        return
    lexical = Path(os.path.normpath(one.file.absolute()))
    if not lexical.is_relative_to(Path(os.path.normpath(within.absolute()))):
        raise CheckpointError(
            f"{path}:{one.node.lineno} imports {one.file}, which is outside the folder: it is not copied"
        )
    inside(within, lexical.relative_to(Path(os.path.normpath(within.absolute()))).as_posix(), root)


def own_imports(path: Path, tree: ast.Module) -> list[Import]:
    """The imports of a file that are of its own package, or of the models that mymodels ships.

    Raises:
        CheckpointError: one cannot be made flat.
    """
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    package = path.relative_to(root).parts[0] if root != path.parent else ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in {package, "mymodels"} - {""}:
                    raise _not_flat(path, node, f"import {alias.name}")
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = path.parent
            for _ in range(node.level - 1):
                folder = folder.parent
        elif parts and parts[0] == package:
            folder, parts = root / package, parts[1:]
        elif parts[:2] == ["mymodels", "models"] and len(parts) == 3:
            origin = find_spec("mymodels.models")
            folder, parts = Path(origin.submodule_search_locations[0]), parts[2:]  # type: ignore[index,union-attr]
        elif parts[:1] == ["mymodels"]:
            raise CheckpointError(
                f"{path}:{node.lineno} imports {node.module}, which is not there on other machines: import from "
                "mymodels.models.modeling_… (or configuration_…, layers), which is copied along"
            )
        else:
            continue
        file = folder.joinpath(*parts).with_suffix(".py") if parts else folder / "__init__.py"
        if not parts or not file.is_file():
            raise _not_flat(path, node, f"from {'.' * node.level}{node.module or ''} import …")
        found.append(Import(node, file))
    return found


def _not_flat(path: Path, node: ast.stmt, statement: str) -> CheckpointError:
    return CheckpointError(
        f"{path}:{node.lineno}: `{statement}` cannot be made flat, or its file is not there: write `from .name import …` "
        "with the names that are needed"
    )


def _rewritten(text: str, imports: list[Import]) -> str:
    lines = text.split("\n")  # as Python counts them
    for node, file in sorted(imports, key=lambda one: (one.node.lineno, one.node.col_offset), reverse=True):
        line = lines[node.lineno - 1].encode()
        before, rest = line[: node.col_offset].decode(), line[node.col_offset :].decode()
        found = re.match(r"from\s+[.\w]+\s+import", rest)
        if found is None:
            raise CheckpointError(
                f"{file.name} is imported in a way that cannot be rewritten: write `from .name import …` in one line"
            )
        lines[node.lineno - 1] = f"{before}from .{file.stem} import{rest[found.end() :]}"
    return "\n".join(lines)


def _with_indirect(name: str, texts: dict[str, str], direct: dict[str, set[str]]) -> str:
    """`name`'s text with an import of each file that it only needs through another one."""
    reached, queue = set(), list(direct[name])
    while queue:
        if (file := queue.pop()) not in reached:
            reached.add(file)
            queue += direct[file]
    tree = ast.parse(texts[name])
    missing = sorted(reached - direct[name] - {name})
    lines = [
        f"from .{Path(file).stem} import {_a_name(file, texts[file])}  # noqa: F401  needed indirectly\n"
        for file in missing
    ]
    last = max((n.end_lineno or 0 for n in tree.body if _is_heading(n)), default=0)
    parts = texts[name].split("\n")
    return "\n".join([*parts[:last], *lines, *parts[last:]])


def _is_heading(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.lineno < 20
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _a_name(file: str, text: str) -> str:
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
    raise CheckpointError(f"{file} defines nothing that could be imported: merge it into the file that needs it")


def served(texts: dict[str, str], first: Iterable[str] = ()) -> dict[str, str]:
    """The `auto_map` of code files: Auto class → `file.Class`.

    A class counts if it is a config or, however indirectly, a `PreTrainedModel`, and is called like one of `first` (the
    classes that are known: `X` of `XForCausalLM` and `XModel`); of several for one Auto class, those in `first` come first.
    """
    wanted = list(first)
    stems = {stem for name in wanted if (stem := _stem(name))}
    classes = {
        node.name: (file, node)
        for file, text in texts.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    found: dict[str, tuple[int, str]] = {}
    for name, (file, _) in classes.items():
        auto_class = auto_class_of(name)
        if not auto_class or (stems and _stem(name) not in stems and name not in wanted):
            continue
        if name in wanted or _is_a(name, "Config" if auto_class == "AutoConfig" else "PreTrainedModel", classes):
            rank = wanted.index(name) if name in wanted else len(wanted)
            if auto_class not in found or rank < found[auto_class][0]:
                found[auto_class] = rank, f"{file.removesuffix('.py')}.{name}"
    return {auto_class: target for auto_class, (_, target) in sorted(found.items())}


def _stem(name: str) -> str:
    """`X` of `XForSomething`, `XModel`, `XConfig`."""
    found = re.match(r"(\w+?)(For[A-Z]\w*|LMHeadModel|PreTrainedModel|Model|Config)$", name)
    return found[1] if found else ""


def _is_a(name: str, ending: str, classes: Mapping[str, tuple[str, ast.ClassDef]], depth: int = 20) -> bool:
    """Whether a class has, among its ancestors as far as they are written here, one whose name ends so."""
    if name not in classes or depth == 0:
        return name.endswith(ending)
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name][1].bases]
    return any(_is_a(base, ending, classes, depth - 1) for base in bases)
