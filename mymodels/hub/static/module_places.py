"""The modules of a folder's models: where each one is, and what its constructor is given and sets, read off the code."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .check_config import target
from .code_tree import Code, Klass, attributes, calls, constant
from .conditions import UNKNOWN, evaluate
from .constructor import CONFIG, MAX_NODES, Made, Scope, constructed, constructor_of, defaults_of, given_by, options
from .repo_snapshot import CodeFile, Folder
from .torch_norms import torch_norm
from .walking import walk

MAX_PLACES, MAX_DEPTH, MAX_MADE = 1000, 8, 20_000


@dataclass
class Place:
    """A module in a model.

    Attributes:
        model: the nearest model around it, whose `_init_weights` transformers calls; or itself.
        klass: its class.
        path: pattern of its name in the model that is loaded; "" for that model.
        where: file and line that make it.
        is_certain: whether it is there: no condition that it depends on is unknown.
        made: what its constructor sets there, those conditions left out that do not hold.
    """

    model: Klass
    klass: Klass
    path: str
    where: str
    is_certain: bool = True
    made: list[Made] = field(default_factory=list)


def places(folder: Folder, code: Code) -> list[Place]:
    """Every module of the folder's own classes in the models that `auto_map` serves; blocks of a list are one place."""
    named = [target(folder, code, str(auto)) for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    start = {id(klass.node): klass for klass in named if klass is not None and code.is_model(klass)}
    found: list[Place] = []
    waiting: list[tuple[Place, dict[str, ast.expr], Any, int]] = []
    for klass in start.values():
        waiting.append((Place(klass, klass, "", klass.where), _of_model(code, klass), folder, 0))
    count = 0
    while waiting and len(found) < MAX_PLACES and count < MAX_MADE:
        place, given, values, depth = waiting.pop()
        place.made = list(_at_place(constructed(code, place.klass, given), values))
        found.append(place)
        count += len(place.made)
        if depth < MAX_DEPTH:
            for made in place.made:
                waiting += _parts(code, place, made, values, depth + 1) if len(waiting) < MAX_PLACES else ()
    return found


def _of_model(
    code: Code, klass: Klass, call: ast.Call | None = None, scope: Scope | None = None
) -> dict[str, ast.expr]:
    """The arguments of a model's constructor: its own config, and what does not depend on the config around it."""
    found = constructor_of(code, klass)
    if found is None:
        return {}
    arguments = found[1].args.args
    given = defaults_of(found[1]) if call is None or scope is None else given_by(found[1], call, scope)
    given = {name: value for name, value in given.items() if CONFIG not in ast.unparse(value)}
    if len(arguments) > 1:
        given[arguments[1].arg] = ast.Name(CONFIG, ast.Load())
    return given


def _at_place(all_made: Iterable[Made], values: Any) -> Iterator[Made]:
    """What is made where these settings hold: without that whose conditions are known not to."""
    for made in all_made:
        outcomes = [
            (evaluate(made.scope.resolve(test, attributes=True), values) if len(walk(test)) <= MAX_NODES else UNKNOWN)
            for test, _ in made.tests
        ]
        pairs = list(zip(made.tests, outcomes))
        if all(outcome is UNKNOWN or bool(outcome) == wanted for (_, wanted), outcome in pairs):
            left = tuple(test for test, outcome in pairs if outcome is UNKNOWN)
            yield made._replace(tests=left, conditional=bool(made.tests))


def _parts(
    code: Code, place: Place, made: Made, values: Any, depth: int
) -> Iterator[tuple[Place, dict[str, ast.expr], Any, int]]:
    """The modules of the folder's classes that a constructor puts under one attribute."""
    value, file, local = made.value, made.scope.owner.file, made.scope.local
    if value is None or made.written:
        return
    value = local.get(value.id, value) if isinstance(value, ast.Name) else value
    bases = {id(n.value) for n in attributes(value)}
    names = [n.id for n in walk(value) if isinstance(n, ast.Name) and id(n) not in bases]
    spread = [local[name] for name in names if name in local]  # nn.ModuleList(layers)
    for number, source in enumerate([value, *spread]):
        for call in calls(source):
            for klass in _classes(code, file, local, call.func, made.scope, values):
                if not code.is_module(klass):
                    continue
                where, certain = file.at(call), place.is_certain and not made.tests
                alone = call is value and not made.listed
                plain = (
                    isinstance(value, (ast.List, ast.Tuple, ast.ListComp, ast.Dict, ast.DictComp)) and not made.listed
                )
                part = re.escape(made.name) if made.name and not plain else r"\w+"  # a list of Python holds no modules
                path = part if made.name and alone and not number else rf"{part}(?:\.\w+){{0,2}}"
                if code.is_model(klass):
                    path, inner = rf"(?:{path}\.)?", _of_model(code, klass, call, made.scope)
                    config = made.scope.resolve(call.args[0]) if call.args else None
                    settings = _inner_settings(config, values)
                    yield Place(klass, klass, place.path + path, where, certain), inner, settings, depth
                else:
                    found = constructor_of(code, klass)
                    inner = given_by(found[1], call, made.scope) if found is not None else {}
                    yield Place(place.model, klass, rf"{place.path}{path}\.", where, certain), inner, values, depth


def _inner_settings(config: ast.expr | None, values: Any) -> Any:
    """The settings of a model that is given this config; None if they are not known."""
    if isinstance(config, ast.Name) and config.id == CONFIG:
        return values
    inner = evaluate(config, values) if config is not None else None
    return inner if isinstance(inner, dict) else None


def _classes(
    code: Code, file: CodeFile, local: dict[str, ast.expr], func: ast.expr, scope: Scope, values: Any
) -> Iterator[Klass]:
    """The folder's classes that a call may make: by name, by a local name, or from a table of classes by name."""
    if isinstance(func, ast.Name) and func.id in local:
        for option, _ in options(local[func.id]):
            if not (isinstance(option, ast.Name) and option.id in local):
                yield from _classes(code, file, {}, option, scope, values)
    elif isinstance(func, ast.Subscript) and isinstance(func.value, ast.Name):
        key = evaluate(scope.resolve(func.slice, attributes=True), values)
        for step in file.tree.body:
            goals = step.targets if isinstance(step, ast.Assign) and isinstance(step.value, ast.Dict) else []
            if any(isinstance(goal, ast.Name) and goal.id == func.value.id for goal in goals):
                table = zip(step.value.keys, step.value.values)  # type: ignore[attr-defined]
                chosen = [v for k, v in table if key is UNKNOWN or constant(k) == key]
                yield from (one for v in chosen if (one := code.find(file, file.dotted(v))) is not None)
    elif (found := code.find(file, file.dotted(func)) or torch_norm(file, file.dotted(func))) is not None:
        yield found
