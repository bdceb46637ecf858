"""Checks of imports: siblings, other packages, and transformers' names in each release."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import lru_cache

from .api_availability import Span, lacking, level_for
from .code_tree import attributes, bridged, calls, constant, entry_files, guarded, reachable, siblings
from .repo_snapshot import CodeFile, Finding, Folder
from .symbols import ATTRIBUTES
from .walking import walk

# present wherever a model is loaded: the standard library, torch, transformers and their dependencies
_GIVEN = {
    *sys.stdlib_module_names,
    *("torch", "transformers", "numpy", "safetensors", "einops", "huggingface_hub", "tokenizers", "packaging"),
    *("regex", "tqdm", "yaml", "filelock", "typing_extensions"),
}
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "skimage": "scikit-image"}
_SECOND_LEVEL = Span(last=(5, 6))


def code_files(folder: Folder) -> Iterator[Finding]:
    """Every Python file can be parsed; files that are never loaded are reported."""
    live = reachable(folder)
    for name, reason in folder.unparsed.items():
        line = re.match(r"line (\d+): ", reason)
        where = f"{name}:{line[1]}" if line else name
        yield Finding(
            "failed" if name in live or not folder.auto_map else "warning",
            f"{name} cannot be read as Python: {reason}",
            where,
            "correct it, or remove it",
        )
    for name in sorted(folder.code.keys() - live):
        if not name.endswith("__init__.py"):
            what = f"no entry of auto_map leads to {name}, so transformers never loads it"
            yield Finding("warning", what, name, "remove it, or make sure that you know what it is for")


def relative_imports(folder: Folder) -> Iterator[Finding]:
    """Imported siblings are in the same folder, exist, and match the pattern by which transformers finds them."""
    for name in sorted(reachable(folder) & folder.code.keys()):
        file = folder.code[name]
        yield from _wrong_forms(folder, file)
        yield from _unseen(folder, file)
    for name in entry_files(folder):
        if name in folder.code:
            yield from _second_level(folder, folder.code[name])


def _wrong_forms(folder: Folder, file: CodeFile) -> Iterator[Finding]:
    home = file.name.rpartition("/")[0]
    for node in walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            text = f"from {'.' * node.level}{node.module or ''} import {node.names[0].name}"
            if node.level > 1 or not node.module or "." in node.module:
                remedy = "put all code files into one folder and write: from .name import …"
                yield Finding("failed", f"`{text}` works nowhere but on your machine", file.at(node), remedy)
            elif (f"{home}/{node.module}.py" if home else f"{node.module}.py") not in folder.files:
                what = f"`{text}` needs {node.module}.py, which is not in the folder"
                yield Finding("failed", what, file.at(node), "add the file; the import counts inside `try` too")
        modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = str(module).split(".")[0]
            if f"{top}.py" in folder.files and top not in _GIVEN:
                what = f"`import {top}` finds {top}.py on your machine only"
                yield Finding("failed", what, file.at(node), f"write: from .{top} import …")


def _unseen(folder: Folder, file: CodeFile) -> Iterator[Finding]:
    # transformers' patterns: whatever matches is fetched, even in a text; the rest is not
    seen = {
        match[1] or match[2]: file.text.count("\n", 0, match.start(1) if match[1] else match.start(2)) + 1
        for match in re.finditer(
            r"^[ \t]*import[ \t]+\.(\S+)[ \t]*$|^[ \t]*from[ \t]+\.(\S+)[ \t]+import", file.text, re.MULTILINE
        )
    }
    imported = {str(node.module): node for _, node in siblings(file)}
    home = file.name.rpartition("/")[0]
    for module, line in seen.items():
        missing = (f"{home}/{module}.py" if home else f"{module}.py") not in folder.files
        if module not in imported and "." not in module and missing:
            what = (
                f"transformers mistakes this text for an import and looks for {module}.py, which is not in the folder"
            )
            yield Finding("failed", what, f"{file.name}:{line}", "write the text differently")
    for module, node in imported.items():
        if module not in seen:
            what = f"transformers does not see the import of {module}.py, which is not alone at the start of a line"
            yield Finding("failed", what, file.at(node), f"write on a line of its own: from .{module} import …")


def _second_level(folder: Folder, file: CodeFile) -> Iterator[Finding]:
    direct = {name for name, _ in siblings(file)}
    waiting, seen = [(name, name) for name in direct], set(direct) | {file.name}
    while waiting:
        name, through = waiting.pop()
        for inner, _ in siblings(folder.code[name]) if name in folder.code else ():
            if inner not in seen and inner in folder.files:
                seen.add(inner)
                waiting.append((inner, through))
                what = (
                    f"{file.name} needs {inner} through {through}, but does not import it: not copied {_SECOND_LEVEL}"
                )
                module = inner.rpartition("/")[2].removesuffix(".py")
                status = level_for(_SECOND_LEVEL, folder.releases)
                yield Finding(status, what, f"{file.name}:1", f"add: from .{module} import …  # noqa: F401")


def other_imports(folder: Folder) -> Iterator[Finding]:
    """Packages that not every machine has must be declared in a requirements file."""
    declared: set[str] = set()
    for name in ("requirements.txt", "pyproject.toml", "custom_generate/requirements.txt"):
        if name in folder.files:
            with folder.files[name].open("rb") as handle:
                text = handle.read(1_000_000).decode("utf-8", errors="replace")
            declared |= {word.lower().replace("_", "-") for word in re.findall(r"[A-Za-z][\w.-]*", text)}
    reported: set[str] = set()
    for name in sorted(reachable(folder) & folder.code.keys()):
        file, optional = folder.code[name], guarded(folder.code[name].tree, _excuses_imports)
        for node in walk(file.tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (module.split(".")[0] for module in modules):
                package = _DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
                here = f"{top}.py" in folder.files  # reported by `relative imports`
                if top in _GIVEN or top in reported or here or package in declared or id(node) in optional:
                    continue
                reported.add(top)
                what = f"{name} needs the package {package}, and nothing in the folder says so"
                remedy = f"add {package} to requirements.txt"
                if id(node) in guarded(file.tree):
                    what += "; transformers requires the package even if the import is inside an `if`"
                    remedy += ", or import it inside try/except ImportError"
                yield Finding("failed", what, file.at(node), remedy)


@lru_cache(maxsize=1)
def _availability_tests() -> frozenset[str]:
    from transformers.utils import import_utils

    return frozenset(dir(import_utils))


def _excuses_imports(node: ast.AST) -> bool:
    """Whether transformers ignores imports below a node: a `try`, or an `if` that calls one of its availability tests.

    As in `transformers.dynamic_module_utils.get_imports` of every supported release: the test is called by its bare name
    and is a function of `transformers.utils.import_utils`.
    """
    if isinstance(node, ast.If):
        names = [call.func.id for call in calls(node.test) if isinstance(call.func, ast.Name)]
        return any(
            (name.startswith("is_flash_attn") and name.endswith("available")) or name in _availability_tests()
            for name in names
        )
    return isinstance(node, ast.Try)


def transformers_names(folder: Folder) -> Iterator[Finding]:
    """Names imported from transformers that some release lacks, or that are private."""
    reported: set[tuple[str, str, str]] = set()
    for name in sorted(reachable(folder) & folder.code.keys()):
        file, optional = folder.code[name], guarded(folder.code[name].tree)
        for node in walk(file.tree):
            pairs: list[tuple[str, str]] = []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                pairs = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                pairs = [(alias.name, "") for alias in node.names]
            for module, symbol in pairs:
                if module.split(".")[0] != "transformers" or id(node) in optional or (name, module, symbol) in reported:
                    continue
                reported.add((name, module, symbol))
                yield from _missing(folder, file, node, module, symbol)
        yield from _old_attributes(folder, file)


def _missing(folder: Folder, file: CodeFile, node: ast.AST, module: str, symbol: str) -> Iterator[Finding]:
    shown = f"{symbol} of {module}" if symbol else module
    failing, span = lacking(module, symbol, folder.releases)
    remedy = "import it from where every release has it, define it here, or import it inside try/except"
    if failing:
        what = f"{shown} does not exist under transformers {', '.join(failing[:8])}"
        yield Finding("failed", what, file.at(node), remedy)
    elif span is not None:
        yield Finding("warning", f"{shown} does not exist {span}", file.at(node), remedy)
    elif symbol.startswith("_") and not symbol.startswith("__"):
        yield Finding("warning", f"{shown} is private: any release may drop it", file.at(node), "define it here")


def _old_attributes(folder: Folder, file: CodeFile) -> Iterator[Finding]:
    asked = {constant(call.args[1]) for call in walk(file.tree) if isinstance(call, ast.Call) and len(call.args) > 1}
    own = {n.name for n in walk(file.tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {a.attr for a in attributes(file.tree) if isinstance(a.ctx, ast.Store)}
    reported: set[str] = set()
    optional = bridged(file)
    for node in attributes(file.tree):
        if node.attr not in ATTRIBUTES or node.attr in asked | own | reported or id(node) in optional:
            continue  # guarded by hasattr or getattr, defined here, or in a branch for some releases only
        first, last, owner, instead = ATTRIBUTES[node.attr]
        span = Span(first, last)
        reported.add(node.attr)
        what = f"transformers' {owner} have no {node.attr} {span}"
        yield Finding(level_for(span, folder.releases), what, file.at(node), f"use {instead}, or check hasattr first")


CHECKS = {
    "code files": code_files,
    "relative imports": relative_imports,
    "other imports": other_imports,
    "transformers names": transformers_names,
}
