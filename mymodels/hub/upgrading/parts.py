"""What the modules of a folder are made of, read off their constructors."""

import ast
from collections.abc import Iterable, Iterator

from ..static.code_tree import Code, Klass


def named_classes(code: Code, klass: Klass, node: ast.AST) -> Iterator[Klass]:
    """The folder's classes that a piece of a class's code names, also through a table of classes by name."""
    for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
        if (found := code.find(klass.file, name)) is not None:
            yield found
        for step in klass.file.tree.body:
            if isinstance(step, ast.Assign) and any(isinstance(g, ast.Name) and g.id == name for g in step.targets):
                values = step.value.values if isinstance(step.value, ast.Dict) else []
                made = (code.find(klass.file, value.id) for value in values if isinstance(value, ast.Name))
                yield from (one for one in made if one is not None)


def with_parts(code: Code, classes: Iterable[Klass]) -> list[Klass]:
    """Modules with all the modules that their constructors name, those inside these included."""
    waiting = list(classes)
    found: dict[int, Klass] = {}
    while waiting:
        klass = waiting.pop()
        if id(klass.node) not in found and code.is_module(klass):
            found[id(klass.node)] = klass
            for member in code.lineage(klass):
                init = member.method("__init__")
                waiting += named_classes(code, member, init) if init is not None else []
    return list(found.values())
