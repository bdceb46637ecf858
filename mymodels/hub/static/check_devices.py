"""Checks of devices: a forward pass follows its inputs, it names no device and takes none from a module."""

import ast
import re
from collections.abc import Iterator

from .check_model import live_code
from .code_tree import Code, Klass, calls, constant
from .repo_snapshot import CodeFile, Finding, Folder

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_FIXED = re.compile(r"(cuda|mps|xpu|npu|hpu|tpu|xla)(:\d+)?$")
_PLACES = re.compile(r"(^|\.)(to|device|tensor|arange|zeros|ones|empty|full|rand|randn|linspace|eye|\w+_like|new_\w+)$")
_REMEDY = "take the device from the tensor it meets: x.device, or register the tensor as a buffer"


def devices(folder: Folder) -> Iterator[Finding]:
    """No device is written into the code that loads and runs the model."""
    code = live_code(folder)
    running = _running(code)
    for file in code.files.values():
        guarded = _behind_a_test(file)
        for function in [n for n in ast.walk(file.tree) if isinstance(n, _Function)]:
            inside = function.name in running
            for call in calls(function):
                named = _fixed_device(file, call)
                if not named:
                    continue
                soft = id(call) in guarded or not inside
                where = f"in {function.name}" + ("" if inside else ", which the model itself does not call")
                what = f"{named} {where}: the model runs nowhere but on that device"
                yield Finding("warning" if soft else "failed", what, file.at(call), _REMEDY)
    for klass in code.classes:
        yield from _device_of_a_module(code, klass)


def _fixed_device(file: CodeFile, call: ast.Call) -> str:
    """How a call names a device, or nothing."""
    func = call.func
    attr = func.attr if isinstance(func, ast.Attribute) else ""
    dotted = file.dotted(func)
    if attr in ("cuda", "xpu", "npu", "hpu") and not dotted.startswith(("torch.", f"{attr}.")):
        return f"`{ast.unparse(call)[:60]}`"
    if dotted == "torch.cuda.current_device":
        return "`torch.cuda.current_device()`"
    if not _PLACES.search(dotted or attr):
        return ""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
    if attr == "to" or dotted in ("torch.device",):
        given += call.args[:1]
    for value in given:
        text = constant(value)
        if isinstance(text, str) and _FIXED.match(text):
            return f"`{ast.unparse(call)[:60]}`"
        if isinstance(value, ast.JoinedStr) and re.match(r"f['\"](cuda|xpu|npu)", ast.unparse(value)):
            return f"`{ast.unparse(call)[:60]}`"
        if attr == "to" and isinstance(value, ast.Constant) and isinstance(text, int) and not isinstance(text, bool):
            return f"`{ast.unparse(call)[:60]}`"
    return ""


def _behind_a_test(file: CodeFile) -> set[int]:
    """The `id` of what runs only where the code found the device: `if torch.cuda.is_available()`, `if x.is_cuda`."""
    found: set[int] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.If, ast.IfExp)) and re.search(
            r"cuda|xpu|npu|device|is_available", ast.unparse(node.test)
        ):
            found |= {id(inner) for inner in ast.walk(node)}
    return found


_ENTRIES = ("forward", "__init__", "_init_weights", "prepare_inputs_for_generation", "get_input_embeddings", "__call__")


def _running(code: Code) -> set[str]:
    """The names of the functions that loading and running a model call, directly or not."""
    bodies: dict[str, set[str]] = {}
    for file in code.files.values():
        for node in ast.walk(file.tree):
            if isinstance(node, _Function):
                words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                words |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                bodies.setdefault(node.name, set()).update(words)
    found = {name for name in _ENTRIES if name in bodies}
    waiting = list(found)
    while waiting:
        for name in bodies[waiting.pop()] & bodies.keys() - found:
            found.add(name)
            waiting.append(name)
    return found


_OF_PARAMETERS = re.compile(r"next\(self(\.\w+)*\.parameters\(\)\)\.device$")
_OF_A_WEIGHT = re.compile(r"self\.\w+(\.\w+|\[\w+\])*\.(weight|bias)\.device$")


def _device_of_a_module(code: Code, klass: Klass) -> Iterator[Finding]:
    """Devices that `forward` takes off parameters: on "meta" where accelerate keeps these on the disk."""
    forward = klass.method("forward") if code.is_module(klass) else None
    if forward is None:
        return
    inside = {id(n) for call in calls(forward) for value in _device_values(call) for n in ast.walk(value)}
    named = {
        goal.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign)
        for goal in node.targets
        if isinstance(goal, ast.Name)
    }
    for node in ast.walk(forward):
        if not isinstance(node, ast.Attribute) or node.attr != "device":
            continue
        text = ast.unparse(node)
        used = id(node) in inside or bool(named & {"device"})
        if used and (_OF_PARAMETERS.match(text) or _OF_A_WEIGHT.match(text)):
            what = (
                f"{klass.name}.forward takes the device from {text}, which is not that of its inputs under a device map"
            )
            yield Finding("warning", what, klass.file.at(node), _REMEDY)


def _device_values(call: ast.Call) -> list[ast.expr]:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
    moves = isinstance(call.func, ast.Attribute) and call.func.attr == "to"
    return given + (call.args[:1] if moves else [])


CHECKS = {"devices": devices}
