"""Parse the author's file without running it: its classes, and code that would break on another machine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..checkpoints import CheckpointError
from ..messages import shorten

_CELL = re.compile(r"^\s*(%%?|!)\s*\w")
_ABSOLUTE = re.compile(
    r"(/(home|Users|mnt|data|root|tmp|content|kaggle|workspace|work|opt|var|media|scratch|gpfs|nfs)/\S+|~/\S+|[A-Za-z]:[\\/]\S+)$"
)
_SETTINGS = re.compile(
    r"(seed|manual_seed|seed_everything|set_seed|set_default_\w+|set_num_threads|filterwarnings|simplefilter|basicConfig)$"
)
_RUNS = re.compile(
    r"(open|load|loads|load_dataset|read_csv|read_json|read_text|read_bytes|DataLoader|backward|step|fit|train|eval|"
    r"parse_args|Trainer|TrainingArguments|Adam\w*|SGD|RMSprop|cuda|to|from_pretrained|init|compile|summary)$"
)


class AuthorFile(NamedTuple):
    """The author's file, parsed.

    Attributes:
        path: path of the file.
        text: its content.
        tree: its syntax tree.
        classes: name → definition of each top-level class.
    """

    path: Path
    text: str
    tree: ast.Module
    classes: dict[str, ast.ClassDef]


def split_source(source: str) -> tuple[Path, str]:
    """`my_model.py:MyNet` as a path and a class name, which is empty if none is named.

    Raises:
        CheckpointError: the file does not exist, or is a notebook.
    """
    place, colon, name = source.rpartition(":")
    if not colon or (len(place) == 1 and place.isalpha()):  # no class, but perhaps a drive letter
        place, name = source, ""
    path = Path(place)
    if path.suffix == ".ipynb":
        raise CheckpointError(f"{path} is a notebook: put the cell with the class into a .py file and adopt that file")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file, name the .py file and the class, as in my_model.py:MyNet"
        )
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise CheckpointError(
            f"{path}: rename it to NAME.py, where NAME is letters, digits and underscores: it is imported"
        )
    return path, name


def read_author_file(path: Path) -> AuthorFile:
    """Parse a file.

    Raises:
        CheckpointError: the file is not valid Python, or contains lines of a notebook.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        for number, line in enumerate(text.splitlines(), 1):
            if _CELL.match(line):
                raise CheckpointError(
                    f"{path}:{number} is a line of a notebook, `{line.strip()[:60]}`: remove it, Python does not run it"
                ) from None
        place = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)
        raise CheckpointError(f"{place} is not Python: {getattr(error, 'msg', error)}") from None
    return AuthorFile(path, text, tree, {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})


def find_class(file: AuthorFile, name: str) -> str:
    """The name of the class to adopt; without a name, the only module that no other class of the file uses.

    Raises:
        CheckpointError: there is no such class, or several could be meant.
    """
    modules = [cls for cls in file.classes if _is_module(cls, file.classes)]
    if name in file.classes and name in modules:
        return name
    listed = ", ".join(modules) or "none"
    if name in file.classes:
        raise CheckpointError(
            f"{file.path}: {name} is not an nn.Module or PreTrainedModel; the modules in the file are: {listed}"
        )
    if name:
        inner = [node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef) and node.name == name]
        if inner:
            raise CheckpointError(
                f"{file.path}:{inner[0].lineno}: {name} is defined inside another block: move it to the top level of the file"
            )
        raise CheckpointError(f"{file.path} has no class {name}; its modules are: {listed}")
    used = {
        call.func.id
        for cls in modules
        for call in ast.walk(file.classes[cls])
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id != cls
    }
    outer = [cls for cls in modules if cls not in used]
    if len(outer) == 1:
        return outer[0]
    raise CheckpointError(
        f"{file.path}: name the class after a colon, {file.path.name}:CLASS; its modules are: {listed}"
    )


def _is_module(name: str, classes: dict[str, ast.ClassDef], depth: int = 20) -> bool:
    if name not in classes or depth == 0:
        return (
            name in ("Module", "Sequential", "LightningModule")
            or name.endswith(("PreTrainedModel", "Model"))
            or "For" in name
        )
    bases = [ast.unparse(base).split(".")[-1] for base in classes[name].bases]
    return any(_is_module(base, classes, depth - 1) for base in bases if base != name)


def check_author_file(file: AuthorFile) -> None:
    """Refuse code that trains when it is imported, needs this machine's files, or needs a CUDA device.

    Raises:
        CheckpointError: file, line and remedy of the first such statement.
    """
    faults = sorted(_faults(file), key=lambda fault: fault[0])
    if faults:
        line, what = faults[0]
        more = (
            f" (and {len(faults) - 1} more such lines: {', '.join(str(n) for n, _ in faults[1:6])})"
            if faults[1:]
            else ""
        )
        raise CheckpointError(f"{file.path}:{line}: {what}{more}")


def check_post_init(file: AuthorFile, name: str) -> None:
    """Refuse a PreTrainedModel that calls `init_weights` where transformers 5 wants `post_init`.

    Raises:
        CheckpointError: with the line to change.
    """
    calls = {
        node.func.attr: node.lineno
        for node in ast.walk(file.classes[name])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "self"
    }
    if "init_weights" in calls and "post_init" not in calls:
        raise CheckpointError(
            f"{file.path}:{calls['init_weights']}: transformers 5 raises at self.init_weights(): change this line to self.post_init()"
        )


def _faults(file: AuthorFile) -> Iterator[tuple[int, str]]:
    guard = 'move it below `if __name__ == "__main__":` or into another file'
    for node in _outside_main(file.tree):
        if isinstance(node, (ast.For, ast.While, ast.AsyncFor)) and any(
            isinstance(n, ast.Call) for n in ast.walk(node)
        ):
            yield node.lineno, f"a loop runs when the file is imported: {guard}"
        elif isinstance(node, ast.With):
            yield node.lineno, f"`with {_short(node.items[0].context_expr)}` runs when the file is imported: {guard}"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = _last_name(node.value)
            kind = (
                "changes the process that imports the file"
                if _SETTINGS.search(called)
                else "runs when the file is imported"
            )
            yield node.lineno, f"`{_short(node.value)}` {kind}: {guard}"
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            for call in [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]:
                called = _last_name(call)
                if called in file.classes and _is_module(called, file.classes):
                    yield node.lineno, f"`{_short(node)}` builds a model when the file is imported: {guard}"
                    break
                if _RUNS.match(called) and ast.unparse(call.func) != "re.compile":
                    yield node.lineno, f"`{_short(node)}` runs when the file is imported: {guard}"
                    break
    skipped = _main_blocks(file.tree)
    texts = {id(node.value) for node in ast.walk(file.tree) if isinstance(node, ast.Expr)}  # docstrings
    compared = {id(part) for node in ast.walk(file.tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    for part in _walk(file.tree, skipped):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in texts | compared:
            if _ABSOLUTE.match(part.value):
                yield part.lineno, f"the absolute path {part.value!r} exists only on your machine: make it an argument"
            elif re.fullmatch(r"cuda(:\d+)?", part.value):
                yield (
                    part.lineno,
                    f"not every machine has the device {part.value!r}: use the device of an input, as in x.device",
                )
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            for call in [n for n in ast.walk(part) if isinstance(n, ast.Call) and _last_name(n) == "from_pretrained"]:
                yield (
                    call.lineno,
                    f"`{_short(call)}` loads weights whenever the model is built: build it from a config instead, as in "
                    "BertModel(config) or AutoModel.from_config(config), the weights come from --weights",
                )
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr == "cuda":
            yield (
                part.lineno,
                f"`{_short(part)}` needs a CUDA device: leave it out, or use .to(x.device) with an input x",
            )
        elif isinstance(part, ast.Attribute) and ast.unparse(part) in (
            "torch.cuda.FloatTensor",
            "torch.cuda.LongTensor",
        ):
            yield part.lineno, f"`{ast.unparse(part)}` needs a CUDA device: use torch.zeros(…, device=x.device)"


def _outside_main(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run on import, including those in a top-level `if` or `try`."""
    queue = list(tree.body)
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.If):
            if not _is_main(node):
                queue = [*node.body, *node.orelse, *queue]
        elif isinstance(node, ast.Try):
            queue = [
                *node.body,
                *(n for handler in node.handlers for n in handler.body),
                *node.orelse,
                *node.finalbody,
                *queue,
            ]
        else:
            yield node


def _is_main(node: ast.If) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))


def _main_blocks(tree: ast.Module) -> list[ast.AST]:
    return [node for node in tree.body if isinstance(node, ast.If) and _is_main(node)]


def _walk(tree: ast.AST, skipped: list[ast.AST]) -> Iterator[ast.AST]:
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop(0)
        if node not in skipped:
            yield node
            queue += ast.iter_child_nodes(node)


def _last_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _short(node: ast.AST) -> str:
    return shorten(ast.unparse(node).split("\n")[0], 60)


def attributes_read(file: AuthorFile, parameter: str) -> set[str]:
    """The attributes that the file reads of a constructor argument, `config.x`, in any of its classes."""
    return {
        node.attr
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == parameter)
            or (
                isinstance(node.value, ast.Attribute)
                and node.value.attr == parameter
                and isinstance(node.value.value, ast.Name)
                and node.value.value.id == "self"
            )
        )
    }


def keys_read(file: AuthorFile, parameter: str) -> set[str]:
    """The keys that the file reads of an argument, `batch["x"]`, `batch.get("x")` or `batch.pop("x")`."""
    found = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == parameter:
            found |= {n.value for n in [node.slice] if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found | set(keys_with_default(file, parameter))


def keys_with_default(file: AuthorFile, parameter: str) -> dict[str, ast.expr | None]:
    """Optional keys, `cfg.get("x", 3)` or `getattr(cfg, "x", 3)`, and their defaults."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        arguments = list(node.args)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            arguments.insert(0, node.func.value)
        elif not (isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(arguments) == 3):
            continue
        if len(arguments) < 2 or ast.unparse(arguments[0]) not in (parameter, f"self.{parameter}"):
            continue
        key = arguments[1]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found[key.value] = arguments[2] if len(arguments) > 2 else None
    return found


def is_unpacked(file: AuthorFile, parameter: str) -> bool:
    """Whether the file passes an argument on as keywords, `module(**batch)`."""
    return any(
        isinstance(node, ast.keyword)
        and node.arg is None
        and isinstance(node.value, ast.Name)
        and node.value.id == parameter
        for node in ast.walk(file.tree)
    )
