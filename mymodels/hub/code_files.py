"""The code files of a model, flat as the Hub wants them, and the Auto classes that they serve.

transformers copies a model's file and what it imports relatively into one folder, without changing a line: `from ..x`
and absolute imports of one's own package then fail elsewhere. Here such imports are rewritten.
"""

import ast
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..checkpoints import CheckpointError

_HEADS = {  # how a class's name ends → the Auto class it is for, the longest first
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
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


def collect_code(entries: Iterable[Path]) -> dict[str, str]:
    """The text of `entries` and of all that they import of their own code, by file name, ready to lie in one folder.

    Imports of one's own package, relative or absolute, become `from .name import …`; what an entry needs only
    indirectly it also imports itself, because transformers before 5.7 fetches no more than that.

    Raises:
        CheckpointError: an import cannot be made flat, two files have one name, or a file is no Python; the message
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
            imports = own_imports(path, ast.parse(text))
        except (SyntaxError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is no Python file that could be copied: {error}") from error
        texts[path.name] = _rewritten(text, imports)
        direct[path.name] = {one.file.name for one in imports}
        queue += [one.file for one in imports]
    for name in entry_names:
        texts[name] = _with_indirect(name, texts, direct)
    return dict(sorted(texts.items()))


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
    lines = text.splitlines(keepends=True)
    for node, file in imports:
        at = node.lineno - 1
        lines[at] = re.sub(r"from\s+[.\w]+\s+import", f"from .{file.stem} import", lines[at], count=1)
    return "".join(lines)


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
    parts = texts[name].splitlines(keepends=True)
    return "".join([*parts[:last], *lines, *parts[last:]])


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
    """The `auto_map` of code files: Auto class → `file.Class`; of several classes for one, `first` ones are taken."""
    wanted = list(first)
    found: dict[str, tuple[int, str]] = {}
    for file, text in texts.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and (auto_class := auto_class_of(node.name)):
                rank = wanted.index(node.name) if node.name in wanted else len(wanted)
                if auto_class not in found or rank < found[auto_class][0]:
                    found[auto_class] = rank, f"{file.removesuffix('.py')}.{node.name}"
    return {auto_class: target for auto_class, (_, target) in sorted(found.items())}
