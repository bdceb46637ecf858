"""The code files of a model, for one flat folder as the Hub requires, and the `auto_map` of their classes.

transformers copies a model's file and its relative imports into one folder unchanged, where `from ..x` and absolute
imports of the model's own package fail. Here such imports are rewritten.
"""

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedModel

from ..checkpoints import CheckpointError
from ..checkpoints.safetensors_files import inside
from ..models import int8
from .auto_class_names import auto_class_of

_MODELS = Path(__file__).parent.parent / "models"  # files that are copied wherever they are imported


class Import(NamedTuple):
    """A `from … import …` statement of the model's own code, or the part of it that one file defines."""

    node: ast.ImportFrom
    file: Path
    names: tuple[ast.alias, ...] = ()  # if several files define the names: those from `file`


def file_of(cls: type) -> Path | None:
    """The file that defines a class; None for a class of transformers.

    Raises:
        CheckpointError: the class is not defined in a file, but for example in a notebook.
    """
    if cls.__module__.split(".")[0] == "transformers":
        return None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        raise CheckpointError(
            f"{cls.__name__} is defined in {cls.__module__}, which is not a file: put it into a .py file and import it from there"
        )
    return Path(file)


def collect_code(entries: Iterable[Path], *, within: Path | None = None) -> dict[str, str]:
    """File name → text of `entries` and of the files of their package that they import, for one flat folder.

    Imports of the own package, relative or absolute, become `from .name import …`. An entry also imports the files
    that it needs indirectly, because transformers before 5.7 fetches only direct imports.

    Args:
        within: no file may be outside of this folder, except for the models that mymodels ships.

    Raises:
        CheckpointError: an import cannot be made flat or leads out of `within`, two files have the same name, or a file
            is not valid Python; the message names file and line.
    """
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    direct: dict[str, set[str]] = {}
    queue = [Path(entry) for entry in entries]
    entry_names = list(dict.fromkeys(path.name for path in queue))
    while queue:
        path = queue.pop(0)
        first = found.setdefault(path.name, path)
        # transformers keeps a config's code and its model's in two folders: copies of one file
        if first.resolve() != path.resolve() and first.read_bytes() != path.read_bytes():
            raise CheckpointError(f"{path} and {first} have the same name, and the Hub has no folders: rename one")
        if path.name in texts:
            continue
        if not path.stem.isidentifier():
            raise CheckpointError(
                f"{path}: auto_map cannot name a file with such a name: rename it to letters, digits and underscores"
            )
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid Python: {error}") from error
        imports = own_imports(path, tree)
        if within is not None:
            for one in imports:
                _check_inside(one, path, within)
        texts[path.name] = _rewrite_imports(text, imports)
        direct[path.name] = {one.file.name for one in imports}
        queue += [one.file for one in imports]
    for name in entry_names:
        texts[name] = _with_indirect_imports(name, texts, direct)
    return dict(sorted(texts.items()))


def _check_inside(one: Import, path: Path, within: Path) -> None:
    """Raise a `CheckpointError` for an import of a file outside of the folder."""
    root = within.resolve()
    if one.file.parent.resolve() == _MODELS.resolve():
        return
    lexical = Path(os.path.normpath(one.file.absolute()))
    if not lexical.is_relative_to(Path(os.path.normpath(within.absolute()))):
        raise CheckpointError(
            f"{path}:{one.node.lineno} imports {one.file}, which is outside the folder: it is not copied"
        )
    inside(within, lexical.relative_to(Path(os.path.normpath(within.absolute()))).as_posix(), root)


def own_imports(path: Path, tree: ast.Module) -> list[Import]:
    """The imports of a file from its own package, or from the models that mymodels ships.

    Raises:
        CheckpointError: an import cannot be made flat.
    """
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    package = path.relative_to(root).parts[0] if root != path.parent else ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in {package, "mymodels"} - {""} or (not package and _is_sibling_module(path, top)):
                    raise _not_flat_error(path, node, f"import {alias.name}")
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
            folder, parts = _MODELS, parts[2:]
        elif parts[:1] == ["mymodels"]:
            found += _imports_of_mymodels(path, node)
            continue
        elif parts and not package and _is_sibling_module(path, parts[0]):
            folder = root
        else:
            continue
        file = folder.joinpath(*parts).with_suffix(".py") if parts else folder / "__init__.py"
        if not parts or not file.is_file():
            raise _not_flat_error(path, node, f"from {'.' * node.level}{node.module or ''} import …")
        found.append(Import(node, file))
    return found


def _is_sibling_module(path: Path, name: str) -> bool:
    """Whether a script's `import name` imports a file or folder beside it, and not an installed package."""
    if name in sys.stdlib_module_names or not ((path.parent / f"{name}.py").is_file() or (path.parent / name).is_dir()):
        return False
    try:
        spec = find_spec(name)  # None for a missing package; a module without spec raises
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return (path.parent / f"{name}.py").is_file()
    return Path(spec.origin).is_relative_to(path.parent)


def _imports_of_mymodels(path: Path, node: ast.ImportFrom) -> list[Import]:
    """The imports of `from mymodels import …`, one for each file of `mymodels.models` that defines the names."""
    import mymodels

    by_file: dict[Path, list[ast.alias]] = {}
    for alias in node.names:
        found = getattr(mymodels, alias.name, None) if node.module == "mymodels" else None
        module = getattr(found, "__module__", "")
        if not module.startswith("mymodels.models."):
            raise CheckpointError(
                f"{path}:{node.lineno} imports {node.module}, which is not installed on other machines: import from "
                "mymodels.models.modeling_… (or configuration_…, base), which is copied with the code"
            )
        by_file.setdefault(_MODELS / f"{module.rpartition('.')[2]}.py", []).append(alias)
    return [Import(node, file, tuple(names)) for file, names in by_file.items()]


def _not_flat_error(path: Path, node: ast.stmt, statement: str) -> CheckpointError:
    return CheckpointError(
        f"{path}:{node.lineno}: `{statement}` cannot be made flat, or its file does not exist: write "
        "`from .name import …` with the names that are needed"
    )


def _rewrite_imports(text: str, imports: list[Import]) -> str:
    lines = text.split("\n")  # as Python counts them
    places: dict[tuple[int, int], list[Import]] = {}
    for one in imports:
        places.setdefault((one.node.lineno, one.node.col_offset), []).append(one)
    for (line, column), found in sorted(places.items(), reverse=True):
        node, file, names = found[0]
        start = lines[line - 1].encode()
        before, rest = start[:column].decode(), start[column:].decode()
        if not names:
            heading = re.match(r"from\s+[.\w]+\s+import", rest)
            if heading is None:
                raise _not_rewritten_error(file)
            lines[line - 1] = f"{before}from .{file.stem} import{rest[heading.end() :]}"
            continue
        if before.strip() and len(found) > 1:
            raise _not_rewritten_error(file)
        after = lines[(node.end_lineno or line) - 1].encode()[node.end_col_offset :].decode()
        statements = [f"from .{f.stem} import {', '.join(map(ast.unparse, aliases))}" for _, f, aliases in found]
        indent = before if before.strip() == "" else ""
        new = (before + f"\n{indent}".join(statements) + after).split("\n")
        lines[line - 1 : node.end_lineno or line] = new
    return "\n".join(lines)


def _not_rewritten_error(file: Path) -> CheckpointError:
    return CheckpointError(f"the import of {file.name} cannot be rewritten: write `from .name import …` in one line")


def _with_indirect_imports(name: str, texts: dict[str, str], direct: dict[str, set[str]]) -> str:
    """The text of `name` with imports of the files that it needs only indirectly."""
    reached, queue = set(), list(direct[name])
    while queue:
        if (file := queue.pop()) not in reached:
            reached.add(file)
            queue += direct[file]
    return _with_imports(texts[name], {file: texts[file] for file in reached - direct[name] - {name}})


def _with_imports(text: str, files: Mapping[str, str]) -> str:
    """A file's text with imports of these files, by name and text."""
    lines = [
        f"from .{Path(file).stem} import {_first_definition(file, files[file])}  # noqa: F401  needed indirectly\n"
        for file in sorted(files)
    ]
    last = max((n.end_lineno or 0 for n in ast.parse(text).body if _precedes_imports(n)), default=0)
    parts = text.split("\n")
    return "\n".join([*parts[:last], *lines, *parts[last:]])


def with_int8(files: Mapping[str, str], auto_map: Mapping[str, Any]) -> dict[str, str]:
    """Code files that load a model in int8 (`mymodels.quantize`): the models' files import the method, which is added.

    Raises:
        CheckpointError: another file has the name of one that is needed.
    """
    method = collect_code([Path(str(int8.__file__))])
    if f'"{int8.METHOD}"' in files.get("int8.py", ""):  # ours, perhaps of another release
        return dict(files)
    for name in sorted(method.keys() & files.keys()):
        if method[name] != files[name]:
            raise CheckpointError(f"{name} has the name of a file that int8 models need: rename it")
    targets = [target for auto, target in auto_map.items() if auto.startswith("AutoModel")]
    models = {f"{str(target).partition('.')[0]}.py" for target in targets}
    return {**method, **{name: _with_imports(text, method) if name in models else text for name, text in files.items()}}


def _precedes_imports(node: ast.stmt) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.lineno < 20
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _first_definition(file: str, text: str) -> str:
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
    raise CheckpointError(f"{file} defines no name to import: merge it into the file that imports it")


def auto_map_of_files(texts: dict[str, str], first: Iterable[str] = (), *, config_class: str = "") -> dict[str, str]:
    """The `auto_map` of code files: Auto class → `file.Class`.

    Included are configs and, directly or indirectly, subclasses of `PreTrainedModel` that share the name's stem with a
    class of `first` (`X` of `XForCausalLM` and `XModel`). If several classes are for one Auto class, those in `first`
    take precedence. With `config_class`, models of another config class are excluded, because Auto classes reject them.
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
        auto_class = auto_class_of(name, forward_arguments(name, classes))
        if not auto_class or (stems and _stem(name) not in stems and name not in wanted):
            continue
        if auto_class != "AutoConfig" and config_class and config_class_of(name, classes) not in ("", config_class):
            continue
        if name in wanted or is_a(name, "Config" if auto_class == "AutoConfig" else "PreTrainedModel", classes):
            rank = wanted.index(name) if name in wanted else len(wanted)
            if auto_class not in found or rank < found[auto_class][0]:
                found[auto_class] = rank, f"{file.removesuffix('.py')}.{name}"
    return {auto_class: target for auto_class, (_, target) in sorted(found.items())}


def _stem(name: str) -> str:
    """`X` of `XForSomething`, `XModel`, `XConfig`."""
    found = re.match(r"(\w+?)(For[A-Z]\w*|LMHeadModel|PreTrainedModel|Model|Config)$", name)
    return found[1] if found else ""


def stock_model(name: str) -> type[PreTrainedModel] | None:
    """The model class of transformers with this name, or None."""
    found = getattr(transformers, name, None) if name.isidentifier() and name[:1].isupper() else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def forward_arguments(name: str, classes: Mapping[str, tuple[str, ast.ClassDef]], depth: int = 20) -> list[str]:
    """The arguments of a class's `forward`, its own or inherited from these classes or from transformers."""
    if name not in classes or depth == 0:
        stock: Any = stock_model(name)
        return list(inspect.signature(stock.forward).parameters)[1:] if stock else []
    for node in classes[name][1].body:
        if isinstance(node, ast.FunctionDef) and node.name == "forward":
            return [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name][1].bases]
    return next((found for base in bases if (found := forward_arguments(base, classes, depth - 1))), [])


def config_class_of(name: str, classes: Mapping[str, tuple[str, ast.ClassDef]], depth: int = 20) -> str:
    """The name of a model's `config_class`, its own or inherited, also from transformers; `""` if there is none."""
    if name not in classes or depth == 0:
        return getattr(getattr(stock_model(name), "config_class", None), "__name__", "")
    for node in classes[name][1].body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "config_class" for target in targets):
            value = getattr(node, "value", None)
            return ast.unparse(value).split(".")[-1] if isinstance(value, (ast.Name, ast.Attribute)) else ""
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name][1].bases]
    return next((found for base in bases if (found := config_class_of(base, classes, depth - 1))), "")


def is_a(name: str, ending: str, classes: Mapping[str, tuple[str, ast.ClassDef]], depth: int = 20) -> bool:
    """Whether a base class's name has this suffix; for `PreTrainedModel`, a model class of transformers counts too."""
    if name not in classes or depth == 0:
        return name.endswith(ending) or (ending == "PreTrainedModel" and stock_model(name) is not None)
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name][1].bases]
    return any(is_a(base, ending, classes, depth - 1) for base in bases)
