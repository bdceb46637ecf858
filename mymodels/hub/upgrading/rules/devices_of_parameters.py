"""Parameters that a constructor makes on a device of its own choice, or by tensor types: with data where there is none."""

import ast
import re
from collections.abc import Iterator

import libcst as cst

from ...static.check_init import run_by
from ...static.code_tree import Code, Klass, calls, constant
from ..parts import with_parts
from ..rule import Context, Rewriter, Rule, rewrites

_DEVICE = '''
def device_of_new(device):
    """The device to make a parameter on: none of its own where transformers builds a model without data (on "meta")."""
    import torch

    return None if torch.empty(0).is_meta else device
'''
_MOVED = '''
def made_like_others(tensor):
    """A tensor without data where transformers builds a model without any (on "meta"): the loader fills it."""
    import torch

    return tensor.to("meta") if torch.empty(0).is_meta else tensor
'''
_NAMES = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?$")
# what makes tensors on the CPU whatever the default device is
_TYPES = re.compile(r"torch\.(\w*Tensor|from_numpy)$")
_Place = tuple[int, int]  # line and column of a call


def _constructors(context: Context) -> Iterator[tuple[Klass, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for klass in context.code.classes:
        init = klass.method("__init__")
        if init is not None and klass.file.name == context.file.name and context.code.is_module(klass):
            yield klass, init


def _find(context: Context) -> tuple[set[_Place], set[_Place]]:
    """The calls whose `device=` is a device by name, and the `nn.Parameter(…)` of a tensor that is on the CPU anyway."""
    devices: set[_Place] = set()
    moved: set[_Place] = set()
    chosen = _chosen(context)
    for klass, init in _constructors(context):
        dotted = klass.file.dotted
        inside = {id(call) for method in klass.methods() for call in calls(method)}
        for call in run_by(context.code, klass, init):
            parameter = dotted(call.func) in ("torch.nn.Parameter", "torch.nn.parameter.Parameter")
            if id(call) not in inside or not (parameter or _makes_parameters(context.code, klass, call)):
                continue
            makers = [call, *(calls(call.args[0]) if parameter and call.args else ())]
            for maker in makers:
                given = next((keyword.value for keyword in maker.keywords if keyword.arg == "device"), None)
                if given is not None and _is_named(given, init, chosen):
                    devices.add((maker.lineno, maker.col_offset))
            typed = parameter and any(_TYPES.match(dotted(maker.func)) for maker in makers[1:])
            if typed and "made_like_others" not in ast.unparse(call):
                moved.add((call.lineno, call.col_offset))
    return devices, moved


def _makes_parameters(code: Code, klass: Klass, call: ast.Call) -> bool:
    """Whether a call makes a module of torch, or one of the folder whose parts hold no buffers, which need their data."""
    dotted = klass.file.dotted(call.func)
    if re.match(r"torch\.nn\.[A-Z]\w*$", dotted):
        return True
    own = code.find(klass.file, dotted)
    parts = with_parts(code, [own]) if own is not None else []
    return bool(parts) and not any(
        "register_buffer(" in ast.unparse(member.node) for part in parts for member in code.lineage(part)
    )


def _is_named(value: ast.expr, init: ast.AST, chosen: set[str]) -> bool:
    """Whether an expression is a device by name: a literal, a setting that holds one, or a local name of either."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "torch.device" and value.args:
        value = value.args[0]
    if isinstance(value, ast.Name):
        made = {id(v): v for goal, v in _assigned(init) if goal == value.id}
        return (
            len(made) == 1
            and not isinstance(only := next(iter(made.values())), ast.Name)
            and _is_named(only, init, chosen)
        )
    if isinstance(value, ast.Attribute):
        return value.attr in chosen
    return _is_device(value)


def _assigned(init: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Local names of a constructor with what they are set to, tuples taken apart; arguments with their defaults."""
    for step in (node for node in ast.walk(init) if isinstance(node, ast.Assign)):
        for goal in step.targets:
            if isinstance(goal, ast.Name):
                yield goal.id, step.value
            elif isinstance(goal, ast.Tuple) and isinstance(step.value, ast.Tuple):
                yield from ((one.id, v) for one, v in zip(goal.elts, step.value.elts) if isinstance(one, ast.Name))
    if isinstance(init, (ast.FunctionDef, ast.AsyncFunctionDef)):
        named = [*init.args.posonlyargs, *init.args.args]
        yield from ((a.arg, v) for a, v in zip(reversed(named), reversed(init.args.defaults)))
        yield from ((a.arg, v) for a, v in zip(init.args.kwonlyargs, init.args.kw_defaults) if v is not None)


def _chosen(context: Context) -> set[str]:
    """Settings that hold a device by name: in config.json, as a default of a config, or set by the code."""
    config = context.config
    found = {name for name, value in config.items() if isinstance(value, str) and _NAMES.match(value)}
    for file in context.code.files.values():
        for node in ast.walk(file.tree):
            names: list[str] = []
            if isinstance(node, ast.Assign) and _is_device(node.value):
                names = [goal.attr for goal in node.targets if isinstance(goal, ast.Attribute)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_device(node.value):
                names = [node.target.id]  # a field of a dataclass
            found.update(names)
    for klass in context.code.classes:
        init = klass.method("__init__") if context.code.is_config(klass) else None
        for name, value in _assigned(init) if init is not None else ():
            if _is_device(value) and name not in config:
                found.add(name)
    return found


def _is_device(value: ast.expr | None) -> bool:
    text = constant(value)
    return isinstance(text, str) and _NAMES.match(text) is not None


class _Make(Rewriter):
    def __init__(self, context: Context, devices: set[_Place], moved: set[_Place]):
        super().__init__(context)
        self.devices, self.moved = devices, moved

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        position = self.context.places.positions.get(original_node)
        place = (position.start.line, position.start.column) if position is not None else (0, 0)
        arguments = list(updated_node.args)
        if place in self.devices:
            for number, argument in enumerate(arguments):
                if argument.keyword is not None and argument.keyword.value == "device" and not _is_bridged(argument):
                    self.context.define("device_of_new", _DEVICE)
                    self.context.note(original_node, "the parameter has no data where the loader builds without any")
                    made = cst.Call(cst.Name("device_of_new"), [cst.Arg(argument.value)])
                    arguments[number] = argument.with_changes(value=made)
        if place in self.moved and arguments:
            self.context.define("made_like_others", _MOVED)
            self.context.note(original_node, "the parameter has no data where the loader builds without any")
            made = cst.Call(cst.Name("made_like_others"), [cst.Arg(arguments[0].value)])
            arguments[0] = arguments[0].with_changes(value=made)
        return updated_node.with_changes(args=arguments)


def _is_bridged(argument: cst.Arg) -> bool:
    return isinstance(argument.value, cst.Call) and getattr(argument.value.func, "value", "") == "device_of_new"


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    devices, moved = _find(context)
    if not devices and not moved:
        return tree
    return rewrites(lambda of: _Make(of, devices, moved), ("device", "Parameter"))(tree, context)


_BEFORE = """
    import torch
    from torch import nn
    from transformers import PreTrainedModel
{block}

    class ToyModel(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.proj = nn.Linear(4, 4, device={device})
            self.scale = nn.Parameter({scale})
            self.head = nn.Linear(4, 4, device=config.head_device)
            self.post_init()
"""
_BLOCK = """
    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [device_of_new]
{device}


    # [made_like_others]
{moved}
    # --- end of transformers releases ---
"""
_SOURCES = {
    name: "\n".join(f"    {line}" if line else "" for line in source.strip("\n").split("\n"))
    for name, source in (("device", _DEVICE), ("moved", _MOVED))
}

RULE = Rule(
    name="devices of parameters",
    reason="the loader builds models without data (on meta), and a parameter that is made on a device by name takes memory there",
    releases="5.0 and newer; older ones with device_map or low_cpu_mem_usage",
    before=_BEFORE.format(block="", device="config.init_device", scale="torch.Tensor(4)"),
    after=_BEFORE.format(
        block=_BLOCK.format(**_SOURCES),
        device="device_of_new(config.init_device)",
        scale="made_like_others(torch.Tensor(4))",
    ),
    apply=_apply,
    config={"init_device": "cpu"},
    words=("device=", "Tensor(", "from_numpy("),
)
