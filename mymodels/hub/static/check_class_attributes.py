"""Checks of class attributes that name modules and parameters: device maps, dtypes, ties, and ignored keys."""

import ast
import re
from collections.abc import Iterator

from .check_config import own_code
from .check_model import live_code
from .code_tree import Code, Klass, constant, is_self
from .headers import tensor_headers
from .repo_snapshot import Finding, Folder, brief
from .walking import walk

_LISTS = (ast.List, ast.Tuple, ast.Set)


def no_split_modules(folder: Folder) -> Iterator[Finding]:
    """`_no_split_modules` names classes of the model; otherwise a device map may split such a module."""
    code = live_code(folder)
    defined = {klass.name for klass in code.classes}
    no_module = {k.name for k in code.classes if code.is_config(k) or code.roots(k) <= {"object", ""}}
    remedy = "name the class of the blocks, which a device map must keep on one device"
    for klass in code.classes:
        value = klass.value("_no_split_modules")
        if isinstance(value, ast.Constant) and isinstance(text := value.value, str):
            what = f"{klass.name}._no_split_modules is the text {text!r}, not a list: each letter counts as a name"
            yield Finding("failed", what, klass.file.at(value), f'write ["{text}"]')
        if not isinstance(value, _LISTS):
            continue
        if no_texts := [part for part in value.elts if isinstance(part, (ast.Name, ast.Attribute))]:
            what = f"{klass.name}._no_split_modules holds {ast.unparse(no_texts[0])}, the class itself, not its name"
            yield Finding("failed", what, klass.file.at(value), f'write "{ast.unparse(no_texts[0])}"')
        names = [name for name in map(constant, value.elts) if isinstance(name, str)]
        imported = {meaning.rpartition(".")[2] for file in code.files.values() for meaning in file.names.values()}
        strange = [name for name in names if name not in defined | imported or name in no_module]
        no_modules = [name for name in strange if name in no_module]
        strange = no_modules or ([] if _holds_another(code) else strange)
        if not strange:
            continue
        left = [name for name in names if name not in strange]
        kind = "not a module" if no_modules else "not a class of this code"
        what = f"{klass.name}._no_split_modules names {', '.join(strange)}, which is {kind}"
        yield Finding("warning" if left else "failed", what, klass.file.at(value), remedy)


def _holds_another(code: Code) -> bool:
    """Whether the code builds a model of transformers, whose blocks may be meant."""
    return any(
        "AutoModel" in file.text
        or any(
            meaning.startswith("transformers") and re.search(r"(?<!PreTrained)(Model|For[A-Z]\w+)$", meaning)
            for meaning in file.names.values()
        )
        for file in code.files.values()
    )


_PATTERNS = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save")
_PARTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_skip_keys_device_placement", *_PATTERNS)


def named_parts(folder: Folder) -> Iterator[Finding]:
    """Attributes that name modules, parameters or patterns have the right form and match something."""
    code = live_code(folder)
    for klass in code.classes if own_code(folder) else ():
        if not code.is_model(klass):
            continue
        for attribute in _PARTS:
            value = klass.value(attribute)
            if value is None or (constant(value) is None and not isinstance(value, (*_LISTS, ast.Constant))):
                continue
            yield from _one_attribute(folder, code, klass, attribute, value)
        yield from _ties(code, klass)
        if klass.name in {str(reference).rpartition(".")[2] for reference in folder.auto_map.values()}:
            yield from _prefix(code, klass)


def _one_attribute(folder: Folder, code: Code, klass: Klass, attribute: str, value: ast.expr) -> Iterator[Finding]:
    shown, where = f"{klass.name}.{attribute}", klass.file.at(value)
    if isinstance(value, ast.Constant):
        if value.value is None or (isinstance(value.value, str) and attribute == "_skip_keys_device_placement"):
            return
        text = brief(value.value)
        what = f"{shown} is {text}, not a list of names"
        yield Finding(
            "failed", what, where, f"write [{text}]" if isinstance(value.value, str) else "write a list of names"
        )
        return
    assert isinstance(value, _LISTS)
    names = [name for name in map(constant, value.elts) if isinstance(name, str)]
    if attribute in _PATTERNS:
        for pattern in names:
            try:
                everything = re.fullmatch(pattern, "model.layers.0.weight") and re.fullmatch(pattern, "x")
            except re.error as error:
                what = f"{shown} has {brief(pattern)}, which is not a regular expression: {error}"
                yield Finding("failed", what, where, "write a regular expression, with dots escaped")
                continue
            if everything and attribute != "_keys_to_ignore_on_save":
                what = f"{shown} has {brief(pattern)}, which matches every name: no weight is ever reported"
                yield Finding("failed", what, where, "name the keys to ignore")
    elif attribute.startswith("_keep"):
        parts = _all_parts(code) | {part for key in tensor_headers(folder) for part in key.split(".")}
        for name in names if not _holds_another(code) else ():
            if any(part not in parts | {"weight", "bias"} and not part.isdigit() for part in name.split(".")):
                what = f"{shown} names {brief(name)}, which is not a module of this code: nothing is kept in float32"
                yield Finding("failed", what, where, "name the attribute that holds the module")


def _all_parts(code: Code) -> set[str]:
    """The attributes of all modules, which are the parts of parameter names."""
    return {
        goal.attr
        for klass in code.classes
        for node in walk(klass.node)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for goal in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(goal, ast.Attribute) and is_self(goal)
    }


def _ties(code: Code, klass: Klass) -> Iterator[Finding]:
    """Both sides of a tie are parameters of the model, with full names."""
    found = klass.value("_tied_weights_keys")
    if not isinstance(found, ast.Dict) or _holds_another(code):
        return
    parts = _all_parts(code)
    for name in filter(None, [*map(constant, found.keys), *map(constant, found.values)]):
        if not isinstance(name, str) or re.search(r"[\\^$()|*+?\[]", name):
            continue
        words = name.split(".")
        strange = [word for word in words[:-1] if word not in parts and not word.isdigit()]
        if not strange or words[-1] not in ("weight", "bias"):  # a module's name means its parameters
            continue
        what = f"{klass.name}._tied_weights_keys names {name}, but no module here has a part {strange[0]!r}"
        remedy = 'name the parameters: {"lm_head.weight": "model.embed_tokens.weight"}'
        yield Finding("failed", what, klass.file.at(found), remedy)
        return


def _prefix(code: Code, klass: Klass) -> Iterator[Finding]:
    """`base_model_prefix` is the attribute of a model with a head that holds the base model; loading relies on it."""
    if id(klass.node) in code.parents or not re.search(r"For[A-Z]|Head", klass.name):
        return
    found = code.value(klass, "base_model_prefix")
    prefix = constant(found[1]) if found is not None else None
    init = klass.method("__init__")
    if not isinstance(prefix, str) or not prefix or init is None or _holds_another(code):
        return
    kept: dict[str, str] = {}
    for node in walk(init):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            inner = code.find(klass.file, klass.file.dotted(node.value.func))
            if inner is not None and code.is_model(inner):
                kept |= {goal.attr: inner.name for goal in node.targets if isinstance(goal, ast.Attribute)}
    if len(kept) == 1 and prefix not in kept and prefix not in _all_parts(code):
        attribute, base = next(iter(kept.items()))
        what = f"base_model_prefix is {prefix!r}, but {klass.name} keeps its {base} in self.{attribute}"
        yield Finding(
            "failed",
            what,
            klass.where,
            f'write base_model_prefix = "{attribute}": weights of the base are not found otherwise',
        )


CHECKS = {"no split modules": no_split_modules, "named modules": named_parts}
