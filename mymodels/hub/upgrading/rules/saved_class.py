"""`architectures` that names a class to which no entry of `auto_map` leads."""

import ast
from typing import Any

from ...static.check_config import all_code, own_code, target
from ...static.code_tree import Code, Klass, calls, constant
from ...static.headers import tensor_headers
from ...static.repo_snapshot import Folder
from ..embeddings import parts_of
from ..rule import Report, Rule
from ..vocabulary import made

_WEIGHTED = ("Linear", "Embedding", "LayerNorm", "Conv1d", "Conv2d", "Parameter")


def _configure(values: dict[str, Any], folder: Folder, report: Report) -> dict[str, Any]:
    listed, auto_map = values.get("architectures"), values.get("auto_map")
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(auto_map, dict) or not own_code(folder):
        return values
    if not isinstance(listed[0], str) or any("--" in str(reference) for reference in auto_map.values()):
        return values
    code = all_code(folder)
    named = listed[0]
    found = {
        klass.name: klass
        for auto in auto_map
        if str(auto).startswith("AutoModel") and (klass := target(folder, code, auto))
    }
    if not found or named in {str(reference).rpartition(".")[2] for reference in auto_map.values()}:
        return values
    tops = {name.partition(".")[0] for name in tensor_headers(folder)}
    holders = [klass for klass in found.values() if tops and _holds(code, klass, tops)]
    exact = [klass for klass in holders if not _lacks(code, klass, tops)]
    saved = exact if len(exact) == 1 else holders
    own = next((klass for klass in code.classes if klass.name == named and code.is_model(klass)), None)
    if own is not None and tops and _holds(code, own, tops):
        return _with_entry(values, own, found, report) if not holders else values
    if len(saved) != 1:
        return values
    report(f"architectures names {saved[0].name}, whose weights these are, not {named}")
    return {**values, "architectures": [saved[0].name]}


def _with_entry(values: dict[str, Any], klass: Klass, found: dict[str, Klass], report: Report) -> dict[str, Any]:
    """`auto_map` with an entry for the class that was saved, if its Auto class is free."""
    from ...auto_class_names import auto_class_of

    auto = auto_class_of(klass.name)
    if not auto.startswith("AutoModel") or auto in values["auto_map"]:
        return values
    reference = f"{klass.file.name.removesuffix('.py')}.{klass.name}"
    report(f"auto_map leads {auto} to {reference}, the class that was saved")
    return {**values, "auto_map": {**values["auto_map"], auto: reference}}


def _holds(code: Code, klass: Klass, tops: set[str]) -> bool:
    """Whether every tensor belongs to a part of a class."""
    registered = {
        name
        for member in code.lineage(klass)
        if (init := member.method("__init__")) is not None
        for call in calls(init)
        if ast.unparse(call.func).startswith("self.register_") and call.args
        if isinstance(name := constant(call.args[0]), str)
    }
    return tops <= parts_of(code, klass).keys() | registered


def _lacks(code: Code, klass: Klass, tops: set[str]) -> bool:
    """Whether a class has a part with weights that the checkpoint does not hold, as a head of another kind."""
    for name, value in parts_of(code, klass).items():
        call = made(klass, value)
        if name not in tops and call is not None and call.name.rpartition(".")[2] in _WEIGHTED:
            return True
    return False


RULE = Rule(
    name="saved class",
    reason="engines and pipelines go by architectures, and find no class if auto_map does not lead to it",
    releases="every release",
    configure=_configure,
)
