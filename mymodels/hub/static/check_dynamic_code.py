"""Code that creates or loads code at run time, or hides it: names in variables, modules as values, internals."""

import ast
import re
from collections.abc import Iterator

from .code_tree import constant
from .library_modules import is_module
from .policy import FORBIDDEN_DUNDERS, HANDLED, INTERNAL_TEXT, PIECED, verdict_on
from .reading import Reader, readers
from .repo_snapshot import Finding, Folder, brief
from .used_names import is_super, used_names
from .walking import walk

_LIBRARIES = ("torch", "transformers", "numpy", "os", "sys", "builtins")


def dynamic_code(folder: Folder) -> Iterator[Finding]:
    """Code that creates or loads code at run time, whose effect cannot be read from the source."""
    yield from used_names(folder, "dynamic code")
    for reader in readers(folder):
        for call, names, inside in reader.calls:
            if isinstance(call, ast.Call):
                for what, remedy, status in _loading_calls(reader, call, names):
                    worst = reader.status(inside) if status == "failed" else "warning"
                    text = f"{reader.file.name} {what}, {reader.moment(inside)}"
                    yield Finding(worst, text, reader.file.at(call), remedy)
        yield from _modules_as_values(reader)
        yield from _internals(reader)
        yield from _getters_given_modules(reader)
        yield from _own_pickling(reader)


def _loading_calls(reader: Reader, call: ast.Call, names: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """Faults of a call that depend on its arguments: (what it does, remedy, status)."""
    keywords = _keywords(reader, call)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if names & {"torch.load", "torch.serialization.load"}:
        if constant(keywords.get("weights_only")) is not True or "pickle_module" in keywords:
            yield (
                "unpickles, by torch.load without weights_only=True",
                "add weights_only=True, or read safetensors",
                "failed",
            )
    elif any(re.match(r"numpy\.(\w+\.)*(load|read_array|NpzFile|open_memmap)$", name) for name in names):
        allow = keywords.get("allow_pickle", call.args[2] if len(call.args) > 2 else None)
        if allow is not None and constant(allow) is not False:
            yield "unpickles, by numpy.load with allow_pickle", "do not load it", "failed"
    elif any(re.match(r"(ruamel\.)?yaml\.(unsafe_load|full_load|load)(_all)?$", name) for name in names):
        if "Safe" not in ast.unparse(call):
            yield f"lets YAML build objects, by {min(names)}", "use yaml.safe_load", "failed"
    elif names & {"importlib.import_module", "importlib.reload"} and call.args:
        text = reader.meanings.text(call.args[0])
        verdict = verdict_on(text) if text else None
        plain = text is not None and verdict is None and text not in HANDLED
        shown = brief(text) if text else "what a variable names"
        if names & {"importlib.import_module"} or not text:
            yield f"imports {shown}", "write the import out", "warning" if plain else "failed"
    elif names & {"inspect.getmembers", "inspect.getmembers_static"} and call.args:
        if any(name.partition(".")[0] in _LIBRARIES for name in reader.meanings.names(call.args[0])):
            yield (
                f"takes all that {ast.unparse(call.args[0])[:40]} holds, by inspect.getmembers",
                "write it out",
                "failed",
            )
    elif names & {"builtins.globals", "builtins.vars", "builtins.locals"}:
        yield from _tables(reader, call, names)
    elif names & {"operator.methodcaller", "operator.attrgetter"} and call.args:
        text = reader.meanings.text(call.args[0])
        if text is None or INTERNAL_TEXT.search(text) or set(text.split(".")) & PIECED:
            yield f"takes {brief(text) if text else 'what a variable names'} by {min(names)}", "write it out", "failed"
    of_transformers = any(name.startswith("transformers.") for name in names)
    loads = of_transformers or method.endswith(("from_pretrained", "from_config"))
    if loads and _trusts(keywords):
        remedy = "do not load it unless you trust that code too"
        yield "loads other code with trust_remote_code=True", remedy, "failed"
    if names & {"builtins.getattr"} and len(call.args) > 1 and reader.meanings.text(call.args[1]) is None:
        yield from _unknown_attribute(reader, call)


def _keywords(reader: Reader, call: ast.Call) -> dict[str | None, ast.expr]:
    """The keywords of a call, including those of an unpacked dict: `f(**{"allow_pickle": True})`."""
    found: dict[str | None, ast.expr] = {}
    for keyword in call.keywords:
        if keyword.arg is not None:
            found[keyword.arg] = keyword.value
            continue
        for table in [keyword.value, *reader.meanings.values.get(getattr(keyword.value, "id", ""), ())[:4]]:
            if isinstance(table, ast.Dict):
                found |= {reader.meanings.text(k): v for k, v in zip(table.keys, table.values) if k is not None}
    return found


def _trusts(keywords: dict[str | None, ast.expr]) -> bool:
    """Whether a call sets `trust_remote_code` itself, and not from a variable that its caller controls."""
    given = [keywords["trust_remote_code"]] if "trust_remote_code" in keywords else []
    for value in given:
        if isinstance(value, ast.Constant):
            if value.value:
                return True
        elif not any(isinstance(n, ast.Name) and n.id not in ("bool", "int", "all", "any") for n in walk(value)):
            return True
    return False


def _tables(reader: Reader, call: ast.Call, names: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """`globals()[x]`, `vars(module)[x]`: harmless if x is a literal, or if the fields of an object are read."""
    module = call.args and reader.meanings.names(call.args[0])
    if (call.args and not module) or names & {"builtins.locals"} or (not call.args and names & {"builtins.vars"}):
        return
    parent = reader.parent(call)
    key: ast.AST | None = None
    if isinstance(parent, ast.Subscript) and parent.value is call:
        key = parent.slice
    elif isinstance(parent, ast.Attribute) and parent.attr in ("get", "pop", "__getitem__"):
        caller = reader.parent(parent)
        key = caller.args[0] if isinstance(caller, ast.Call) and caller.args else None
    elif isinstance(parent, ast.Compare):
        return
    text = reader.meanings.text(key)
    if text is None:
        shown = ast.unparse(call)[:60]
        how = "failed" if key is None or module or _is_pieced(reader, key) else "warning"
        yield f"takes what a variable names out of {shown}", "write out what it may take", how


def _unknown_attribute(reader: Reader, call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """`getattr(torch, x)` with an unknown x; two of these in a row can reach anything."""
    bases = sorted(
        n for n in reader.meanings.names(call.args[0]) if n.partition(".")[0] in ("torch", "transformers", "numpy")
    )
    modules = [base for base in bases if not base.rpartition(".")[2][:1].isupper()]
    inner, parent = call.args[0], reader.parent(call)
    nested = isinstance(inner, ast.Call) and "builtins.getattr" in reader.meanings.names(inner.func)
    further = isinstance(parent, ast.Attribute) or (
        isinstance(parent, ast.Call)
        and parent.func is not call
        and "builtins.getattr" in reader.meanings.names(parent.func)
    )
    shown = ast.unparse(call)[:80]
    if (nested and not reader.meanings.names(inner)) or (modules and (_is_pieced(reader, call.args[1]) or further)):
        yield f"takes what a variable names out of a module, by {brief(shown)}", "write it out", "failed"
    elif modules and not re.search(r"dtype|act|type|norm", ast.unparse(call.args[1])):
        yield (
            f"takes what a variable names out of {modules[0]}, by {brief(shown)}",
            "write out what it may take",
            "warning",
        )


def _is_pieced(reader: Reader, node: ast.AST, depth: int = 0) -> bool:
    """Whether a text is put together from pieces, and not just read from a config or a parameter."""
    for inner in walk(node):
        if isinstance(inner, ast.Call):
            name = inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", "")
            if name in (
                "chr",
                "bytes",
                "bytearray",
                "decode",
                "fromhex",
                "join",
                "reversed",
                "b64decode",
                "translate",
                "swapcase",
                "format",
            ):
                return True
        elif (isinstance(inner, ast.BinOp) and isinstance(inner.op, (ast.Add, ast.Mod, ast.BitXor))) or (
            isinstance(inner, ast.Slice) and inner.step is not None
        ):
            return True
        elif isinstance(inner, ast.Name) and depth < 3:
            values = reader.meanings.values.get(inner.id, ())[:4]
            if any(_is_pieced(reader, value, depth + 1) for value in values):
                return True
    return False


def _modules_as_values(reader: Reader) -> Iterator[Finding]:
    """System modules used as values, so that the source does not show what is taken from them."""
    for node, names, inside in reader.uses:
        parent = reader.parent(node)
        if "builtins.getattr" in names and isinstance(parent, ast.Call) and node in parent.args:
            others = [argument for argument in parent.args if argument is not node]
            if any(_library_modules(reader, argument) for argument in others):
                what = f"{reader.file.name} hands getattr on together with a module, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(node), "write out what it takes")
        walks = isinstance(parent, ast.Attribute) and parent.attr in ("items", "values", "copy", "popitem", "__iter__")
        if walks and isinstance(parent, ast.Attribute) and (table := min(filter(_is_table, names), default="")):
            what = f"{reader.file.name} goes through {table}, by {parent.attr}, {reader.moment(inside)}"
            yield Finding(reader.status(inside), what, reader.file.at(node), "write out what it takes")
        if isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(parent, ast.Attribute):
            continue
        module, table = min(names & HANDLED, default=""), min(filter(_is_table, names), default="")
        if module and not _is_getter(reader, node, parent):
            does = f"handles the module {ast.unparse(node)[:40]} as a value"
        elif table and not module and not _is_plain_look_up(reader, node, parent):
            does = f"handles {table}, a table of modules or of what a module holds"
        else:
            continue
        remedy = "do not load it: plain code names what it takes from a module"
        what = f"{reader.file.name} {does}, {reader.moment(inside)}"
        yield Finding(reader.status(inside), what, reader.file.at(node), remedy)


def _library_modules(reader: Reader, node: ast.AST) -> bool:
    """Whether an argument is a module of a library or the system, or a list that contains one."""
    names = {name for inner in getattr(node, "elts", [node]) for name in reader.meanings.names(inner)}
    return any(name.partition(".")[0] in _LIBRARIES and is_module(name) for name in names)


def _getters_given_modules(reader: Reader) -> Iterator[Finding]:
    """Functions of the file that read attributes by a variable, called with a module: `take(torch, name)`."""
    getters = {
        getattr(node, "name", ""): node
        for node, _ in reader.nodes
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and _takes_by_variable(reader, node)
    }
    for call, _, inside in reader.calls:
        if not isinstance(call, ast.Call):
            continue
        handed = [call.func, *call.args]
        own = any(isinstance(one, ast.Name) and one.id in getters for one in handed)
        own = own or any(isinstance(one, ast.Lambda) and _takes_by_variable(reader, one) for one in handed)
        if own and any(_library_modules(reader, argument) for argument in call.args):
            what = (
                f"{reader.file.name} has attributes of a module taken by a variable, by {brief(ast.unparse(call)[:60])}"
            )
            text = f"{what}, {reader.moment(inside)}"
            yield Finding(reader.status(inside), text, reader.file.at(call), "write out what it takes")


def _takes_by_variable(reader: Reader, function: ast.FunctionDef | ast.Lambda) -> bool:
    parameters = {argument.arg for argument in [*function.args.posonlyargs, *function.args.args]}
    for node in walk(function):
        if isinstance(node, ast.Call) and "builtins.getattr" in reader.meanings.names(node.func) and len(node.args) > 1:
            of, which = node.args[0], node.args[1]
            if isinstance(of, ast.Name) and of.id in parameters and reader.meanings.text(which) is None:
                return True
    return False


def _own_pickling(reader: Reader) -> Iterator[Finding]:
    """Classes that define what unpickling calls, which may be anything."""
    for node, inside in reader.nodes:
        if not isinstance(node, ast.FunctionDef) or node.name not in ("__reduce__", "__reduce_ex__"):
            continue
        for step in walk(node):
            if not isinstance(step, ast.Return):
                continue
            first = step.value.elts[0] if isinstance(step.value, ast.Tuple) and step.value.elts else step.value
            text = ast.unparse(first) if first is not None else ""
            if not re.match(r"(self\.__class__|type\(self\)|cls|super\(\)\.__reduce|[A-Z]\w*$|self\.from_\w+$)", text):
                what = f"{reader.file.name} has unpickling call {brief(text[:60])}, by {node.name}, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(step), "return the class and its arguments")


def _is_table(name: str) -> bool:
    library = name.startswith(("torch.", "transformers.", "numpy."))
    return name == "sys.modules" or (library and name.endswith(".__dict__"))


def _is_getter(reader: Reader, node: ast.AST, parent: ast.AST | None) -> bool:
    """`getattr(os, "sep")`, which is checked by the name that it resolves to."""
    if not (isinstance(parent, ast.Call) and parent.args[:1] == [node] and len(parent.args) > 1):
        return False
    getter = reader.meanings.names(parent.func) & {"builtins.getattr", "builtins.hasattr"}
    return bool(getter) and reader.meanings.text(parent.args[1]) is not None


def _is_plain_look_up(reader: Reader, node: ast.AST, parent: ast.AST | None) -> bool:
    """`sys.modules[__name__]`, `"x" in sys.modules`, or an entry that is checked by its own name."""
    if isinstance(parent, ast.Compare):
        return True
    if not isinstance(parent, ast.Subscript) or parent.value is not node:
        return False
    own = ast.unparse(parent.slice).endswith(("__name__", "__module__"))
    text = reader.meanings.text(parent.slice)
    return own or (text is not None and text not in HANDLED)


def _internals(reader: Reader) -> Iterator[Finding]:
    """Python's internals, as attribute or text, and attributes of unknown objects that are named like system modules."""
    for node, inside in reader.nodes:
        does, remedy = "", "do not load it"
        if isinstance(node, ast.Attribute):
            if _is_internal(reader, node):
                does = f"reaches into Python's internals, by {node.attr}"
            elif _is_module_of_something(reader, node):
                does, remedy = (
                    f"takes .{node.attr} of something",
                    "do not load it: plain code imports a module by its name",
                )
        elif isinstance(node, _TEXTS) and id(node) not in reader.docs:
            text = reader.meanings.text(node)
            if text is not None and INTERNAL_TEXT.search(text):
                does = f"reaches into Python's internals, by the text {brief(text)}"
            elif text in PIECED and not isinstance(node, ast.Constant):
                does, remedy = f"puts the text {text!r} together from pieces", "do not load it: this hides what it does"
        if does:
            what = f"{reader.file.name} {does}, {reader.moment(inside)}"
            yield Finding(reader.status(inside), what, reader.file.at(node), remedy)


_TEXTS = (ast.Constant, ast.BinOp, ast.JoinedStr, ast.Call, ast.Subscript)
_TELLING = {"os", "subprocess", "builtins", "importlib", "ctypes", "socket", "pickle", "shutil", "pty"}


def _is_internal(reader: Reader, node: ast.Attribute) -> bool:
    if node.attr in FORBIDDEN_DUNDERS:
        return not (node.attr.startswith("__reduce") and is_super(node.value))
    if node.attr in ("__mro__", "__self__", "__dict__"):
        subscript = node.attr == "__mro__" and isinstance(reader.parent(node), ast.Subscript)
        return subscript or any(base.startswith("builtins.") for base in reader.meanings.names(node.value))
    if node.attr == "__getattribute__":
        return not is_super(node.value) and not _on_self(reader, node)
    return node.attr == "from_address" and "ctypes" in reader.file.text


def _is_module_of_something(reader: Reader, node: ast.Attribute) -> bool:
    """`x.os` where x is unknown and the file assigns no such attribute."""
    unknown = not reader.meanings.names(node.value) and f".{node.attr}" not in reader.meanings.values
    return node.attr in _TELLING and unknown and isinstance(node.ctx, ast.Load)


def _on_self(reader: Reader, node: ast.Attribute) -> bool:
    call = reader.parent(node)
    first = call.args[0] if isinstance(call, ast.Call) and call.args else None
    text = reader.meanings.text(call.args[1]) if isinstance(call, ast.Call) and len(call.args) > 1 else None
    plain = text is None or text not in FORBIDDEN_DUNDERS
    return plain and isinstance(first, ast.Name) and first.id in ("self", "cls")


CHECKS = {"dynamic code": dynamic_code}
