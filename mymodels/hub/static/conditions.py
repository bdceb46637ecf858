"""What a condition in a constructor comes to, as far as constants and the config tell."""

import ast
from typing import Any

from .code_tree import constant
from .constructor import CONFIG
from .repo_snapshot import Folder
from .settings import class_defaults

UNKNOWN = object()


def evaluate(node: ast.expr, values: Any) -> Any:
    """The value of a condition as far as constants and the config tell; `UNKNOWN` otherwise.

    Args:
        values: the settings: the folder, a dictionary (a config inside the config), or None if they are not known.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == CONFIG:
        return values.config if isinstance(values, Folder) else values
    if isinstance(node, ast.Attribute):
        return _setting(node.value, node.attr, values)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
        found = _setting(node.args[0], str(constant(node.args[1])), values)
        known = isinstance(evaluate(node.args[0], values), dict)
        return evaluate(node.args[2], values) if found is UNKNOWN and known else found
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = evaluate(node.operand, values)
        return UNKNOWN if value is UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        found = [evaluate(one, values) for one in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(one is not UNKNOWN and bool(one) == decides for one in found):
            return decides
        return UNKNOWN if any(one is UNKNOWN for one in found) else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compare(evaluate(node.left, values), node.ops[0], evaluate(node.comparators[0], values))
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        found = [evaluate(one, values) for one in node.elts]
        return UNKNOWN if any(one is UNKNOWN for one in found) else found
    return UNKNOWN


def _setting(of: ast.expr, name: str, values: Any) -> Any:
    held = evaluate(of, values)
    if not isinstance(held, dict):
        return UNKNOWN
    if name in held:
        return held[name]
    if isinstance(values, Folder) and isinstance(of, ast.Name):
        default = class_defaults(values)[0].get(name)
        return UNKNOWN if default is None else default
    return UNKNOWN


def _compare(left: Any, op: ast.cmpop, right: Any) -> Any:
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    try:
        if isinstance(op, (ast.Is, ast.Eq)):
            return left == right
        if isinstance(op, (ast.IsNot, ast.NotEq)):
            return left != right
        if isinstance(op, (ast.In, ast.NotIn)):
            return (left in right) == isinstance(op, ast.In)
        if isinstance(op, (ast.Gt, ast.GtE)):
            return left > right or (isinstance(op, ast.GtE) and left == right)
        return left < right or (isinstance(op, ast.LtE) and left == right)
    except TypeError:
        return UNKNOWN
