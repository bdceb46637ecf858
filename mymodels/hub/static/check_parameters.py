"""Parameters that the checkpoint lacks and that no `_init_weights` fills: the loader leaves them without a value."""

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from .check_model import live_code
from .code_tree import Code, Klass, constant, depth, is_self
from .constructor import Made
from .covered_by_init import initialises
from .headers import tensor_headers
from .initial_value import init_call
from .module_places import Place, places
from .repo_snapshot import Finding, Folder
from .torch_norms import is_torch_norm
from .walking import walk

MAX_KEYS = 5000  # that one parameter is looked for in; more are taken to have it
# a class of these has its parameters in modules of its own
_LISTS = ("ParameterList", "ParameterDict")
_RENAMES = ("_checkpoint_conversion_mapping", "load_state_dict", "_load_from_state_dict", "_state_dict_pre_hook")


class LeftEmpty(NamedTuple):
    """A parameter without a value after loading.

    Attributes:
        klass: the class that makes it.
        name: the attribute.
        made: what its constructor sets it to, and writes into it, at all its places.
        models: the models that have it, whose `_init_weights` does not fill it.
        where: file and line that make it.
        example: the name of such a tensor, as far as it is known.
        may_be_missing: whether there are modules of the class without it.
    """

    klass: Klass
    name: str
    made: list[list[Made]]
    models: list[Klass]
    where: str
    example: str

    @property
    def may_be_missing(self) -> bool:
        return any(one.conditional for place in self.made for one in place if not one.written)


def parameters_left_empty(folder: Folder, code: Code) -> list[LeftEmpty]:
    """The parameters of the folder's own classes that no file has and no `_init_weights` fills.

    A checkpoint that has them at each place gives none; nor does a folder without a checkpoint. What is made under a
    condition whose outcome is not known is left out: a checkpoint without it may be complete.
    """
    keys = {re.sub(r"\.\d+(?=\.)", ".0", key) for key in tensor_headers(folder) if key.count(".") < 20}
    if not keys or not any(re.search("Parameter|Norm", file.text) for file in code.files.values()):
        return []
    renamed = any(word in file.text for file in code.files.values() for word in _RENAMES)
    prefix, removed = _prefixes(code), _removed(code)
    found: dict[tuple[int, str], LeftEmpty] = {}
    all_places = places(folder, code)
    for place in all_places:
        for made in place.made:
            kind = _parameter(made)
            if kind is None or not made.name or made.name in removed or made.tests or not place.is_certain:
                continue
            key = (id(made.scope.owner.node), made.name)
            if key in found and any(model.node is place.model.node for model in found[key].models):
                continue
            path = r"(?:.*\.)?" if renamed else prefix + place.path
            listed = kind in _LISTS and any(re.match(rf"{path}{re.escape(made.name)}\.", key) for key in keys)
            if listed or _in_file(keys, path, made.name) or _is_tied(folder, code, keys, path, place, made):
                continue
            if initialises(code, place.model, place.klass, made.name):
                continue
            owner = made.scope.owner
            if key not in found:
                where = place.where if is_torch_norm(owner) else owner.file.at(made.node)
                found[key] = LeftEmpty(owner, made.name, [], [], where, _shown(place) + made.name)
            found[key].models.append(place.model)
    for place in all_places:
        for name in {made.name for made in place.made}:
            owners = [m.scope.owner for m in place.made if m.name == name and _parameter(m)]
            if owners and (one := found.get((id(owners[0].node), name))) is not None:
                one.made.append([m for m in place.made if m.name in (name, "*") and (m.written or _parameter(m))])
    return list(found.values())


def _removed(code: Code) -> set[str]:
    """The parameters that a model takes out of its parts, as with `for m in self.modules(): m.register_parameter("bias", None)`."""
    found: set[str] = set()
    for klass in code.classes:
        for node in walk(klass.node):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 2:
                empty = isinstance(node.args[1], ast.Constant) and node.args[1].value is None
                if node.func.attr == "register_parameter" and not is_self(node.func) and empty:
                    found.add(str(constant(node.args[0])))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None:
                found |= {goal.attr for goal in node.targets if isinstance(goal, ast.Attribute) and not is_self(goal)}
            elif isinstance(node, ast.Delete):
                found |= {goal.attr for goal in node.targets if isinstance(goal, ast.Attribute)}
    return found


def _shown(place: Place) -> str:
    """The name of a module with a dot, `*` for a part that is not known."""
    name = place.path.replace(r"(?:\.\w+){0,2}", ".0").replace(r"\w+", "*")
    return re.sub(r"\(\?:|\)\?|\\", "", name)


def _parameter(made: Made) -> str | None:
    """`Parameter`, `ParameterList` or `ParameterDict`, if that is what is made."""
    if made.written or made.listed or not isinstance(made.value, ast.Call):
        return None
    module, _, name = made.scope.owner.file.dotted(made.value.func).rpartition(".")
    return name if module.startswith("torch.nn") and name in ("Parameter", *_LISTS) else None


def _prefixes(code: Code) -> str:
    """A pattern of what may stand in front of a name, as the same base model is saved alone and inside another."""
    names = {constant(value) for klass in code.classes if (value := klass.value("base_model_prefix")) is not None}
    listed = "|".join(sorted(re.escape(name) for name in names if isinstance(name, str) and name))
    return rf"(?:(?:{listed})\.)*" if listed else ""


def _in_file(keys: Iterable[str], pattern: str, name: str) -> bool:
    """Whether the checkpoint has a tensor, also under the old names of a norm's weight and bias."""
    part, dot, last = name.rpartition(".")
    endings = tuple(
        part + dot + one for one in {"weight": ("weight", "gamma"), "bias": ("bias", "beta")}.get(last, (last,))
    )
    named = list(islice((key for key in keys if key.endswith(endings)), MAX_KEYS + 1))
    found = re.compile(f"(?:{pattern})(?:{'|'.join(map(re.escape, endings))})")
    return len(named) > MAX_KEYS or any(found.fullmatch(key) for key in named)


def _is_tied(folder: Folder, code: Code, keys: set[str], path: str, place: Place, made: Made) -> bool:
    """Whether transformers gives the parameter the value of another one, which is in the file."""
    pattern = re.compile(path + re.escape(made.name))
    for model in code.classes:
        table = model.value("_tied_weights_keys") if code.is_model(model) else None
        declared = table.keys if isinstance(table, ast.Dict) else getattr(table, "elts", [])
        for number, node in enumerate(declared):
            if not pattern.fullmatch(str(constant(node)).replace("\\", "").strip("^$")):
                continue
            if isinstance(table, ast.Dict):
                other = str(constant(table.values[number]))
                return any(key == other or key.endswith(f".{other}") or other.endswith(f".{key}") for key in keys)
            partners = [
                ast.unparse(goal).removeprefix("self.")
                for node in walk(made.scope.owner.node)
                if isinstance(node, ast.Assign) and is_self(node.value, made.name)
                for goal in node.targets
                if depth(goal) > 2
            ]  # self.decoder.bias = self.bias; a list without such a line is of embeddings
            return not partners or any(_in_file(keys, path, partner) for partner in partners)
    if made.name != "weight" or not folder.config.get("tie_word_embeddings", True):
        return False
    found = code.method(place.model, "get_output_embeddings")
    heads = [n.value for n in walk(found[1]) if isinstance(n, ast.Return)] if found is not None else []
    return any(head is not None and is_self(head) and place.path.endswith(rf"{head.attr}\.") for head in heads)  # type: ignore[attr-defined]


def parameters(folder: Folder) -> Iterator[Finding]:
    """Parameters that the checkpoint lacks get a value in `_init_weights`."""
    for one in parameters_left_empty(folder, live_code(folder)):
        what = (
            f"the parameter {one.name} of {one.klass.name} ({one.example}) is not in the checkpoint, and no _init_weights "
            "fills it: loading leaves it without a value, whatever its memory holds"
        )
        written = init_call(one.made, one.name) or f"one of nn.init on module.{one.name} itself"
        yield Finding("warning", what, one.where, f"initialise it in _init_weights: {written}")


CHECKS = {"parameters": parameters}
