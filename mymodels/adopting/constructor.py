"""Map the constructor's arguments to config fields: names, values, and how to rebuild the arguments from the fields."""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..checkpoints import CheckpointError
from .author_file import AuthorFile, attributes_read, is_unpacked, keys_read, keys_with_default

_SHARED = {  # argument names with the same meaning in transformers
    "num_labels", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
    "tie_word_embeddings", "is_decoder", "problem_type", "add_cross_attention", "vocab_size", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
}  # fmt: skip
_SCALARS = (bool, int, float, str, type(None))


class Field(NamedTuple):
    """A field of the config.

    Attributes:
        name: its name in the config.
        argument: the author's name for it.
        value: its value in this model.
        default: the author's default, or `value` if there is none.
        is_tuple: whether the author's class takes a tuple, which JSON stores as a list.
    """

    name: str
    argument: str
    value: Any
    default: Any
    is_tuple: bool = False


class Argument(NamedTuple):
    """An argument of the constructor.

    Attributes:
        name: name of the argument.
        kind: `value` (a field), `config` (a config of transformers), or an object built from fields: `dataclass`,
            `object` (of another class of the file), `namespace`, `dict`.
        fields: the fields it is built from.
        type_name: name of the dataclass or class.
        keyword: whether it has to be passed by its name.
        set_after: fields of an `object` that are set after its constructor, which does not take them.
    """

    name: str
    kind: str
    fields: list[Field]
    type_name: str = ""
    keyword: bool = True
    set_after: tuple[str, ...] = ()


class Constructor(NamedTuple):
    """How to build the author's class from a config.

    Attributes:
        arguments: in the order of the signature, without those in `left`.
        config_class: the transformers config class of the first argument, or None.
        config_values: values to set on that config.
        left: arguments that keep the author's default, which config.json cannot hold.
    """

    arguments: list[Argument]
    config_class: type[PretrainedConfig] | None
    config_values: dict[str, Any]
    left: list[str]

    @property
    def fields(self) -> list[Field]:
        return list({field.name: field for argument in self.arguments for field in argument.fields}.values())


def read_constructor(
    cls: type, file: AuthorFile, given: Mapping[str, Any], recorded: Mapping[str, Any] | None = None
) -> Constructor:
    """Find a value for every argument of a constructor.

    Args:
        given: values by name, from the caller.
        recorded: values from a training checkpoint, for arguments that are not given.

    Raises:
        CheckpointError: an argument has no value or is ambiguous, or a given name is not an argument.
    """
    place, left, arguments = f"{file.path}: {cls.__name__}", [], []
    values, used = dict(given), set()
    config_class: type[PretrainedConfig] | None = None
    config_values: dict[str, Any] = {}
    try:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    except (TypeError, ValueError):
        parameters = []
    for number, parameter in enumerate(parameters):
        name = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD and config_class is None:
            arguments += _from_keywords(name, file, {**(recorded or {}), **values}, set(values))
            used |= {argument.name for argument in arguments}
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        keyword = parameter.kind is not parameter.POSITIONAL_ONLY
        taken = _class_of(parameter, cls)
        if config_class is None and (_is_config(taken) or (number == 0 and issubclass(cls, PreTrainedModel))):
            config_class = taken if _is_config(taken) else getattr(cls, "config_class", None)
            if config_class is None:
                raise CheckpointError(f"{place} names no config class: write `config_class = …Config` into the class")
            arguments.append(Argument(name, "config", [], config_class.__name__, False))
            continue
        if name in values and not isinstance(values[name], Mapping):
            used.add(name)
            arguments.append(Argument(name, "value", [_field(name, values[name], parameter.default)], "", keyword))
            continue
        nested = values.pop(name) if isinstance(values.get(name), Mapping) else {}
        nested = {**nested, **{k.partition(".")[2]: values.pop(k) for k in list(values) if k.startswith(f"{name}.")}}
        fields, kind, type_name, set_after = _object(parameter, taken, cls, file)
        if kind in ("namespace", "dict"):  # the file may also read it under another name, as in `c.width`
            others = {p.name for p in parameters}
            more = [
                n
                for n in (*nested, *(() if config_class else values))
                if n not in (*fields, *others) and _is_read(n, file)
            ]
            fields |= dict.fromkeys(more, inspect.Parameter.empty)
        if kind:
            own = []
            for field, default in fields.items():
                value = _find(field, default, nested, values, recorded)
                if value is _OPTIONAL:
                    continue
                if value is _MISSING:
                    raise CheckpointError(
                        f"{place} reads {name}.{field}, for which there is no value: give it, --config {field}=…"
                    )
                used.add(field)
                own.append(_field(field, value, default))
            set_after = tuple(field.argument for field in own if field.argument in set_after)
            if extra := sorted(set(nested) - set(fields)):
                raise CheckpointError(f"{place} reads no {name}.{extra[0]}; it reads {', '.join(fields)}")
            arguments.append(Argument(name, kind, own, type_name, keyword, set_after))
            continue
        if nested:
            arguments.append(Argument(name, "value", [_field(name, nested, parameter.default)], "", keyword))
            continue
        value = _find(name, parameter.default, {}, values, recorded)
        if value is _MISSING or value is inspect.Parameter.empty:
            if isinstance(taken, type) and issubclass(taken, nn.Module):
                raise CheckpointError(
                    f"{place} needs its argument {name!r}, a module, which config.json cannot hold: build it in __init__ from "
                    "numbers and strings"
                )
            raise CheckpointError(
                f"{place} needs its argument {name!r}, which has no default: give it, --config {name}=…"
            )
        if not _is_plain(value):
            left.append(name)
            continue
        arguments.append(Argument(name, "value", [_field(name, value, parameter.default)], "", keyword))
    _check_names(place, arguments)
    rest = {name: value for name, value in values.items() if name not in used}
    if config_class is not None:
        known = config_class().to_dict() if rest else {}
        aliases = getattr(config_class, "attribute_map", {})
        config_values = {
            n: v for n, v in rest.items() if n in known or n in aliases or n in ("num_labels", "id2label", "label2id")
        }
        rest = {name: value for name, value in rest.items() if name not in config_values}
        fields_named = {field.name for argument in arguments for field in argument.fields}
        attributes = attributes_read(file, next(a.name for a in arguments if a.kind == "config"))
        if both := sorted(fields_named & attributes & set(config_class().to_dict())):
            raise CheckpointError(
                f"{place}: {both[0]!r} is read from two arguments of the constructor, but a config has only one field of that name: rename one"
            )
    if rest:
        name = sorted(rest)[0]
        names = [field.argument for argument in arguments for field in argument.fields]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"its arguments are {', '.join(names) or 'none'}"
        raise CheckpointError(f"{place} has no argument {name!r}: {hint}")
    return Constructor(arguments, config_class, config_values, left)


_MISSING = object()
_OPTIONAL = object()  # an optional field whose default is not a plain value


def _from_keywords(name: str, file: AuthorFile, given: Mapping[str, Any], named: set[str]) -> list[Argument]:
    """The arguments that the constructor takes through its `**name`: those it reads by name or passes on."""
    read, defaults = keys_read(file, name), keys_with_default(file, name)
    handed_on = named if is_unpacked(file, name) else set()
    found = []
    for key in sorted(read | handed_on):
        default = _literal(defaults.get(key)) if key in defaults else _OPTIONAL
        value = given.get(key, default)
        if value is not _OPTIONAL and not isinstance(value, Mapping):
            found.append(Argument(key, "value", [_field(key, value, value if default is _OPTIONAL else default)]))
    return found


def _is_read(name: str, file: AuthorFile) -> bool:
    """Whether the file reads an attribute or key of this name from any object."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.Constant) and node.value == name)
        for node in ast.walk(file.tree)
    )


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else _OPTIONAL
    except (ValueError, TypeError, SyntaxError):
        return _OPTIONAL


def _find(name: str, default: Any, nested: Mapping, given: Mapping, recorded: Mapping | None) -> Any:
    for values in (nested, given, recorded or {}):
        if name in values:
            return values[name]
    return _MISSING if default is inspect.Parameter.empty else default


def _class_of(parameter: inspect.Parameter, cls: type) -> Any:
    """The class of an argument, from its annotation or its default."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = getattr(inspect.getmodule(cls), annotation.strip("'\""), None)
    if isinstance(annotation, type) and annotation is not inspect.Parameter.empty:
        return annotation
    default = parameter.default
    return type(default) if dataclasses.is_dataclass(default) and not isinstance(default, type) else None


def _is_config(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, PretrainedConfig)


_METHODS = {"items", "keys", "values", "get", "update", "copy", "append", "pop", "shape", "size", "dim"}
_Made = tuple[dict[str, Any], str, str, tuple[str, ...]]


def _object(parameter: inspect.Parameter, taken: Any, cls: type, file: AuthorFile) -> _Made:
    """How to build an argument that is an object: field → default, its kind, its class, fields that are set later."""
    if isinstance(taken, type) and dataclasses.is_dataclass(taken):
        return _dataclass_fields(taken), "dataclass", str(getattr(taken, "__name__", "")), ()
    if taken in (int, float, str, bool, list, tuple):
        return {}, "", "", ()
    module = inspect.getmodule(cls)
    optional = {key: _literal(node) for key, node in keys_with_default(file, parameter.name).items()}
    read = attributes_read(file, parameter.name) - _METHODS
    if read:
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == cls.__module__]
        suiting = [
            value
            for value in own
            if dataclasses.is_dataclass(value)
            and read <= set(dir(value)) | {field.name for field in dataclasses.fields(value)}
        ]
        if len(suiting) > 1:
            names = " or ".join(value.__name__ for value in suiting)
            raise CheckpointError(
                f"{file.path}: the argument {parameter.name!r} of {cls.__name__} could be {names}: annotate it, "
                f"`{parameter.name}: {suiting[0].__name__}`"
            )
        if suiting:
            return _dataclass_fields(suiting[0]), "dataclass", suiting[0].__name__, ()
        plain = [taken] if taken in own else [v for v in own if read <= _class_attributes(v, file)]
        if len(plain) == 1 and not issubclass(plain[0], nn.Module):
            return _class_fields(plain[0])
        named: dict[str, Any] = dict.fromkeys(sorted(read), inspect.Parameter.empty)
        return {**optional, **named}, "namespace", "", ()
    keys = keys_read(file, parameter.name)
    if keys and taken in (None, dict):
        return {key: optional.get(key, inspect.Parameter.empty) for key in sorted(keys)}, "dict", "", ()
    return {}, "", "", ()


def _class_attributes(cls: type, file: AuthorFile) -> set[str]:
    """The attributes of a class of the file, set in its body or by its methods."""
    node = file.classes.get(cls.__name__)
    stored = {
        n.attr
        for n in (ast.walk(node) if node else ())
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    return stored | {name for base in cls.__mro__[:-1] for name in vars(base)}


def _class_fields(cls: Any) -> _Made:
    """The constructor arguments of a plain class, and its class attributes with plain values."""
    fields: dict[str, Any] = {}
    by_keyword = False
    if cls.__init__ is not object.__init__:
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
            by_keyword = by_keyword or parameter.kind is parameter.VAR_KEYWORD
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                fields[parameter.name] = parameter.default
    on_class = {name for base in cls.__mro__[:-1] for name in vars(base) if not name.startswith("_")}
    attributes = {n: getattr(cls, n) for n in sorted(on_class - set(fields)) if _is_plain(getattr(cls, n))}
    return {**fields, **attributes}, "object", cls.__name__, () if by_keyword else tuple(attributes)


def _dataclass_fields(cls: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found[field.name] = inspect.Parameter.empty if made is dataclasses.MISSING else made
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return isinstance(value, _SCALARS)


def _field(argument: str, value: Any, default: Any) -> Field:
    if not _is_plain(value):
        raise CheckpointError(
            f"the value of {argument!r} is a {type(value).__name__}, which config.json cannot hold: take a number, text, list or dictionary"
        )
    if default is inspect.Parameter.empty or not _is_plain(default):
        default = value
    is_tuple = isinstance(default, tuple) or isinstance(value, tuple)
    value, default = (list(v) if isinstance(v, tuple) else v for v in (value, default))
    return Field(_config_name(argument), argument, value, default, is_tuple)


def _config_name(argument: str) -> str:
    """The field name for an argument: its own, unless transformers uses that name for something else."""
    if argument in _SHARED:
        return argument
    owned = (
        hasattr(PretrainedConfig, argument)
        or argument in vars(PretrainedConfig())
        or argument in vars(GenerationConfig())
    )
    return f"model_{argument}" if owned or argument.startswith("_") else argument


def _check_names(place: str, arguments: list[Argument]) -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for argument in arguments:
        for field in argument.fields:
            if field.name in seen and seen[field.name][1] != field.value:
                raise CheckpointError(
                    f"{place}: {field.argument!r} is a field of both {seen[field.name][0]} and {argument.name}, with different values: "
                    "a config has only one field of that name, rename one"
                )
            seen[field.name] = argument.name, field.value
