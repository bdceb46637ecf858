"""Every node of a syntax tree, quickly: the checks look through the same trees hundreds of times."""

import ast
from collections.abc import Sequence


def walk(node: ast.AST) -> Sequence[ast.AST]:
    """The nodes that `ast.walk` gives, in its order. Those of a file are kept: the tree must not be changed afterwards."""
    if not isinstance(node, ast.Module):
        return _nodes(node)
    kept = getattr(node, "_nodes", None)
    if kept is None:
        kept = node._nodes = _nodes(node)  # type: ignore[attr-defined]
    return kept


def _nodes(node: ast.AST) -> list[ast.AST]:
    found = [node]
    for one in found:  # grows as it is read
        for name in one._fields:
            value = getattr(one, name, None)
            if isinstance(value, list):
                found += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                found.append(value)
    return found
