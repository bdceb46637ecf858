"""What the code still gets wrong after an upgrade: faults of the original that no rule can repair without changing numbers."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..static.check_model import live_code
from ..static.check_parameters import parameters_left_empty
from ..static.code_tree import Code, Klass, calls
from ..static.initial_value import init_call, value_of
from ..static.repo_snapshot import Finding, Folder
from .generating import Function, own_model, parameters

_MASK, _PREPARE = "attention_mask", "prepare_inputs_for_generation"


def masks_not_passed(folder: Folder) -> list[Finding]:
    """Where the code is given a mask to generate with, and drops it; each with the place in the original.

    To pass it on would change what is generated from padded rows, so no rule does.
    """
    code = live_code(folder)
    found = []
    for klass in code.classes:
        if not own_model(code, klass):
            continue
        for method in (klass.method("generate"), klass.method(_PREPARE)):
            if method is not None and _drops(code, klass, method):
                what = (
                    f"{klass.name}.{method.name} is given {_MASK} and does not pass it on, so padding counts as text; "
                    "left as it is, because passing it on changes what is generated from padded rows"
                )
                found.append(Finding("failed", what, klass.file.at(method)))
    return found


def _drops(code: Code, klass: Klass, method: Function) -> bool:
    if method.name == "generate":
        inner = [call for call in calls(method) if ast.unparse(call.func).endswith(".generate")]
        return _MASK in parameters(method) and bool(inner) and not any(_passes(method, call) for call in inner)
    forward = code.method(klass, "forward")
    returned = [node.value for node in ast.walk(method) if isinstance(node, ast.Return) and node.value is not None]
    uses = forward is not None and any(isinstance(n, ast.Name) and n.id == _MASK for n in ast.walk(forward[1]))
    return uses and bool(returned) and _MASK not in _texts(method) and not any(map(_is_open, returned))


def _passes(method: Function, call: ast.Call) -> bool:
    """Whether a call is given the mask, by name, by place, or in a dictionary that the method fills itself."""
    names = {node.id for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Name)}
    names |= {node.id for k in call.keywords if k.arg for node in ast.walk(k.value) if isinstance(node, ast.Name)}
    extra = method.args.kwarg.arg if method.args.kwarg is not None else ""
    opened = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
    return _MASK in names or bool(opened - {extra}) or (bool(opened) and _MASK in _texts(method))


def _texts(method: Function) -> set[str]:
    """The texts of a method: keys of its dictionaries, and names that `kwargs.get` is asked for."""
    keywords = {k.arg for call in calls(method) for k in call.keywords if k.arg}
    return keywords | {str(node.value) for node in ast.walk(method) if isinstance(node, ast.Constant)}


def _is_open(value: ast.expr) -> bool:
    """Whether a returned dictionary may hold what its method does not name: `{**kwargs}`, or what a call returns."""
    if isinstance(value, ast.Dict):
        return None in value.keys
    return True


def parameters_without_value(folder: Folder) -> list[Finding]:
    """Parameters that no file has and whose value in the constructor is no call of `nn.init`; each with its place."""
    found = []
    for one in parameters_left_empty(folder, live_code(folder)):
        if init_call(one.made, one.name) is None:
            what = (
                f"the parameter {one.name} of {one.klass.name} ({one.example}) is not in the checkpoint, and loading leaves "
                f"it without a value; no call of nn.init gives what the constructor does ({value_of(one.made)}), so "
                "_init_weights is left as it is: add to it what is right"
            )
            found.append(Finding("failed", what, one.where))
    return found


def verify_faults(folder: Path, release: str, how: Mapping[str, Any]) -> Iterator[Finding]:
    """What `verify` fails on in an upgraded folder under one release.

    Args:
        release: the transformers release.
        how: further arguments of `verify`.
    """
    from ..verifying import verify

    try:
        failed = verify(folder, releases=[release], quick=True, **how).failed
    except (ValueError, RuntimeError, OSError) as error:
        yield Finding("skipped", f"`mymodels verify` could not be run: {error}")
        return
    for _, check in failed:
        yield Finding("failed", f"{check.name}: {check.what}", check.where, check.remedy)
