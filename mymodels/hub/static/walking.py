"""Every node of a syntax tree, quickly: the checks look through the same trees hundreds of times.

What was found is kept on the nodes, so a tree must not be changed afterwards.
"""

import ast
from collections.abc import Sequence


def walk(node: ast.AST) -> Sequence[ast.AST]:
    """The nodes that `ast.walk` gives, in its order."""
    if not isinstance(node, ast.Module):
        return _nodes(node)
    kept = getattr(node, "_nodes", None)
    if kept is None:
        kept = node._nodes = _nodes(node)  # type: ignore[attr-defined]
    return kept


def children(node: ast.AST) -> tuple[ast.AST, ...]:
    """The nodes that `ast.iter_child_nodes` gives, in its order."""
    try:
        return node._children  # type: ignore[attr-defined]
    except AttributeError:
        kept = node._children = tuple(ast.iter_child_nodes(node))  # type: ignore[attr-defined]
        return kept


def _nodes(node: ast.AST) -> list[ast.AST]:
    found = [node]
    for one in found:  # grows as it is read
        found += children(one)
    return found
