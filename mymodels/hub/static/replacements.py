"""Checks for code that changes modules, classes and tables of other packages, by assignment or by a call."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

from .library_modules import is_module, words
from .reading import MAIN, Reader
from .repo_snapshot import Finding
from .walking import walk

_REGISTRIES = re.compile(
    r"(ALL_\w*FUNCTIONS|ACT2FN|ACT2CLS|ROPE_\w+FUNCTIONS|\w*_MAPPING|\w*_REGISTRY|AttentionInterface|AttentionMaskInterface)"
    r"(\._(extra_content|mapping|model_mapping|config_mapping|global_mapping))?$"
)
_STOCK_KEYS = words(
    "eager sdpa flash_attention_2 flash_attention_3 flex_attention paged_attention sdpa_paged eager_paged default linear dynamic "
    "yarn longrope llama3 proportional gelu relu silu swish tanh sigmoid gelu_new gelu_fast quick_gelu gelu_pytorch_tanh "
    "gelu_python mish relu2 relu6 leaky_relu laplace"
)


def effect(reader: Reader, node: ast.AST, inside: str, does: str, remedy: str, status: str = "") -> Finding:
    """A finding of one thing that the code does to the process, and when."""
    what = f"{reader.file.name} {does}, {reader.moment(inside)}"
    return Finding(status or _status(reader, inside), what, reader.file.at(node), remedy)


def _status(reader: Reader, inside: str) -> str:
    """`failed` for code that runs on import, construction or a call of the model; otherwise `warning`."""
    used = reader.runs_at_import(inside) or inside in _USED or inside in reader.used
    return "failed" if used and inside != MAIN else "warning"


_USED = {
    "forward",
    "__init__",
    "__call__",
    "post_init",
    "_init_weights",
    "__post_init__",
    "from_pretrained",
    "_from_config",
    "generate",
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_reorder_cache",
    "tie_weights",
    "preprocess",
    "_forward",
    "postprocess",
    "_tokenize",
}
_SETTERS = {
    "builtins.setattr",
    "builtins.delattr",
    "builtins.type.__setattr__",
    "builtins.type.__delattr__",
    "unittest.mock.patch.object",
}


def assignments(reader: Reader) -> Iterator[Finding]:
    """Assignments to, and deletions from, objects of other packages."""
    for node, inside in reader.nodes:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign) and _is_restored(reader, node):
            continue
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target] if node.value is not None else []
        for target in targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)):
                key = reader.meanings.text(target.slice) if isinstance(target, ast.Subscript) else target.attr
                yield from _changed(reader, node, inside, target.value, key, isinstance(target, ast.Subscript))
        if isinstance(node, ast.Call):
            names = reader.meanings.names(node.func)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if names & _SETTERS and len(node.args) > 1:
                yield from _changed(reader, node, inside, node.args[0], reader.meanings.text(node.args[1]), False)
            elif method in ("register", "update", "pop", "clear", "setdefault", "__setitem__") and isinstance(
                node.func, ast.Attribute
            ):
                yield from _registered(reader, node, inside, node.func.value)


def _is_restored(reader: Reader, node: ast.Assign) -> bool:
    """Whether a `finally` around an assignment, or with it, sets the target to the value that was saved before."""
    target, ended = ast.unparse(node.targets[0]), None
    parent: ast.AST | None = node
    while parent is not None and not isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        parent = reader.parent(parent)
        if isinstance(parent, ast.Try) and ended is None:
            ended = next((each for each in parent.finalbody if _sets(each, target)), None)
    if ended is None or parent is None or len(node.targets) > 1:
        return False
    saved = ast.unparse(ended.value)
    return any(_sets(each, saved) and ast.unparse(each.value) == target for each in ast.walk(parent))


def _sets(node: ast.AST, target: str) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [target]


def _changed(
    reader: Reader, node: ast.AST, inside: str, of: ast.expr, key: str | None, entry: bool
) -> Iterator[Finding]:
    own = reader.file.names | {}
    for name in sorted(reader.meanings.names(of)):
        shown = f"{name}.{key or '…'}"
        if name.startswith(("globals()", "builtins.super", ".")) or (
            name.partition(".")[0] == "builtins" and name != "builtins"
        ):
            continue
        if name == "os.environ":
            yield effect(
                reader,
                node,
                inside,
                f"changes environment variables, by os.environ[{key!r}]",
                "leave them to the caller",
            )
        elif name.startswith(("torch.backends", "torch._dynamo", "torch._inductor", "torch._functorch")):
            yield effect(
                reader,
                node,
                inside,
                f"changes a setting of torch for the whole process, {shown}",
                "leave it to the caller",
            )
        elif name in ("sys.modules", "sys.path") or (name == "sys" and key in ("path", "modules", "meta_path", "argv")):
            remedy = "import siblings by `from .name import …`"
            yield effect(reader, node, inside, f"changes what the whole process imports, {shown}", remedy)
        elif entry and name.endswith(".__dict__") and _is_foreign(name):
            yield effect(
                reader,
                node,
                inside,
                f"changes {name.removesuffix('.__dict__')}.{key or '…'}, which is not its own, for the whole process",
                "derive a class of your own instead of changing another's",
            )
        elif entry:
            if _is_stock_entry(name, key):
                remedy = "register it under a name of its own, and name that in the config"
                yield effect(
                    reader, node, inside, f"replaces {key!r} in {name}, for every model of the process", remedy
                )
        elif _is_foreign(name) and (not isinstance(of, ast.Name) or of.id in own or _is_class(name)):
            remedy = "derive a class of your own instead of changing another's"
            yield effect(reader, node, inside, f"changes {shown}, which is not its own, for the whole process", remedy)


def given_to_patchers(reader: Reader) -> Iterator[Finding]:
    """Modules and classes of other packages passed to a function of the file that changes its argument."""
    patchers: dict[str, list[tuple[int, str]]] = {}
    for function, _ in reader.nodes:
        if isinstance(function, ast.FunctionDef):
            parameters = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
            changed = _changed_names(reader, function)
            patchers[function.name] = [(i, name) for i, name in enumerate(parameters) if name in changed]
    for call, _, inside in reader.calls:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        for place, parameter in patchers.get(call.func.id, ()):
            given = call.args[place] if place < len(call.args) else None
            given = next((k.value for k in call.keywords if k.arg == parameter), given)
            for name in sorted(reader.meanings.names(given)):
                if _is_foreign(name) and (is_module(name) or _is_class(name)):
                    does = f"changes {name}, which is not its own, for the whole process, by {call.func.id}"
                    remedy = "derive a class of your own instead of changing another's"
                    yield effect(reader, call, inside, does, remedy)


def _changed_names(reader: Reader, function: ast.FunctionDef) -> set[str]:
    """The variables whose attributes a function sets or deletes."""
    found: set[str] = set()
    for node in walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(getattr(node.value, "id", ""))
        elif isinstance(node, ast.Call) and node.args and reader.meanings.names(node.func) & _SETTERS:
            found.add(getattr(node.args[0], "id", ""))
    return found - {"", "self", "cls"}


def _is_foreign(name: str) -> bool:
    """Whether a name is a module or class of another package, and not a call result or an instance's attribute."""
    return bool(re.match(r"[A-Za-z_]\w*(\.\w+)*$", name)) and not name.startswith("builtins.")


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2][:1].isupper()


def _is_stock_entry(name: str, key: str | None) -> bool:
    if name == "transformers.models" or not _REGISTRIES.search(name):
        return False
    return key is None or key in _STOCK_KEYS or key in _model_types()


@lru_cache(maxsize=1)
def _model_types() -> frozenset[str]:
    """The model types of the installed transformers."""
    from importlib.util import find_spec

    spec = find_spec("transformers")
    models = Path(spec.origin).parent / "models" if spec is not None and spec.origin else None
    return frozenset(path.name for path in models.iterdir() if path.is_dir()) if models is not None else frozenset()


def _registered(reader: Reader, call: ast.Call, inside: str, of: ast.expr) -> Iterator[Finding]:
    """`ALL_ATTENTION_FUNCTIONS.register("sdpa", …)`, `ACT2FN.update({"gelu": …})`, `AutoConfig.register("bert", …)`."""
    assert isinstance(call.func, ast.Attribute)
    for name in sorted(reader.meanings.names(of)):
        if name.endswith(".__dict__") and _is_foreign(name) and call.func.attr != "register":
            does = f"changes {name.removesuffix('.__dict__')}, which is not its own, by {call.func.attr}, for the whole process"
            yield effect(reader, call, inside, does, "derive a class of your own instead of changing another's")
            continue
        first = call.args[0] if call.args else None
        keys = (
            [reader.meanings.text(key) for key in first.keys]
            if isinstance(first, ast.Dict)
            else [reader.meanings.text(first)]
        )
        auto = re.search(r"transformers\.(\w+\.)*Auto(Config|Model\w*|Tokenizer)$", name)
        keys += [_family(known) for known in sorted(reader.meanings.names(first))] if auto and first is not None else []
        if auto and not any(key in _model_types() for key in keys):
            continue
        for key in keys:
            if key is not None and (auto or _is_stock_entry(name, key)):
                remedy = "register it under a name of its own, and name that in the config"
                what = f"replaces {key!r} in {name}, for every model of the process"
                yield effect(reader, call, inside, what, remedy)
                break


def _family(config_class: str) -> str | None:
    """The model type of a config class given by full name: `transformers.GPT2Config` → `gpt2`."""
    found = re.match(r"transformers\.(?:models\.(\w+)\.)?(?:\w+\.)*(\w+)Config$", config_class)
    if found is None:
        return None
    return found[1] or next((f for f in _model_types() if f.replace("_", "") == found[2].lower()), None)
