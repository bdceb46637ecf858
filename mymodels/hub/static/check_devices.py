"""Checks of devices: forward uses the device of its inputs, not a fixed one or that of a module."""

import ast
import re
from collections.abc import Iterator

from .check_model import live_code
from .code_tree import Code, Klass, calls, constant
from .repo_snapshot import CodeFile, Finding, Folder
from .walking import children, walk

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_FIXED = re.compile(r"(cuda|mps|xpu|npu|hpu|tpu|xla)(:\d+)?$")
_TYPE = re.compile(r"torch\.(cuda|mps|xpu|npu|hpu)\.\w+Tensor$")
# calls that raise without such a device; emptying caches and querying memory do nothing then
_ONLY_THERE = re.compile(
    r"torch\.(cuda|xpu|mps|npu|hpu)\.(streams\.)?(current_device|synchronize|Stream|Event|current_stream|default_stream|stream|"
    r"get_device_name|get_device_capability|get_device_properties|set_device|device|mem_get_info|graph|CUDAGraph)$"
)
_AUTOCAST = re.compile(
    r"torch\.(amp\.)?(autocast\w*\.)?autocast$|torch\.(cuda|xpu)\.amp\.(\w+\.)?autocast$|torch\.amp\.autocast_mode\.autocast$"
)
_REMEDY = "take the device from the tensor it meets: x.device, or register the tensor as a buffer"


def devices(folder: Folder) -> Iterator[Finding]:
    """The code that loads and runs the model names no fixed device."""
    code = live_code(folder)
    running = _running(code)
    for file in code.files.values():
        guarded, texts = _behind_a_test(file), _constants(file)
        found: set[int] = set()
        for node, function in _within_functions(file.tree):
            named, works = _fixed_device(file, node, texts)
            line = getattr(node, "lineno", 0)
            if not named or line in found:
                continue
            found.add(line)
            inside = not function or function in running
            soft = works or id(node) in guarded or not inside
            where = f"in {function}" if function else "as soon as it is imported"
            where += "" if inside else ", which the model itself does not call"
            does = "it has no effect on other devices" if works else "the model runs nowhere but on that device"
            yield Finding("warning" if soft else "failed", f"{named} {where}: {does}", file.at(node), _REMEDY)
    for klass in code.classes:
        yield from _device_of_a_module(code, klass)


def _within_functions(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every node with the name of the function it is in; defaults of arguments belong to the function."""
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, function = waiting.pop()
        yield node, function
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        inner = node.name if isinstance(node, _Function) else function
        waiting += [(child, inner) for child in children(node)]


def _constants(file: CodeFile) -> dict[str, str]:
    """Names that are only ever assigned one device: `DEVICE = "cuda"`, or `torch.device("cuda")`."""
    values: dict[str, list[str | None]] = {}
    for node in walk(file.tree):
        if isinstance(node, ast.Assign):
            made = node.value
            if isinstance(made, ast.Call) and file.dotted(made.func) == "torch.device" and made.args:
                made = made.args[0]
            text = constant(made)
            for goal in node.targets:
                values.setdefault(ast.unparse(goal), []).append(text if isinstance(text, str) else None)
        elif isinstance(node, ast.arg):
            values.setdefault(node.arg, []).append(None)
    return {name: text for name, found in values.items() if len(found) == 1 and (text := found[0]) is not None}


def _source(node: ast.AST) -> str:
    """The start of an expression's source; only for findings, because it fails on deep nesting."""
    return f"`{ast.unparse(node)[:60]}`"


def _fixed_device(file: CodeFile, node: ast.AST, texts: dict[str, str]) -> tuple[str, bool]:
    """The fixed device in an expression, or ""; and whether the expression works without that device too."""
    if isinstance(node, ast.Attribute):
        dotted = file.dotted(node)
        return (_source(node) if _TYPE.match(dotted) or dotted == "torch.cuda.current_device" else ""), False
    if isinstance(node, _Function):
        pairs = zip(reversed([*node.args.posonlyargs, *node.args.args]), reversed(node.args.defaults))
        given = [*pairs, *zip(node.args.kwonlyargs, node.args.kw_defaults)]
        fixed = [arg.arg for arg, value in given if "device" in arg.arg and _is_fixed(value, {})]
        return (f"the default of `{fixed[0]}`" if fixed else ""), False
    if isinstance(node, ast.Assign):
        of_self = any(isinstance(goal, ast.Attribute) and goal.attr.endswith("device") for goal in node.targets)
        return (_source(node) if of_self and _is_fixed(node.value, {}) else ""), False
    if not isinstance(node, ast.Call):
        return "", False
    return _fixed_by_call(file, node, texts)


def _fixed_by_call(file: CodeFile, call: ast.Call, texts: dict[str, str]) -> tuple[str, bool]:
    func = call.func
    attr = func.attr if isinstance(func, ast.Attribute) else ""
    dotted = file.dotted(func)
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    first = named.get("device_type", call.args[0] if call.args else None)
    if _AUTOCAST.search(dotted):
        fixed = ".cuda.amp." in dotted or _is_fixed(first, texts)
        return (_source(call) if fixed and constant(named.get("enabled")) is not False else ""), True
    if attr in ("cuda", "xpu", "npu", "hpu") and not dotted.startswith(("torch.", f"{attr}.")):
        return _source(call), False
    if _ONLY_THERE.match(dotted):
        return _source(call), False
    if attr == "type" and isinstance(text := constant(first), str) and _TYPE.match(text):
        return _source(call), False
    given = [named["device"]] if "device" in named else []
    if attr in ("to", "to_empty", "move_to_device") or dotted in ("torch.device", "torch.set_default_device"):
        given += call.args[:1]
    for value in given:
        if _is_fixed(value, texts):
            return _source(call), False
        number = constant(value)
        if attr == "to" and isinstance(number, int) and not isinstance(number, bool):
            return _source(call), False
    return "", False


def _is_fixed(value: ast.expr | None, texts: dict[str, str]) -> bool:
    """Whether an expression is a device name, as a literal or through a constant."""
    text = constant(value)
    if text is None and isinstance(value, (ast.Name, ast.Attribute)):
        text = texts.get(ast.unparse(value))
    if isinstance(value, ast.JoinedStr):
        return re.match(r"f['\"](cuda|xpu|npu)", ast.unparse(value)) is not None
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "torch.device" and value.args:
        text = constant(value.args[0])
    return isinstance(text, str) and _FIXED.match(text) is not None


def _behind_a_test(file: CodeFile) -> set[int]:
    """The `id` of nodes that run only if the code found the device: `if torch.cuda.is_available()`, `if x.is_cuda`."""
    found: set[int] = set()
    for node in walk(file.tree):
        if isinstance(node, (ast.If, ast.IfExp)) and re.search(
            r"cuda|xpu|npu|device|is_available", ast.unparse(node.test)
        ):
            found |= {id(inner) for inner in walk(node)}
        elif isinstance(node, ast.Try) and node.handlers:
            found |= {id(inner) for step in node.body for inner in walk(step)}
    return found


_ENTRIES = ("forward", "__init__", "_init_weights", "prepare_inputs_for_generation", "get_input_embeddings", "__call__")


def _running(code: Code) -> set[str]:
    """The names of the functions that loading or running a model calls, directly or indirectly."""
    bodies: dict[str, set[str]] = {}
    for file in code.files.values():
        for node in walk(file.tree):
            if isinstance(node, _Function):
                words = {n.id for n in walk(node) if isinstance(n, ast.Name)}
                words |= {n.attr for n in walk(node) if isinstance(n, ast.Attribute)}
                bodies.setdefault(node.name, set()).update(words)
    found = {name for name in _ENTRIES if name in bodies}
    waiting = list(found)
    while waiting:
        for name in bodies[waiting.pop()] & bodies.keys() - found:
            found.add(name)
            waiting.append(name)
    return found


_OF_PARAMETERS = re.compile(
    r"(next\((iter\()?self(\.\w+)*\.parameters\(\)\)?\)|list\(self(\.\w+)*\.parameters\(\)\)\[\d+\])\.device$"
)
_OF_A_WEIGHT = re.compile(r"self\.\w+(\.\w+|\[\w+\])*\.(weight|bias)\.device$")


def _device_of_a_module(code: Code, klass: Klass) -> Iterator[Finding]:
    """Devices that `forward` takes from parameters, which are on "meta" if accelerate offloads them to disk."""
    forward = klass.method("forward") if code.is_module(klass) else None
    if forward is None:
        return
    values = [value for call in calls(forward) for value in _device_values(call)]
    inside = {id(n) for value in values for n in walk(value)}
    used = {value.id for value in values if isinstance(value, ast.Name)}
    for node in walk(forward):
        if isinstance(node, ast.Assign) and any(isinstance(g, ast.Name) and g.id in used for g in node.targets):
            inside |= {id(n) for n in walk(node.value)}
    for node in walk(forward):
        if not isinstance(node, ast.Attribute) or node.attr != "device" or id(node) not in inside:
            continue
        text = ast.unparse(node)
        if _OF_PARAMETERS.match(text) or _OF_A_WEIGHT.match(text):
            what = (
                f"{klass.name}.forward takes the device from {text}, which is not that of its inputs under a device map"
            )
            yield Finding("warning", what, klass.file.at(node), _REMEDY)


def _device_values(call: ast.Call) -> list[ast.expr]:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
    moves = isinstance(call.func, ast.Attribute) and call.func.attr == "to"
    return given + (call.args[:1] if moves else [])


CHECKS = {"devices": devices}
